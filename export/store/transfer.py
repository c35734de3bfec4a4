"""Bytes into a file beside its place: resumed where they stopped, hashed as they come, never taken unless they match.

A file in progress is named by its digest, so whoever comes again finds it whatever artifact asked for it. What lies
there is hashed first and the rest is fetched by range. Reading, hashing and writing take turns in two threads: sha256
costs as much as everything else together, and Python lets go of its lock for all three.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from export.store.artifact import Descriptor
from export.store.backend import CHUNK, Advance, Store
from export.store.registry import ATTEMPTS, pause
from nano.errors import BrokenTransferError, RequestError, WorkError
from nano.folder import MIB
from nano.progress import Track, say

_Item = TypeVar("_Item")
_QUEUED = 16


class Meter:
    """Counts bytes of several threads, and shows them in MiB."""

    def __init__(self, track: Track) -> None:
        self.bytes = 0
        self._track = track
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        """`count` more bytes went over; fewer than none where a part has to be sent again."""
        with self._lock:
            self.bytes += count
            if (shown := self.bytes // MIB) > self._track.done:
                self._track.advance(shown - self._track.done)


class _Hasher:
    """sha256 in a thread of its own."""

    def __init__(self, hashed: Any) -> None:
        self._hashed = hashed
        self._queue: queue.Queue[bytes | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (piece := self._queue.get()) is not None:
            self._hashed.update(piece)

    def update(self, piece: bytes) -> None:
        """Hash these next."""
        self._queue.put(piece)

    def close(self) -> None:
        """Wait until all is hashed."""
        self._queue.put(None)
        self._thread.join()


def fetch(store: Store, name: str, blob: Descriptor, part: Path, advance: Advance) -> None:
    """Bring a blob into the file `part`, going on with what is there.

    Args:
        store, name: where the blob is.
        blob: what it has to be.
        part: the file; grows, and is whole and right when this returns.
        advance: told of every byte that came over.

    Raises:
        BrokenTransferError: the connection broke again and again; `part` keeps what came.
        WorkError: the store has other bytes than the digest says, twice; `part` is gone.
        NotFoundError: the store lacks the blob.
    """
    for again in (False, True):
        hashed, length = _fetch_rest(store, name, blob, part, advance)
        if length == blob.size and f"sha256:{hashed}" == blob.digest:
            return
        part.unlink()
        if not again:
            say(f"{part.name[:12]}...: bytes were damaged on the way; fetching this file once more.")
    raise WorkError(
        "The store sent other bytes than the artifact names, twice; they were not kept.",
        found=f"{length:,} bytes with sha256 {hashed} from {store.where}",
        expected=f"{blob.size:,} bytes, {blob.digest}",
        todo="try again later, or ask whoever runs the store",
    )


def _fetch_rest(store: Store, name: str, blob: Descriptor, part: Path, advance: Advance) -> tuple[str, int]:
    """Fetch until the blob's length is there; gives the hash and the length of the file."""
    hashed = hashlib.sha256()
    with _open_part(part) as file:
        length = _hash_start(file, hashed, blob.size)
        failures = 0
        while length < blob.size:
            before = length
            try:
                length = _stream(store, name, blob, file, hashed, length, advance)
                if length < blob.size:
                    raise BrokenTransferError("The connection ended early.", found=f"{length:,} of {blob.size:,} bytes")
            except BrokenTransferError as error:
                length = file.tell()
                failures = failures + 1 if length == before else 0
                if failures == ATTEMPTS:
                    raise
                pause(error, failures)
        return hashed.hexdigest(), length


def _open_part(part: Path) -> Any:
    """The file in progress, never through a link that someone laid there; unbuffered, so what came is on its way."""
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    return os.fdopen(handle, "r+b", buffering=0)


def _hash_start(file: Any, hashed: Any, size: int) -> int:
    """Hash what is there already; a file that is too long is begun anew."""
    if os.fstat(file.fileno()).st_size > size:
        file.truncate(0)
    length = 0
    while piece := file.read(CHUNK):
        hashed.update(piece)
        length += len(piece)
    return length


def _stream(store: Store, name: str, blob: Descriptor, file: Any, hashed: Any, start: int, advance: Advance) -> int:
    """One connection's worth of bytes; gives the length then. A store that sends more than it said is cut off."""
    length = start
    hasher = _Hasher(hashed)
    try:
        with store.open_blob(name, blob, start) as pieces:
            for piece in pieces:
                if length + len(piece) > blob.size:
                    raise WorkError("The store sent more bytes than the artifact names.", found=f"over {blob.size:,} bytes for {blob.digest}", todo=f"do not trust {store.where}")  # noqa: E501  # fmt: skip
                _write_all(file, piece)
                hasher.update(piece)
                length += len(piece)
                advance(len(piece))
    finally:
        hasher.close()
    return length


def _write_all(file: Any, piece: bytes) -> None:
    """Write all of it, or leave the file as long as what was hashed: a full disk may take a part."""
    end = file.tell()
    view = memoryview(piece)
    try:
        while view:
            view = view[file.write(view) :]
    except BaseException:
        file.truncate(end)
        raise


def require_jobs(jobs: int) -> None:
    """Raise RequestError unless at least one file may travel."""
    if jobs < 1:
        raise RequestError("Nothing can move with so few jobs.", found=f"--jobs {jobs}", expected="1 or more")


def in_parallel(work: Callable[[_Item], None], items: Iterable[_Item], jobs: int) -> None:
    """Do the work for every item, `jobs` at a time; the first failure stops what has not begun, and is raised."""
    todo: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    failures: list[BaseException] = []

    def run() -> None:
        while not failures:
            try:
                item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                work(item)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(jobs, todo.qsize()))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)  # in pieces: Ctrl-C is seen between them
    if failures:
        raise failures[0]


@contextlib.contextmanager
def held(path: Path, waiting: str) -> Iterator[None]:
    """Hold a lock file while working on what lies beside it; another process waits, and says so.

    The lock is the kernel's: one who was killed holds it no longer. The file goes when the work is done.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(waiting)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_same(handle, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(handle)


def _is_same(handle: int, path: Path) -> bool:
    """Whether the lock is still the file of that name: whoever held it before took its file away."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False
