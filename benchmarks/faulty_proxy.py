"""An HTTP proxy in front of a real registry that breaks things on purpose, and counts what went over.

Each fault is a `Fault`: which requests it hits, how often, and what happens to them. Used by the tests of the store
and by `benchmarks/registry.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHUNK = 64 << 10
_HOP = ("connection", "transfer-encoding", "keep-alive")


@dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        path: a pattern that the path has to match.
        method: which method.
        times: how many requests it hits; it is spent then.
        status: answer with this status instead of asking the registry.
        headers: with these headers.
        cut: break the connection after this many bytes of the body, in either direction.
        flip: change the body's byte at this place.
        ignore_range: answer as a server does that knows no ranges.
    """

    path: str = "/blobs/"
    method: str = "GET"
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = -1
    flip: int = -1
    ignore_range: bool = False


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        host: where it listens, HOST:PORT.
        faults: those that are left.
        blob_bytes: bytes of blobs sent to clients.
        upload_bytes: bytes of blobs taken from clients.
        requests: method and path of all.
    """

    host: str
    faults: list[Fault] = field(default_factory=list)
    blob_bytes: int = 0
    upload_bytes: int = 0
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


@contextlib.contextmanager
def faulty(upstream: str, *faults: Fault) -> Iterator[Proxy]:
    """Run a proxy in front of `upstream` (HOST:PORT) while the block runs."""
    proxy = Proxy("", list(faults))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError, TimeoutError):
                super().handle()

        def _go(self) -> None:
            _forward(self, proxy, upstream)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _go

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.host = f"127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def _forward(handler: BaseHTTPRequestHandler, proxy: Proxy, upstream: str) -> None:
    fault = proxy.take(handler.command, handler.path) or Fault(times=0)
    if fault.status:
        handler.send_response(fault.status)
        for name, value in {"Content-Length": "0", **fault.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.close_connection = True
        return
    headers = {name: value for name, value in handler.headers.items() if name.lower() not in _HOP}
    if fault.ignore_range:
        headers.pop("Range", None)
    link = http.client.HTTPConnection(upstream, timeout=60)
    try:
        link.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            link.putheader(name, value)
        link.endheaders()
        if not _send_up(handler, proxy, link, fault):
            return
        _send_down(handler, proxy, link.getresponse(), fault)
    except (ConnectionError, http.client.HTTPException):
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.connection.close()
    finally:
        link.close()


def _send_up(handler: Any, proxy: Proxy, link: http.client.HTTPConnection, fault: Fault) -> bool:
    """The request's body; False where the connection broke on purpose."""
    left = int(handler.headers.get("Content-Length") or 0)
    sent = 0
    while left and (piece := handler.rfile.read(min(CHUNK, left))):
        if 0 <= fault.cut <= sent + len(piece):
            link.send(piece[: fault.cut - sent])
            handler.close_connection = True
            handler.connection.close()
            return False
        link.send(piece)
        left, sent = left - len(piece), sent + len(piece)
        with proxy.lock:
            proxy.upload_bytes += len(piece) if "/blobs/uploads/" in handler.path else 0
    return True


def _send_down(handler: Any, proxy: Proxy, response: http.client.HTTPResponse, fault: Fault) -> None:
    handler.send_response_only(response.status)
    for name, value in response.getheaders():
        if name.lower() not in _HOP:
            handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "HEAD":
        return
    counted, sent = "/blobs/sha256:" in handler.path and response.status in (200, 206), 0
    while piece := response.read(CHUNK):
        if sent <= fault.flip < sent + len(piece):
            at = fault.flip - sent
            piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
        broken = 0 <= fault.cut <= sent + len(piece)
        if broken:
            piece = piece[: fault.cut - sent]
        with proxy.lock:
            proxy.blob_bytes += len(piece) if counted else 0
        handler.wfile.write(piece)  # a client that is gone ends it: ConnectionError
        sent += len(piece)
        if broken:
            handler.close_connection = True
            handler.connection.close()
            return
