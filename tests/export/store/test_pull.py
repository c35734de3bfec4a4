"""Pulling out of a folder: whole or not there, resumed, reused, two at once, hostile artifacts, chosen files."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.options import ExportOptions
from export.run import run_export
from export.store.artifact import MANIFEST, canonical_json, describe_bundle, digest_of
from export.store.layout import Layout
from export.store.pull import PullOptions, pull_artifact
from export.store.push import push_bundle
from export.store.reference import Reference, default_store, parse_reference
from export.store.transfer import held
from export.verify import verify_bundle
from nano.errors import BadFileError, CheckFailedError, OutputExistsError, RequestError, WorkError

from .conftest import blob_of, make_bundle, same_files

NEW = PullOptions(force=True)


def changed(stored: Reference, change: Any, tag: str = "evil") -> Reference:
    """The stored artifact with another manifest, as whoever publishes may write it."""
    assert stored.folder is not None
    layout = Layout(stored.folder)
    document = json.loads(layout.read_manifest(stored.name, "1.0"))
    change(document)
    layout.put_manifest(stored.name, canonical_json(document), MANIFEST, tag)
    return stored.at(tag)


def test_a_bundle_comes_back_as_it_was(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    done = pull_artifact(stored, tmp_path / "deep" / "out", PullOptions())
    assert same_files(bundle, tmp_path / "deep" / "out")
    assert done.moved == sum(p.stat().st_size for p in bundle.iterdir())
    assert verify_bundle(tmp_path / "deep" / "out").ok
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]  # neither parts nor a lock


def test_a_real_bundle_still_holds_its_codes(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    int4 = int4_folder(tiny_model("llama"))
    run_export(int4, "onnx", tmp_path / "made", ExportOptions(context=64, chunk=16))
    reference = push_bundle(tmp_path / "made", parse_reference(f"oci:{tmp_path / 'store'}:tiny:1")).reference
    facts = pull_artifact(reference, tmp_path / "out", PullOptions(format="onnx")).artifact.facts
    assert (facts.family, facts.context) == ("llama", 64)
    verification = verify_bundle(tmp_path / "out", int4)
    assert verification.ok
    assert verification.same_checkpoint
    assert verification.exact is not None
    assert verification.exact.modules == 14


def test_pulled_and_pushed_again_it_is_the_same_artifact(stored: Reference, tmp_path: Path) -> None:
    done = pull_artifact(stored, tmp_path / "out", PullOptions())
    again = push_bundle(tmp_path / "out", parse_reference(f"oci:{tmp_path / 'other'}:x:1"))
    assert again.artifact.digest == done.artifact.digest


def test_what_is_there_already_is_not_moved(stored: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pull_artifact(stored, out, PullOptions())
    before = (out / "model.pte").stat().st_mtime_ns
    assert pull_artifact(stored, out, PullOptions()).moved == 0
    assert (out / "model.pte").stat().st_mtime_ns == before
    (out / "model.pte").write_bytes(b"mine")
    with pytest.raises(OutputExistsError):
        pull_artifact(stored, out, PullOptions())
    assert (out / "model.pte").read_bytes() == b"mine"
    moved = pull_artifact(stored, out, NEW).moved
    assert moved == (out / "model.pte").stat().st_size  # the other files were here
    assert verify_bundle(out).ok


def test_a_new_version_moves_only_what_is_new(stored: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pull_artifact(stored, out, PullOptions())
    newer = make_bundle(tmp_path / "newer", created="2026-11-23T10:00:00+00:00")
    push_bundle(newer, stored.at("1.1"))
    assert pull_artifact(stored.at("1.1"), out, NEW).moved == (newer / "manifest.json").stat().st_size
    assert same_files(newer, out)


def test_blobs_of_the_local_store_are_not_fetched(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    push_bundle(bundle, parse_reference("here:1"))
    assert pull_artifact(stored, tmp_path / "out", PullOptions()).moved == 0
    damaged = default_store() / "blobs" / "sha256" / blob_of(describe_bundle(bundle)[0], "model.pte")[7:]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert pull_artifact(stored, tmp_path / "out2", PullOptions()).moved == damaged.stat().st_size
    assert same_files(bundle, tmp_path / "out2")


@pytest.mark.parametrize("kept", [0, 1, 1_000_000, 2_999_999, 3_000_000])
def test_it_goes_on_where_it_stopped(stored: Reference, bundle: Path, tmp_path: Path, kept: int) -> None:
    digest = blob_of(describe_bundle(bundle)[0], "model.pte")
    parts = tmp_path / "out.partial"
    parts.mkdir()
    data = (bundle / "model.pte").read_bytes()
    (parts / digest[7:]).write_bytes(data[:kept])
    total = sum(p.stat().st_size for p in bundle.iterdir())
    assert pull_artifact(stored, tmp_path / "out", PullOptions()).moved == total - kept
    assert same_files(bundle, tmp_path / "out")
    assert not parts.exists()


@pytest.mark.parametrize("wrong", [b"\0" * 1_000, b"\0" * 3_000_000, b"\0" * 3_000_001])
def test_a_start_that_is_wrong_is_thrown_away(stored: Reference, bundle: Path, tmp_path: Path, wrong: bytes) -> None:
    parts = tmp_path / "out.partial"
    parts.mkdir()
    (parts / blob_of(describe_bundle(bundle)[0], "model.pte")[7:]).write_bytes(wrong)
    pull_artifact(stored, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")


def test_damaged_bytes_are_never_taken(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    assert stored.folder is not None
    weights = Layout(stored.folder).blob_path(blob_of(describe_bundle(bundle)[0], "model.pte"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 0x80]))
    with pytest.raises(WorkError, match="other bytes"):
        pull_artifact(stored, tmp_path / "out", PullOptions())
    assert not (tmp_path / "out").exists()
    weights.write_bytes(data)
    pull_artifact(stored, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")


def test_a_store_that_sends_more_than_it_said_is_cut_off(stored: Reference, tmp_path: Path) -> None:
    def shorter(document: dict[str, Any]) -> None:
        document["layers"][0]["size"] = 1_000

    with pytest.raises(WorkError, match="more bytes"):
        pull_artifact(changed(stored, shorter), tmp_path / "out", PullOptions())
    assert sum(p.stat().st_size for p in (tmp_path / "out.partial").iterdir()) < 100_000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/nanokit-outside", "a/../../outside", "MODEL.PTE", "con", "a\\b"])
def test_names_cannot_leave_the_folder(stored: Reference, tmp_path: Path, name: str) -> None:
    def rename(document: dict[str, Any]) -> None:
        document["layers"][1]["annotations"] = {"org.opencontainers.image.title": name}

    before = {p for p in tmp_path.rglob("*") if "store" not in p.parts}
    evil = changed(stored, rename)
    with pytest.raises(BadFileError, match="cannot be created safely"):
        pull_artifact(evil, tmp_path / "out", PullOptions())
    assert not (tmp_path / "out").exists()
    assert {p for p in tmp_path.rglob("*") if "store" not in p.parts} == before


def test_files_beside_what_the_manifest_names_are_refused(stored: Reference, tmp_path: Path) -> None:
    def extra(document: dict[str, Any]) -> None:
        again = json.loads(json.dumps(document["layers"][-1]))
        again["annotations"] = {"org.opencontainers.image.title": "run-me.sh"}
        document["layers"].append(again)

    with pytest.raises(CheckFailedError, match=r"run-me\.sh"):
        pull_artifact(changed(stored, extra), tmp_path / "out", PullOptions())
    assert not (tmp_path / "out").exists()


def test_one_blob_may_be_two_files(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b", size=1_000)
    (folder / "tokenizer_config.json").write_text('{"model": {}}')  # as tokenizer.json
    from nano.manifest import read_manifest, write_manifest

    write_manifest(folder, read_manifest(folder))
    reference = push_bundle(folder, parse_reference(f"oci:{tmp_path / 's'}:twins:1")).reference
    pull_artifact(reference, tmp_path / "out", PullOptions())
    assert same_files(folder, tmp_path / "out")


def test_one_file_into_a_folder_of_others(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "icon.png").write_bytes(b"icon")
    options = PullOptions(files=("model.pte",))
    assert pull_artifact(stored, assets, options).moved == 3_000_000
    assert sorted(p.name for p in assets.iterdir()) == ["icon.png", "model.pte"]
    assert (assets / "model.pte").read_bytes() == (bundle / "model.pte").read_bytes()
    assert pull_artifact(stored, assets, options).moved == 0
    (assets / "model.pte").write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        pull_artifact(stored, assets, options)
    pull_artifact(stored, assets, PullOptions(files=("model.pte",), force=True))
    assert (assets / "model.pte").read_bytes() == (bundle / "model.pte").read_bytes()
    with pytest.raises(RequestError, match="no such file"):
        pull_artifact(stored, assets, PullOptions(files=("model.onnx",)))


def test_one_file_into_the_current_folder(stored: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pull_artifact(stored, Path("."), PullOptions(files=("model.pte",)))
    assert [p.name for p in Path(".").iterdir()] == ["model.pte"]
    assert not list(tmp_path.glob(".*lock"))


@pytest.mark.parametrize("jobs", [0, -1])
def test_jobs_are_at_least_one(stored: Reference, bundle: Path, tmp_path: Path, jobs: int) -> None:
    with pytest.raises(RequestError, match="few jobs"):
        pull_artifact(stored, tmp_path / "out", PullOptions(jobs=jobs))
    with pytest.raises(RequestError, match="few jobs"):
        push_bundle(bundle, stored, jobs=jobs)


def test_a_link_in_the_way_is_not_followed(stored: Reference, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.pte").write_bytes(b"precious")
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "model.pte").symlink_to(outside / "model.pte")
    pull_artifact(stored, assets, PullOptions(files=("model.pte",), force=True))
    assert (outside / "model.pte").read_bytes() == b"precious"
    assert not (assets / "model.pte").is_symlink()

    def deeper(document: dict[str, Any]) -> None:
        document["layers"][0]["annotations"] = {"org.opencontainers.image.title": "sub/model.pte"}

    (assets / "sub").symlink_to(outside)
    with pytest.raises(RequestError, match="leads out"):
        pull_artifact(changed(stored, deeper), assets, PullOptions(files=("sub/model.pte",), force=True))
    assert (outside / "model.pte").read_bytes() == b"precious"


def test_two_at_once_do_no_harm(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def pull() -> None:
        try:
            pull_artifact(stored, tmp_path / "out", PullOptions())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=pull) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert same_files(bundle, tmp_path / "out")
    assert not list(tmp_path.glob(".*lock"))


def test_a_lock_is_handed_on(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def hold(number: int) -> None:
        with held(path, "waiting"):
            order.append(number)
            assert path.exists()
            order.append(number)

    threads = [threading.Thread(target=hold, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2]  # nobody came in between
    assert sorted(order) == sorted([*range(12)] * 2)
    assert not path.exists()


def test_a_full_disk_keeps_what_came(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    """Files are limited to 1 MB: what a write then meets is what a full disk gives, an OSError."""
    script = "import sys; from nano.cli import run; sys.exit(run(sys.argv[1:]))"
    arguments = ["pull", f"oci:{stored.folder}:{stored}", "--out", str(tmp_path / "out")]
    limited = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )  # fmt: skip
    assert limited.returncode == 3
    assert "The disk is full." in limited.stderr
    assert "the same command goes on from there" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert not (tmp_path / "out").exists()
    assert pull_artifact(stored, tmp_path / "out", PullOptions()).moved < 2_300_000  # what came was kept, to the chunk
    assert same_files(bundle, tmp_path / "out")


def test_too_little_space_is_said_before_anything_moves(stored: Reference, tmp_path: Path) -> None:
    def huge(document: dict[str, Any]) -> None:
        document["layers"][0]["size"] = 1 << 39

    with pytest.raises(WorkError, match="not enough space"):
        pull_artifact(changed(stored, huge), tmp_path / "out", PullOptions())
    assert not (tmp_path / "out.partial").exists()


def test_a_digest_decides_over_a_tag(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    digest = describe_bundle(bundle)[0].digest
    push_bundle(make_bundle(tmp_path / "newer", seed=9), stored)
    pull_artifact(stored.at("1.0", digest), tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")
    assert digest_of(Layout(stored.folder or Path()).read_manifest(stored.name, "1.0")) != digest


def test_outputs_that_cannot_be(stored: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="should be a folder"):
        pull_artifact(stored, tmp_path / "file", PullOptions())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(RequestError, match="stand in"):
        pull_artifact(stored, here, NEW)
    assert os.getcwd() == str(here)
