"""A registry as a store, through oras-py: its login, tokens and addresses, over its one `requests` session.

oras-py's own transfers hold a whole file in memory when pushing, check no digest when pulling and begin again from the
first byte; its retry sleeps up to 83 s and does not know Retry-After. So pieces are streamed here through its
`do_request`: ranges going down, the rest of an upload where the registry kept what it got, digests on the way.

API: opencontainers/distribution-spec 1.1. Distribution 2.8 (Debian's docker-registry) drops a broken upload, so there
a file begins again; files that arrived whole are never sent twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

from export.store.artifact import INDEX, MANIFEST, MAX_MANIFEST, Descriptor, digest_of
from export.store.backend import CHUNK, Advance
from export.store.connection import connect, send
from export.store.reference import is_digest
from nano.errors import BadFileError, BrokenTransferError, NotFoundError, RequestError, WorkError
from nano.progress import say

ATTEMPTS = 6
MAX_TAGS = 100_000
_Result = TypeVar("_Result")


class Registry:
    """One repository of a registry as a store. Any name but the repository's is refused by the registry itself."""

    def __init__(self, host: str, name: str, *, plain_http: bool = False) -> None:
        self.where = host
        self._client = persist(lambda: connect(host, name, plain_http=plain_http), attempts=3)

    def session(self) -> contextlib.AbstractContextManager[None]:
        """See `Store`: a registry looks after itself."""
        return contextlib.nullcontext()

    def tags(self, name: str) -> list[str]:
        """See `Store`."""
        found: list[str] = []
        url: str | None = self._url(name, "tags/list?n=1000")
        while url is not None and len(found) < MAX_TAGS:
            body, links = persist(lambda url=url: self._document(url, {}))  # type: ignore[misc]
            tags = _json(body, self.where).get("tags") or []
            found += [tag for tag in tags if isinstance(tag, str)]
            following = links.get("next", {}).get("url")
            url = urljoin(url, following) if following and tags else None
        if not found:
            raise NotFoundError(f"There is nothing called '{name}' in this registry.", found=f"no tags in {self.where}")
        return sorted(found)

    def read_manifest(self, name: str, tag_or_digest: str) -> bytes:
        """See `Store`."""
        url = self._url(name, f"manifests/{tag_or_digest}")
        payload, _ = persist(lambda: self._document(url, {"Accept": f"{MANIFEST}, {INDEX}"}))
        if is_digest(tag_or_digest) and digest_of(payload) != tag_or_digest:
            raise BadFileError("The registry gave another manifest than the one asked for.", found=digest_of(payload), expected=tag_or_digest)  # noqa: E501  # fmt: skip
        return payload

    @contextlib.contextmanager
    def open_blob(self, name: str, blob: Descriptor, start: int) -> Iterator[Iterator[bytes]]:
        """See `Store`: a range request, where the blob is begun already."""
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = send(self._client, "GET", self._url(name, f"blobs/{blob.digest}"), headers=headers)
        with response:
            skip = start - _first_byte(response)
            if skip < 0:
                raise WorkError("The registry sent another part of a file than the one asked for.", found=str(response.headers.get("Content-Range")), expected=f"bytes from {start:,} on")  # noqa: E501  # fmt: skip
            yield _pieces(response, skip)

    def has_blob(self, name: str, blob: Descriptor) -> bool:
        """See `Store`."""
        try:
            persist(lambda: send(self._client, "HEAD", self._url(name, f"blobs/{blob.digest}")).close())
        except NotFoundError:
            return False
        return True

    def put_blob(self, name: str, blob: Descriptor, content: Path | bytes, advance: Advance) -> None:
        """See `Store`: streamed, and after a break from where the registry says it stopped."""
        upload = _Upload(self._client, self._url(name, "blobs/uploads/"), blob, content, advance)
        with upload:
            persist(upload.go_on)

    def put_manifest(self, name: str, payload: bytes, media_type: str, tag: str) -> None:
        """See `Store`."""
        url, headers = self._url(name, f"manifests/{tag}"), {"Content-Type": media_type}
        persist(lambda: send(self._client, "PUT", url, headers=headers, data=payload).close())

    def _document(self, url: str, headers: Mapping[str, str]) -> tuple[bytes, Mapping[str, Any]]:
        with send(self._client, "GET", url, headers=headers) as response:
            body = b""
            for piece in _pieces(response, 0):
                body += piece
                if len(body) > MAX_MANIFEST:
                    raise BadFileError("The registry sent a document that is too large.", found=url, expected=f"at most {MAX_MANIFEST:,} bytes")  # noqa: E501  # fmt: skip
            return body, response.links

    def _url(self, name: str, rest: str) -> str:
        return f"{self._client.prefix}://{self._client.hostname}/v2/{name}/{rest}"


def persist(action: Callable[[], _Result], attempts: int = ATTEMPTS) -> _Result:
    """Do it, and after a broken transfer again: at once, then after 0.5, 1, 2, ... s, or when the registry says."""
    for attempt in range(attempts):
        try:
            return action()
        except BrokenTransferError as error:
            if attempt + 1 == attempts:
                raise
            pause(error, attempt)
    raise AssertionError("unreachable")


def pause(error: BrokenTransferError, attempt: int) -> None:
    """Wait before the next attempt, as long as the registry wants or ever longer."""
    seconds = error.wait or (0.5 * 2 ** (attempt - 1) if attempt else 0.0)
    if seconds > 1:
        say(f"{error.problem} Trying again in {seconds:.0f} s.")
    time.sleep(seconds)


class _Upload:
    """A blob on its way up: begun, gone on with, closed. The file is hashed as it is sent."""

    def __init__(self, client: Any, url: str, blob: Descriptor, content: Path | bytes, advance: Advance) -> None:
        self.client, self.url, self.blob, self.advance = client, url, blob, advance
        self.location = ""
        self.body = _Body(content, advance)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.body.close()

    def go_on(self) -> None:
        """One attempt at the rest of the blob."""
        start = self._kept() if self.location else 0
        if not start:
            with send(self.client, "POST", self.url, ok=(201, 202)) as response:
                self.location = urljoin(self.url, response.headers.get("Location", ""))
        self.body.begin(start)
        headers = {"Content-Type": "application/octet-stream"}
        if start:
            headers["Content-Range"] = f"{start}-{self.blob.size - 1}"
            with send(self.client, "PATCH", self.location, headers=headers, data=self.body, ok=(202,)) as response:
                self.location = urljoin(self.location, response.headers.get("Location", ""))
        finish = _with_query(self.location, digest=self.blob.digest)
        try:
            send(self.client, "PUT", finish, headers=headers, data=None if start else self.body, ok=(201,)).close()
        except NotFoundError:
            self.location = ""
            raise BrokenTransferError("The registry forgot an upload.", found=self.url) from None
        finally:
            self._require_same()

    def _kept(self) -> int:
        """How many bytes the registry kept of a broken upload; 0 where it begins again."""
        try:
            with send(self.client, "GET", self.location, ok=(204,)) as response:
                self.location = urljoin(self.location, response.headers.get("Location", self.location))
                first, _, last = response.headers.get("Range", "").rpartition("=")[2].partition("-")
                return int(last) + 1 if first == "0" and last.isdecimal() and int(last) else 0
        except (NotFoundError, RequestError):
            return 0

    def _require_same(self) -> None:
        """A file that changed since it was described is named, whatever the registry said of it."""
        if self.body.whole and self.body.digest != self.blob.digest:
            raise BadFileError(
                "A file is not what the bundle's manifest says.",
                found=f"{self.body.content if isinstance(self.body.content, Path) else ''}: {self.body.digest}",
                expected=self.blob.digest,
                todo="nanokit verify the bundle, and export it again",
            )


class _Body:
    """A file as `requests` streams it: with a length, hashed on the way, able to begin again."""

    def __init__(self, content: Path | bytes, advance: Advance) -> None:
        import io

        self.content, self.advance = content, advance
        self.stream = io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")
        self.size = self.stream.seek(0, 2)
        self.position = self.start = 0
        self.begin(0)

    def begin(self, start: int) -> None:
        """Stand at `start`, what comes before it hashed; what was sent before no longer counts as progress."""
        self.advance(start - self.position)
        self.hashed = hashlib.sha256()
        self.stream.seek(0)
        left = start
        while left and (piece := self.stream.read(min(CHUNK, left))):
            self.hashed.update(piece)
            left -= len(piece)
        self.position = self.start = start

    @property
    def whole(self) -> bool:
        """Whether every byte has been read."""
        return self.position == self.size

    @property
    def digest(self) -> str:
        """Of what has been read."""
        return f"sha256:{self.hashed.hexdigest()}"

    def __len__(self) -> int:
        return self.size - self.start

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.read(CHUNK), b"")

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""
        piece = self.stream.read(count)
        self.hashed.update(piece)
        self.position += len(piece)
        self.advance(len(piece))
        return piece

    def close(self) -> None:
        """Let go of the file."""
        self.stream.close()


def _pieces(response: Any, skip: int) -> Iterator[bytes]:
    """A response's body as it was sent, without its first `skip` bytes."""
    from requests import RequestException
    from urllib3.exceptions import HTTPError

    try:
        while piece := response.raw.read(CHUNK, decode_content=False):
            if skip:
                piece, skip = piece[skip:], max(skip - len(piece), 0)
            if piece:
                yield piece
    except (HTTPError, RequestException, OSError) as error:
        raise BrokenTransferError("The connection broke.", found=f"{type(error).__name__}: {error}") from None


def _first_byte(response: Any) -> int:
    """Where a response's body begins: 0 where the registry does not do ranges."""
    if response.status_code != 206:
        return 0
    unit, _, span = response.headers.get("Content-Range", "").partition(" ")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdecimal():
        raise WorkError("The registry sent a range of bytes that cannot be read.", found=f"Content-Range: {response.headers.get('Content-Range')}")  # noqa: E501  # fmt: skip
    return int(first)


def _with_query(url: str, **more: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query, keep_blank_values=True), *more.items()])))


def _json(body: bytes, where: str) -> dict[str, Any]:
    from export.store.artifact import load_document

    return load_document(body, where)
