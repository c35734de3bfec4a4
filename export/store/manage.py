"""What a store holds, and keeping it tidy: list, inspect, remove, collect garbage."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.store.artifact import INDEX, load_document, parse_artifact, read_descriptor
from export.store.backend import Store, open_store, read_pinned
from export.store.layout import REF_NAME, Layout
from export.store.reference import Reference
from export.store.select import SIGNATURE_SUFFIX, Tagged, artifacts_of
from export.store.signing import count_signatures, signature_tag
from nano.errors import BadFileError, NotFoundError, RequestError

_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Collected:
    """What garbage collection found: blobs that no tag leads to, and the bytes they take."""

    blobs: int
    bytes: int


def list_store(folder: Path) -> list[Tagged]:
    """Every model artifact of a layout folder, by name and tag.

    Raises:
        NotFoundError, BadFileError: no layout there, or a damaged one.
    """
    layout = Layout(folder)
    found = []
    with layout.session():
        for entry in layout.entries():
            if entry.tag.endswith(SIGNATURE_SUFFIX):
                continue
            reference = Reference(entry.name, entry.tag, folder=folder)
            try:
                artifact = parse_artifact(layout.read_manifest(entry.name, entry.manifest.digest), str(reference))
            except BadFileError:
                if layout.has_blob("", entry.manifest) and entry.manifest.media_type == INDEX:
                    continue  # another tool's image of several platforms
                raise
            found.append(Tagged(reference, artifact))
    return sorted(found, key=lambda one: (one.reference.name, one.reference.tag))


def list_artifacts(reference: Reference, *, plain_http: bool = False) -> list[Tagged]:
    """Every model artifact of a name, in a folder or a registry, by tag."""
    store = open_store(reference, plain_http=plain_http)
    with store.session():
        return artifacts_of(store, reference)


def list_tags(reference: Reference, *, plain_http: bool = False) -> list[str]:
    """Tags of a name, those of signatures left out."""
    tags = open_store(reference, plain_http=plain_http).tags(reference.name)
    return [tag for tag in tags if not tag.endswith(SIGNATURE_SUFFIX)]


def inspect_artifact(reference: Reference, *, plain_http: bool = False) -> dict[str, Any]:
    """All that a store knows of one artifact, without fetching its files.

    Raises:
        NotFoundError, BadFileError: see `read_artifact`.
    """
    store: Store = open_store(reference, plain_http=plain_http)
    with store.session():
        payload = read_pinned(store, reference)
        artifact = parse_artifact(payload, str(reference))
        return {
            "reference": str(reference.at(reference.tag, artifact.digest)),
            "digest": artifact.digest,
            "bytes": artifact.size,
            "signatures": count_signatures(store, reference.name, artifact.digest),
            "annotations": load_document(payload, str(reference)).get("annotations", {}),
            "files": [{"path": f.path, "bytes": f.blob.size, "digest": f.blob.digest} for f in artifact.files],
            "facts": artifact.facts,
        }


def remove(reference: Reference) -> list[str]:
    """Take tags out of a layout folder; their blobs stay until `collect_garbage`.

    A tag alone removes that tag; a digest removes every tag of that name that it has. The signatures of an artifact go
    with its last tag.

    Returns:
        The tags that went.

    Raises:
        RequestError: a registry's artifact, or neither tag nor digest.
        NotFoundError: it is not there.
    """
    layout = _local(reference)
    if not reference.tag and not reference.digest:
        raise RequestError("Which one?", found=str(reference), expected="a tag or a digest", todo=f"nanokit tags {reference}")  # noqa: E501  # fmt: skip
    mine = [entry for entry in layout.entries() if entry.name == reference.name]
    gone = [
        entry
        for entry in mine
        if (not reference.tag or entry.tag == reference.tag)
        and (not reference.digest or entry.manifest.digest == reference.digest)
    ]
    if not gone:
        raise NotFoundError("The store has no such artifact.", found=str(reference), todo="nanokit ls")
    left = {entry.manifest.digest for entry in mine if entry not in gone}
    signatures = {signature_tag(entry.manifest.digest) for entry in gone if entry.manifest.digest not in left}
    names = {f"{reference.name}:{tag}" for tag in {*(entry.tag for entry in gone), *signatures}}
    layout.change(lambda manifests: [raw for raw in manifests if _name_of(raw) not in names])
    return [entry.tag for entry in gone]


def collect_garbage(folder: Path, *, dry_run: bool = False) -> Collected:
    """Delete the blobs of a layout folder that no tag leads to, while nobody pushes or pulls.

    Args:
        folder: the layout.
        dry_run: count alone.

    Raises:
        NotFoundError, BadFileError: no layout there, or a damaged one, in which nothing is deleted.
    """
    layout = Layout(folder)
    with layout.alone():
        needed: set[str] = set()
        for entry in layout.entries():
            _mark(layout, entry.manifest.digest, needed)
        blobs, size = 0, 0
        for path in (folder / "blobs" / "sha256").iterdir():
            ours = _BLOB.fullmatch(path.name) is not None or path.name.startswith("incoming-")
            if ours and path.is_file() and f"sha256:{path.name}" not in needed:
                blobs, size = blobs + 1, size + path.stat().st_size
                if not dry_run:
                    path.unlink()
        return Collected(blobs, size)


def _mark(layout: Layout, digest: str, needed: set[str]) -> None:
    """A manifest and all that it refers to are needed; so are the manifests of an index."""
    if digest in needed:
        return
    needed.add(digest)
    document = load_document(layout.read_manifest("", digest), digest)
    blobs = [document.get("config"), *_list(document.get("layers")), *_list(document.get("blobs"))]
    needed |= {read_descriptor(raw, digest).digest for raw in blobs if raw is not None}
    for raw in _list(document.get("manifests")):
        _mark(layout, read_descriptor(raw, digest).digest, needed)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _name_of(raw: Any) -> str:
    annotations: Callable[..., Any] = raw.get("annotations", {}).get
    return str(annotations(REF_NAME, ""))


def _local(reference: Reference) -> Layout:
    if reference.folder is None:
        raise RequestError(
            "A registry's artifacts are removed with its own tools.",
            found=str(reference),
            expected="a name in a local store",
            todo=f"for instance: skopeo delete docker://{reference}",
        )
    return Layout(reference.folder)
