"""Verify an artifact where it lies: every blob hashed, the bundle's manifest compared, its signature checked.

Nothing is kept; a registry's blobs are streamed through. A pulled folder is verified by `export.verify`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.store.artifact import MAX_MANIFEST, Artifact, File
from export.store.backend import Store, open_store, read_artifact, read_blob
from export.store.layout import Layout
from export.store.reference import Reference
from export.store.signing import count_signatures, require_signature
from export.store.transfer import Meter
from nano.errors import BadFileError, CheckFailedError
from nano.folder import MIB
from nano.history import Ancestor, history_of
from nano.manifest import NAME
from nano.progress import track


@dataclass(frozen=True)
class StoredVerification:
    """What was checked of an artifact in a store; all of it was good, or an error said what was not.

    Attributes:
        reference: the artifact, with its digest.
        files, bytes: how many were hashed.
        signatures: how many it carries, whoever's.
        signed: whether one of them is of the key that was asked for.
        history: what the bundle was made of, as its manifest.json tells it.
    """

    reference: Reference
    files: int
    bytes: int
    signatures: int
    signed: bool
    history: tuple[Ancestor, ...]


def verify_stored(reference: Reference, key: Path | None = None, *, plain_http: bool = False) -> StoredVerification:
    """Check an artifact in a layout folder or a registry, byte by byte.

    Args:
        reference: the artifact.
        key: a public key that must have signed it; None asks for no signature.
        plain_http: see `open_store`.

    Raises:
        CheckFailedError: a blob is missing or damaged, the bundle's manifest names other files, no good signature.
        NotFoundError, BadFileError: no such artifact, or none that can be read.
    """
    store = open_store(reference, plain_http=plain_http)
    with store.session():
        artifact = read_artifact(store, reference)
        if key is not None:
            require_signature(store, reference.name, artifact.digest, key)
        own = _own_manifest(store, reference, artifact)
        _require_blobs(store, reference.name, artifact)
        return StoredVerification(
            reference=reference.at(reference.tag, artifact.digest),
            files=len(artifact.files),
            bytes=artifact.size,
            signatures=count_signatures(store, reference.name, artifact.digest),
            signed=key is not None,
            history=history_of(own.get("inputs")),
        )


def _require_blobs(store: Store, name: str, artifact: Artifact) -> None:
    with track("hash", max(artifact.size // MIB, 1), "MiB") as progress:
        meter = Meter(progress)
        for file in artifact.files:
            hashed, size = hashlib.sha256(), 0
            with store.open_blob(name, file.blob, 0) as pieces:
                for piece in pieces:
                    hashed.update(piece)
                    size += len(piece)
                    meter(len(piece))
                    if size > file.blob.size:
                        break
            if size != file.blob.size or f"sha256:{hashed.hexdigest()}" != file.blob.digest:
                raise CheckFailedError(
                    "A file in the store is damaged.",
                    found=f"'{file.path}': {size:,} bytes with sha256 {hashed.hexdigest()} in {store.where}",
                    expected=f"{file.blob.size:,} bytes, {file.blob.digest}",
                    todo=f"{_removal(store, file)}push the artifact again from a good bundle",
                )


def _removal(store: Store, file: File) -> str:
    """A push leaves alone what is there by name and size, so a damaged blob of a folder has to go first."""
    return f"remove {store.blob_path(file.blob.digest)}, and " if isinstance(store, Layout) else ""


def _own_manifest(store: Store, reference: Reference, artifact: Artifact) -> Mapping[str, Any]:
    """The bundle's manifest.json out of the store, which must name the artifact's files."""
    own = next((file for file in artifact.files if file.path == NAME), None)
    if own is None:
        raise CheckFailedError(f"The artifact holds no {NAME}.", found=str(reference))
    raw = json.loads(read_blob(store, reference.name, own.blob, MAX_MANIFEST))
    require_same_files(raw.get("files"), artifact.files)
    return raw if isinstance(raw, Mapping) else {}


def require_same_files(named: Any, files: tuple[File, ...]) -> None:
    """A bundle's manifest.json must name the very files, by hash and size, that the artifact holds beside it.

    Raises:
        CheckFailedError: it names others.
    """
    layers = {file.path: (file.blob.digest, file.blob.size) for file in files if file.path != NAME}
    try:
        said = {path: (f"sha256:{entry['sha256']}", entry["bytes"]) for path, entry in named.items()}
    except (AttributeError, KeyError, TypeError):
        raise BadFileError("The artifact's manifest.json is none that nanokit writes.", found=str(named)[:80]) from None
    if said != layers:
        differing = sorted(path for path in {*said, *layers} if said.get(path) != layers.get(path))
        raise CheckFailedError(
            f"The artifact's files are not those that its {NAME} names.",
            found=", ".join(differing[:5]),
            todo="do not use this artifact; tell whoever published it",
        )
