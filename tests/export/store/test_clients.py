"""Clients that are not ours: curl, oras-py and skopeo read what we push, and we read what skopeo copied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from export.store.artifact import describe_bundle
from export.store.check import verify_stored
from export.store.pull import PullOptions, pull_artifact
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference

from .conftest import REPO, run, same_files


@pytest.fixture
def pushed(registry: str, repository: str, bundle: Path) -> Reference:
    reference = parse_reference(f"{registry}/{repository}:1.0")
    push_bundle(bundle, reference)
    return reference


def test_curl_alone_pulls_one_file(
    pushed: Reference, bundle: Path, tmp_path: Path, program: Callable[[str], str]
) -> None:
    """The lines of docs/registry.md, run as they stand there."""
    program("curl")
    text = (REPO / "docs" / "registry.md").read_text()
    script = text.split("<!-- curl -->")[1].split("```sh\n")[1].split("```")[0]
    (tmp_path / "pull.sh").write_text(script)
    done = run("sh", "-eu", tmp_path / "pull.sh", cwd=tmp_path, REGISTRY=f"http://{pushed.host}", NAME=pushed.name, TAG="1.0", FILE="model.pte")  # noqa: E501  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.pte").read_bytes() == (bundle / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes((bundle / "model.pte").read_bytes()[:-1] + b"\0")
    assert "model.pte: OK" in done.stdout


def test_curl_resumes(pushed: Reference, bundle: Path, tmp_path: Path, program: Callable[[str], str]) -> None:
    data = (bundle / "model.pte").read_bytes()
    url = f"http://{pushed.host}/v2/{pushed.name}/blobs/sha256:{hashlib.sha256(data).hexdigest()}"
    (tmp_path / "part").write_bytes(data[:1_000_000])
    assert run(program("curl"), "-fsSL", "-C", "-", "-o", tmp_path / "part", url).returncode == 0
    assert (tmp_path / "part").read_bytes() == data


def test_oras_pulls_every_file_under_its_name(pushed: Reference, bundle: Path, tmp_path: Path) -> None:
    """With oras-py's own client, which writes files as the oras command does."""
    client = pytest.importorskip("oras.client").OrasClient(insecure=True)
    client.pull(target=str(pushed), outdir=str(tmp_path / "out"))
    assert same_files(bundle, tmp_path / "out")


def test_skopeo_copies_and_we_read(
    pushed: Reference, bundle: Path, tmp_path: Path, program: Callable[[str], str]
) -> None:
    skopeo = [program("skopeo"), "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
    source = f"docker://{pushed}"
    assert run(*skopeo, source, f"oci:{tmp_path / 'layout'}:team/nano-2:1.0").returncode == 0
    copied = parse_reference(f"oci:{tmp_path / 'layout'}:team/nano-2:1.0")
    assert verify_stored(copied).reference.digest == describe_bundle(bundle)[0].digest
    pull_artifact(copied, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")
    assert run(*skopeo, source, f"dir:{tmp_path / 'dir'}").returncode == 0
    raw = json.loads((tmp_path / "dir" / "manifest.json").read_text())
    names = {layer["annotations"]["org.opencontainers.image.title"]: layer["digest"] for layer in raw["layers"]}
    assert (tmp_path / "dir" / names["model.pte"][7:]).read_bytes() == (bundle / "model.pte").read_bytes()


def test_skopeo_copies_our_folder_into_a_registry(
    stored: Reference, registry: str, repository: str, bundle: Path, tmp_path: Path, program: Callable[[str], str]
) -> None:
    skopeo = [program("skopeo"), "--insecure-policy", "copy", "--dest-tls-verify=false"]
    done = run(*skopeo, f"oci:{stored.folder}:{stored}", f"docker://{registry}/{repository}:1")
    assert done.returncode == 0, done.stderr
    pull_artifact(parse_reference(f"{registry}/{repository}:1"), tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")
