"""The local store: shared blobs, tags, garbage, damage, two writers at once, a thousand artifacts."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from export.store.artifact import MANIFEST, Descriptor, canonical_json, describe_bundle, digest_of
from export.store.check import verify_stored
from export.store.layout import REF_NAME, Layout
from export.store.manage import collect_garbage, inspect_artifact, list_store, list_tags, remove
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from export.store.signing import make_keys, sign_artifact
from nano.errors import BadFileError, CheckFailedError, NotFoundError, RequestError

from .conftest import blob_of, make_bundle


def blobs(reference: Reference) -> set[str]:
    assert reference.folder is not None
    return {path.name for path in (reference.folder / "blobs" / "sha256").iterdir()}


def test_it_is_an_image_layout(stored: Reference, bundle: Path) -> None:
    assert stored.folder is not None
    assert json.loads((stored.folder / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((stored.folder / "index.json").read_text())
    (entry,) = index["manifests"]
    payload = describe_bundle(bundle)[0].payload
    assert entry["annotations"] == {REF_NAME: "team/nano-2:1.0"}
    assert (stored.folder / "blobs" / "sha256" / entry["digest"].removeprefix("sha256:")).read_bytes() == payload
    assert entry["size"] == len(payload)
    assert len(blobs(stored)) == 6  # four files, the config, the manifest


def test_a_second_artifact_with_the_same_weights_moves_only_what_is_new(stored: Reference, tmp_path: Path) -> None:
    again = make_bundle(tmp_path / "again", created="2026-11-23T10:00:00+00:00")
    done = push_bundle(again, stored.at("1.1"))
    assert done.moved == (again / "manifest.json").stat().st_size
    assert done.shared == done.artifact.size - done.moved
    assert len(blobs(stored)) == 9  # and another manifest.json, config and manifest
    assert list_tags(stored) == ["1.0", "1.1"]


def test_a_tag_moves_and_garbage_goes(stored: Reference, tmp_path: Path) -> None:
    before = blobs(stored)
    assert stored.folder is not None
    push_bundle(make_bundle(tmp_path / "new", seed=1), stored)
    assert collect_garbage(stored.folder, dry_run=True).blobs == 4  # weights, manifest.json, config, manifest
    assert collect_garbage(stored.folder).blobs == 4
    assert len(blobs(stored) & before) == 2  # the small files that both have
    verify_stored(stored)
    remove(stored)
    assert list_store(stored.folder) == []
    collect_garbage(stored.folder)
    assert blobs(stored) == set()


def test_removing_by_digest_takes_every_tag_and_the_signatures(stored: Reference, bundle: Path, tmp_path: Path) -> None:
    assert stored.folder is not None
    push_bundle(bundle, stored.at("latest"))
    layout, digest = Layout(stored.folder), describe_bundle(bundle)[0].digest
    key, _ = make_keys(tmp_path / "k")
    sign_artifact(layout, stored.name, digest, "x", key)
    assert remove(stored.at("1.0")) == ["1.0"]
    assert any(tag.endswith(".sig") for tag in layout.tags(stored.name))
    assert remove(stored.at(digest=digest)) == ["latest"]
    with pytest.raises(NotFoundError):
        layout.tags(stored.name)


def test_what_is_not_there_is_said_with_what_is(stored: Reference) -> None:
    with pytest.raises(NotFoundError, match=r"no tag '2\.0'(.|\n)*1\.0"):
        inspect_artifact(stored.at("2.0"))
    with pytest.raises(NotFoundError, match=r"nothing called 'other'(.|\n)*team/nano-2"):
        list_tags(Reference("other", folder=stored.folder))
    with pytest.raises(NotFoundError):
        remove(stored.at("2.0"))
    with pytest.raises(RequestError, match="Which one"):
        remove(stored.at())
    with pytest.raises(RequestError, match="its own tools"):
        remove(Reference("a", "1", host="ghcr.io"))


def test_folders_that_are_no_store(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(NotFoundError):
        Layout(tmp_path / "none")
    with pytest.raises(BadFileError, match="not an OCI layout"):
        Layout(bundle)
    before = sorted(p.name for p in bundle.iterdir())
    with pytest.raises(BadFileError, match="not an OCI layout"):
        push_bundle(bundle, parse_reference(f"oci:{bundle}:a:1"))
    assert sorted(p.name for p in bundle.iterdir()) == before


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"manifests": 7}', '{"manifests": [{"digest": "sha256:../x"}]}', "[" * 99_999]
)
def test_a_broken_index(stored: Reference, text: str) -> None:
    assert stored.folder is not None
    (stored.folder / "index.json").write_text(text)
    with pytest.raises(BadFileError):
        list_store(stored.folder)
    with pytest.raises(BadFileError):
        collect_garbage(stored.folder)
    assert len(blobs(stored)) == 6


def test_damage_is_found(stored: Reference, bundle: Path) -> None:
    assert stored.folder is not None
    layout, (artifact, _) = Layout(stored.folder), describe_bundle(bundle)
    verify_stored(stored)
    weights = layout.blob_path(blob_of(artifact, "model.pte"))
    good = weights.read_bytes()
    weights.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    with pytest.raises(CheckFailedError, match=r"model\.pte"):
        verify_stored(stored)
    weights.write_bytes(good + b"more")
    with pytest.raises(CheckFailedError, match=r"model\.pte"):
        verify_stored(stored)
    weights.unlink()
    with pytest.raises(NotFoundError):
        verify_stored(stored)
    push_bundle(bundle, stored)
    verify_stored(stored)
    layout.blob_path(artifact.digest).write_bytes(artifact.payload.replace(b"nano-2", b"nano-3"))
    with pytest.raises(BadFileError, match="damaged"):
        verify_stored(stored)


def test_a_bundle_that_is_not_what_it_says_is_not_stored(bundle: Path, tmp_path: Path) -> None:
    data = (bundle / "model.pte").read_bytes()
    (bundle / "model.pte").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reference = parse_reference(f"oci:{tmp_path / 's'}:nano:1")
    with pytest.raises(BadFileError, match="not what the bundle's manifest says"):
        push_bundle(bundle, reference)
    assert list_store(tmp_path / "s") == []
    assert not any(name.startswith("incoming") for name in blobs(reference))


def test_many_pushes_at_once_lose_no_tag(tmp_path: Path) -> None:
    reference = parse_reference(f"oci:{tmp_path / 's'}:nano")
    bundles = [make_bundle(tmp_path / f"b{n}", seed=n % 2, size=200_000) for n in range(8)]
    failures: list[BaseException] = []

    def push(number: int) -> None:
        try:
            push_bundle(bundles[number], reference.at(f"1.{number}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=push, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list_tags(reference) == [f"1.{n}" for n in range(8)]
    verify_stored(reference.at("1.7"))
    assert collect_garbage(tmp_path / "s").blobs == 0


def test_garbage_collection_waits_for_a_push(stored: Reference) -> None:
    assert stored.folder is not None
    layout, done = Layout(stored.folder), threading.Event()
    orphan = stored.folder / "blobs" / "sha256" / ("0" * 64)
    orphan.write_bytes(b"of a push under way")
    with layout.session():
        thread = threading.Thread(target=lambda: (collect_garbage(layout.folder), done.set()))
        thread.start()
        assert not done.wait(0.2)
        assert orphan.exists()
    thread.join(10)
    assert not orphan.exists()


def test_a_full_disk_leaves_the_store_as_it_was(bundle: Path, stored: Reference, tmp_path: Path) -> None:
    """Files are limited to 1 MB: what a write then meets is what a full disk gives, an OSError."""
    other = make_bundle(tmp_path / "other", seed=5)
    script = "import sys; from nano.cli import run; sys.exit(run(sys.argv[1:]))"
    arguments = ["push", str(other), f"oci:{stored.folder}:team/nano-2:2.0"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )  # fmt: skip
    assert done.returncode == 3
    assert "The disk is full; the store is as it was." in done.stderr
    assert list_tags(stored) == ["1.0"]
    assert not any(name.startswith("incoming") for name in blobs(stored))
    verify_stored(stored)


def test_a_thousand_artifacts_are_listed_at_once(
    stored: Reference, bundle: Path, nanokit: Callable[..., object]
) -> None:
    assert stored.folder is not None
    layout, document = Layout(stored.folder), json.loads(describe_bundle(bundle)[0].payload)
    raw = []
    for number in range(1_000):
        document["annotations"]["io.github.nanokit.student"] = f"student-{number}"
        payload = canonical_json(document)
        blob = Descriptor(MANIFEST, digest_of(payload), len(payload))
        layout.put_blob("", blob, payload, lambda _: None)
        raw.append({**blob.to_json(), "annotations": {REF_NAME: f"team/nano-{number % 9}:1.{number}"}})
    layout.change(lambda _: raw)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        found = list_store(stored.folder)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.7  # of processor time, the best of three: the machine may be busy
    assert len(found) == 1_000
    assert {one.artifact.facts.student for one in found} == {f"student-{n}" for n in range(1_000)}
    lines = nanokit("ls", "--store", stored.folder).stdout.splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1_001
