"""Manifests round-trip, vouch for every file, and give equal fingerprints to equal bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nano.errors import BadFileError
from nano.manifest import Manifest, fingerprint, input_entry, read_manifest, write_manifest


def made(folder: Path, text: str = "weights") -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "model.bin").write_text(text)
    (folder / "sub" / "t.json").write_text("{}")
    write_manifest(folder, Manifest(kind="int4", recipe={"bits": 4}, results={"kl": 0.5}))
    return folder


def test_round_trip(tmp_path: Path) -> None:
    read = read_manifest(made(tmp_path / "a"))
    assert read.recipe == {"bits": 4}
    assert set(read.files) == {"model.bin", "sub/t.json"}
    assert read.files["model.bin"] == {"sha256": hashlib.sha256(b"weights").hexdigest(), "bytes": 7}
    assert read.versions["nanokit"]
    assert read.created.endswith("+00:00")


def test_fingerprint_is_of_contents_not_of_time_or_place(tmp_path: Path) -> None:
    a, b, c = made(tmp_path / "a"), made(tmp_path / "b"), made(tmp_path / "c", "other")
    assert fingerprint(a) == fingerprint(b) != fingerprint(c)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x").write_text("1")
    before = fingerprint(tmp_path / "plain")
    (tmp_path / "plain" / "x").write_text("2")
    assert fingerprint(tmp_path / "plain") != before


def test_history_can_be_walked(tmp_path: Path) -> None:
    first = made(tmp_path / "a")
    second = tmp_path / "b"
    second.mkdir()
    write_manifest(second, Manifest(kind="onnx", inputs={"int4": input_entry(first)}))
    entry = read_manifest(second).inputs["int4"]
    assert entry["fingerprint"] == fingerprint(first)
    assert entry["manifest"]["recipe"] == {"bits": 4}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"kind": "int4"}',
        '{"schema_version": 99, "kind": "int4"}',
        '{"schema_version": 1, "kind": "gguf"}',
        '{"schema_version": 1, "kind": "int4", "files": []}',
        '{"schema_version": 1, "kind": "int4", "files": {"a": "abc"}}',
        '{"schema_version": 1, "kind": "int4", "results": null}',
        '{"schema_version": 1, "kind": "int4", "created": 5}',
    ],
)
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BadFileError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="did not make it"):
        read_manifest(tmp_path)


def test_unknown_fields_of_a_newer_minor_version_do_no_harm(tmp_path: Path) -> None:
    made(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "novelty": 1}))
    assert read_manifest(tmp_path / "a").kind == "int4"


def test_a_file_in_a_folder_leads_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"x")
    with pytest.raises(BadFileError, match=f"name the folder that holds it: {tmp_path}"):
        read_manifest(tmp_path / "model.pte")
