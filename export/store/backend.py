"""What pushing and pulling need of a store, whether a folder or a registry; and opening the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from export.store.artifact import Artifact, Descriptor, digest_of, parse_artifact
from export.store.reference import Reference
from nano.errors import BadFileError

CHUNK = 256 << 10
"""Bytes read, hashed and written at a time: stays in a core's cache."""

Advance = Callable[[int], None]


class Store(Protocol):
    """A place that holds artifacts by name and tag."""

    where: str
    """How messages name the store."""

    def tags(self, name: str) -> list[str]:
        """Tags of a name, sorted; signatures' tags among them. Raises NotFoundError where there is no such name."""

    def read_manifest(self, name: str, tag_or_digest: str) -> bytes:
        """A manifest's bytes; bounded. Raises NotFoundError."""

    def open_blob(self, name: str, blob: Descriptor, start: int) -> AbstractContextManager[Iterator[bytes]]:
        """A blob's bytes from `start` on, in pieces. Raises NotFoundError, BrokenTransferError."""

    def has_blob(self, name: str, blob: Descriptor) -> bool:
        """Whether the blob is there."""

    def put_blob(self, name: str, blob: Descriptor, content: Path | bytes, advance: Advance) -> None:
        """Store a blob, from a file or from memory, checking its digest on the way. Raises BadFileError."""

    def put_manifest(self, name: str, payload: bytes, media_type: str, tag: str) -> None:
        """Store a manifest under a tag; what it refers to must be there."""

    def session(self) -> AbstractContextManager[None]:
        """Held while an artifact is read or written: nothing is collected as garbage meanwhile."""


def open_store(reference: Reference, *, plain_http: bool = False, create: bool = False) -> Store:
    """The store that a reference lies in.

    Args:
        reference: what was asked for.
        plain_http: talk to a registry without encryption; to this machine itself that needs no flag.
        create: make the layout folder where there is none.

    Raises:
        NotFoundError: no such layout folder.
        BadFileError: the folder is no OCI layout.
    """
    if reference.folder is None:
        from export.store.registry import Registry

        return Registry(reference.host, reference.name, plain_http=plain_http)
    from export.store.layout import Layout

    return Layout.create(reference.folder) if create else Layout(reference.folder)


def read_artifact(store: Store, reference: Reference) -> Artifact:
    """The artifact that a reference names.

    Raises:
        NotFoundError: there is none.
        BadFileError: what is there is no model artifact, or not the one that the digest names.
    """
    payload = read_pinned(store, reference)
    return parse_artifact(payload, str(reference))


def read_pinned(store: Store, reference: Reference) -> bytes:
    """The manifest that a reference names, checked against the reference's digest where it has one."""
    payload = store.read_manifest(reference.name, reference.pinned)
    if reference.digest and digest_of(payload) != reference.digest:
        raise BadFileError(
            "The store gave another manifest than the one asked for.",
            found=digest_of(payload),
            expected=reference.digest,
            todo=f"do not trust {store.where}",
        )
    return payload


def read_blob(store: Store, name: str, blob: Descriptor, limit: int) -> bytes:
    """A small blob as a whole, its size and digest checked.

    Raises:
        BadFileError: larger than `limit`, or other bytes than its digest says.
    """
    data = b""
    if blob.size <= limit:
        with store.open_blob(name, blob, 0) as pieces:
            for piece in pieces:
                data += piece
                if len(data) > blob.size:
                    break
    if blob.size > limit or digest_of(data) != blob.digest:
        raise BadFileError(
            "A blob is not what its digest says." if blob.size <= limit else "A document is too large.",
            found=f"{len(data) if blob.size <= limit else blob.size:,} bytes for {blob.digest} in {store.where}",
            expected=f"{blob.size:,} bytes with that digest, at most {limit:,}",
        )
    return data
