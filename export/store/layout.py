"""A local store: a folder in the OCI image layout (image-spec 1.1, image-layout.md).

    oci-layout            {"imageLayoutVersion": "1.0.0"}
    index.json            one entry a tag; org.opencontainers.image.ref.name is NAME:TAG
    blobs/sha256/<hex>    manifests, configs and files, each once whoever refers to it

skopeo, oras and others read it as it is. Writers hold a lock on .lock (shared by pushes and pulls, alone for garbage
collection) and another for each change of index.json; both are the kernel's, so a killed process leaves none behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from export.store.artifact import INDEX, MANIFEST, MAX_MANIFEST, Descriptor, digest_of, load_document, read_descriptor
from export.store.backend import CHUNK, Advance
from export.store.reference import is_digest
from nano.errors import BadFileError, NoSpaceError, NotFoundError, RequestError
from nano.folder import is_no_space

VERSION = "1.0.0"
REF_NAME = "org.opencontainers.image.ref.name"
MAX_INDEX = 64 << 20
_ACCEPTED = (MANIFEST, INDEX)


@dataclass(frozen=True)
class Entry:
    """One tag of a layout.

    Attributes:
        name, tag: what it is called; a layout of another tool may name a bare tag, and then `name` is empty.
        manifest: the descriptor of its manifest.
    """

    name: str
    tag: str
    manifest: Descriptor

    @property
    def ref_name(self) -> str:
        """The annotation's value."""
        return f"{self.name}:{self.tag}" if self.name else self.tag


class Layout:
    """An OCI layout folder as a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)
        if not folder.is_dir():
            raise NotFoundError(
                "There is no such store.", found=str(folder), todo="push something first, or name one with --store"
            )
        version = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            version = json.loads((folder / "oci-layout").read_bytes()[:4096]).get("imageLayoutVersion")
        if version != VERSION or not (folder / "index.json").is_file():
            raise BadFileError(
                "This folder is not an OCI layout.",
                found=f"{folder}: imageLayoutVersion {version!r}",
                expected=f"a file oci-layout of version {VERSION}, and index.json",
                todo="name another store, or a folder that does not exist yet",
            )

    @classmethod
    def create(cls, folder: Path) -> Layout:
        """The layout in `folder`, made where there is none. A folder with other things in it is left alone."""
        if folder.exists() and not folder.is_dir():
            raise RequestError("The store should be a folder.", found=f"a file at {folder}")
        if not folder.exists() or not any(p for p in folder.iterdir() if p.name not in (".lock", "blobs")):
            try:
                (folder / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
                with _locked(folder / ".lock", fcntl.LOCK_EX):
                    if not (folder / "oci-layout").exists():
                        empty = {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
                        _write(folder / "index.json", json.dumps(empty).encode())
                        _write(folder / "oci-layout", json.dumps({"imageLayoutVersion": VERSION}).encode())
            except PermissionError:
                raise RequestError("The store cannot be written to.", found=str(folder)) from None
        return cls(folder)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keeps garbage collection waiting while an artifact is read or written."""
        with _locked(self.folder / ".lock", fcntl.LOCK_SH, optional=True):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else reads or writes artifacts: for garbage collection."""
        with _locked(self.folder / ".lock", fcntl.LOCK_EX):
            yield

    def entries(self) -> list[Entry]:
        """All tags, in index.json's order.

        Raises:
            BadFileError: index.json is broken.
        """
        found = []
        for raw in self._index()["manifests"]:
            manifest = read_descriptor(raw, f"{self.folder}/index.json")
            name, _, tag = manifest.annotations.get(REF_NAME, "").rpartition(":")
            found.append(Entry(name, tag, manifest))
        return found

    def tags(self, name: str) -> list[str]:
        """See `Store`."""
        found = sorted(entry.tag for entry in self.entries() if entry.name == name)
        if not found:
            raise NotFoundError(
                f"There is nothing called '{name}' in this store.",
                found=f"{', '.join(sorted({e.name for e in self.entries() if e.name})[:8]) or 'nothing'} in {self.where}",  # noqa: E501
                todo="nanokit ls",
            )
        return found

    def read_manifest(self, name: str, tag_or_digest: str) -> bytes:
        """See `Store`."""
        digest = tag_or_digest
        if not is_digest(digest):
            wanted = f"{name}:{tag_or_digest}"
            entry = next((e for e in self.entries() if e.ref_name == wanted), None)
            if entry is None:
                tags = [tag for tag in self.tags(name) if not tag.endswith(".sig")]
                raise NotFoundError(
                    f"'{name}' has no tag '{tag_or_digest}'.",
                    found=f"{', '.join(tags[:8]) or 'none'} in {self.where}",
                    todo=f"nanokit tags {name}",
                )
            digest = entry.manifest.digest
        path = self.blob_path(digest)
        if not path.is_file():
            raise NotFoundError("The store has no such manifest.", found=f"{digest} in {self.where}")
        with path.open("rb") as stream:
            payload = stream.read(MAX_MANIFEST + 1)
        if digest_of(payload) != digest:
            raise BadFileError(
                "A manifest in the store is damaged.", found=str(path), expected=f"bytes whose hash is {digest}",
                todo="push the artifact again",
            )  # fmt: skip
        return payload

    @contextlib.contextmanager
    def open_blob(self, name: str, blob: Descriptor, start: int) -> Iterator[Iterator[bytes]]:
        """See `Store`."""
        try:
            stream = self.blob_path(blob.digest).open("rb")
        except FileNotFoundError:
            raise NotFoundError("The store lacks a file.", found=f"{blob.digest} in {self.where}") from None
        with stream:
            stream.seek(start)
            yield iter(lambda: stream.read(CHUNK), b"")

    def has_blob(self, name: str, blob: Descriptor) -> bool:
        """See `Store`. By name and size; `nanokit verify` hashes."""
        path = self.blob_path(blob.digest)
        return path.is_file() and path.stat().st_size == blob.size

    def put_blob(self, name: str, blob: Descriptor, content: Path | bytes, advance: Advance) -> None:
        """See `Store`. Two writers of one blob write beside each other and rename the same bytes."""
        path = self.blob_path(blob.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix="incoming-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                digest, size = _copy(content, out, advance)
            if digest != blob.digest or size != blob.size:
                raise BadFileError(
                    "A file is not what the bundle's manifest says.",
                    found=f"{content if isinstance(content, Path) else blob.media_type}: {size:,} bytes, {digest}",
                    expected=f"{blob.size:,} bytes, {blob.digest}",
                    todo="nanokit verify the bundle, and export it again",
                )
            os.chmod(beside, 0o644)
            os.replace(beside, path)
        except BaseException as error:
            Path(beside).unlink(missing_ok=True)
            if is_no_space(error):
                raise NoSpaceError(
                    "The disk is full; the store is as it was.", found=str(error), todo=f"free some space under {self.folder}, or nanokit gc"  # noqa: E501
                ) from None  # fmt: skip
            raise

    def put_manifest(self, name: str, payload: bytes, media_type: str, tag: str) -> None:
        """See `Store`."""
        document = load_document(payload, f"{name}:{tag}")
        blob = Descriptor(media_type, digest_of(payload), len(payload))
        self.put_blob(name, blob, payload, lambda _: None)
        raw = {**blob.to_json(), "annotations": {REF_NAME: f"{name}:{tag}"}}
        if isinstance(document.get("artifactType"), str):
            raw["artifactType"] = document["artifactType"]

        def tagged(manifests: list[Any]) -> list[Any]:
            kept = [m for m in manifests if _ref_name(m) != f"{name}:{tag}"]
            return [*kept, raw]

        self.change(tagged)

    def change(self, edit: Callable[[list[Any]], list[Any]]) -> None:
        """Change index.json's list of manifests, one writer at a time, whole or not at all."""
        with _locked(self.folder / ".lock-index", fcntl.LOCK_EX):
            index = self._index()
            index["manifests"] = edit(index["manifests"])
            _write(self.folder / "index.json", json.dumps(index, indent=1).encode())

    def blob_path(self, digest: str) -> Path:
        """Where a blob lies."""
        return self.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def _index(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if path.stat().st_size > MAX_INDEX:
            raise BadFileError("index.json is too large.", found=f"{path.stat().st_size:,} bytes", expected=f"at most {MAX_INDEX:,}")  # noqa: E501  # fmt: skip
        try:
            index = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BadFileError("index.json is not valid JSON.", found=f"{path}: {error}") from None
        if not isinstance(index, dict) or not isinstance(index.get("manifests"), list):
            raise BadFileError("index.json is not an OCI index.", found=str(path), expected="a list of manifests")
        return index


def _ref_name(raw: Any) -> str:
    notes = raw.get("annotations") if isinstance(raw, Mapping) else None
    return str(notes.get(REF_NAME, "")) if isinstance(notes, Mapping) else ""


def _copy(content: Path | bytes, out: BinaryIO, advance: Advance) -> tuple[str, int]:
    """Copy, hashing; gives the digest and the length of what was copied."""
    if isinstance(content, bytes):
        out.write(content)
        return digest_of(content), len(content)
    hashed, size = hashlib.sha256(), 0
    with content.open("rb") as stream:
        while piece := stream.read(CHUNK):
            hashed.update(piece)
            out.write(piece)
            size += len(piece)
            advance(len(piece))
    return f"sha256:{hashed.hexdigest()}", size


def _write(path: Path, data: bytes) -> None:
    """Write beside and rename; a full disk leaves what was there."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, how: int, *, optional: bool = False) -> Iterator[None]:
    """Hold a lock; `optional` goes without one where the store cannot be written to, as nobody else can either."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        if not optional:
            raise RequestError("The store cannot be written to.", found=str(path.parent)) from None
        yield
        return
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)
