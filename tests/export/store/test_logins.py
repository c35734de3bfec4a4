"""Logins, tokens, certificates and plain HTTP: with a real registry that wants them, and servers that misbehave."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from export.store.backend import open_store
from export.store.pull import PullOptions, pull_artifact
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from nano.errors import BadFileError, BrokenTransferError, RequestError

from .conftest import run, running, same_files, server


@pytest.fixture
def pushed(registry: str, repository: str, bundle: Path) -> Reference:
    """The bundle in a registry without login."""
    return push_bundle(bundle, parse_reference(f"{registry}/{repository}:1.0")).reference.at("1.0")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants user "phone" with password "s3cret:x"."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "htpasswd").write_text(f"phone:{_bcrypt('s3cret:x')}")
    try:
        with server.serving(folder / "data", htpasswd=folder / "htpasswd") as host:
            yield host
    except server.NoRegistryError as error:
        pytest.skip(str(error))


def _bcrypt(password: str) -> str:
    """The only hash that docker-registry takes; perl's crypt is the system's."""
    script = "print crypt($ARGV[0], q($2b$05$abcdefghijklmnopqrstuu))"
    perl = shutil.which("perl")
    made = run(perl, "-e", script, password).stdout if perl else ""
    if not made.startswith("$2b$"):
        pytest.skip("no perl whose crypt makes a bcrypt hash")
    return made


def config(folder: Path, **content: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))


def test_a_login_is_wanted_and_taken_from_dockers_config(locked: str, bundle: Path, tmp_path: Path) -> None:
    reference = parse_reference(f"{locked}/team/nano:1")
    with pytest.raises(RequestError, match="wants a login"):
        push_bundle(bundle, reference)
    config(tmp_path / "docker", auths={locked: {"auth": base64.b64encode(b"phone:wrong").decode()}})
    with pytest.raises(RequestError, match="wants a login"):
        push_bundle(bundle, reference)
    config(tmp_path / "docker", auths={locked: {"auth": base64.b64encode(b"phone:s3cret:x").decode()}})
    push_bundle(bundle, reference)
    pull_artifact(reference, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")


@pytest.mark.parametrize("form", ["credHelpers", "credsStore"])
def test_a_credential_helper_is_asked(
    locked: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    helper = tmp_path / "bin" / "docker-credential-vault"
    helper.parent.mkdir()
    helper.write_text(f'#!/bin/sh\ncat > {tmp_path}/asked\necho \'{{"Username": "phone", "Secret": "s3cret:x"}}\'\n')
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    config(tmp_path / "docker", **{form: {locked: "vault"} if form == "credHelpers" else "vault"})
    push_bundle(bundle, parse_reference(f"{locked}/team/{form.lower()}:1"))
    assert (tmp_path / "asked").read_text().strip() == locked


def test_a_broken_config_is_named(locked: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text("{")
    with pytest.raises(BadFileError, match=r"config\.json"):
        push_bundle(bundle, parse_reference(f"{locked}/team/nano:1"))


class _TokenServer(http.server.BaseHTTPRequestHandler):
    """The Bearer scheme of Distribution: /token gives what /v2/ wants; each token is good for a few requests."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    issued: list[str]
    left: dict[str, int]
    basic: set[str]

    def log_message(self, *_: Any) -> None:
        return

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _go(self) -> None:
        import urllib.request

        if self.path.startswith("/token"):
            self.basic.add(self.headers.get("Authorization", ""))
            token = f"token{len(self.issued)}"
            self.issued.append(self.path)
            self.left[token] = 3
            self._answer(200, {}, json.dumps({"token": token}).encode())
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.left.get(token, 0) < 1:
            host = self.headers["Host"]
            scope = 'scope="repository:x:pull"'
            self._answer(401, {"Www-Authenticate": f'Bearer realm="http://{host}/token",service="s",{scope}'})
            return
        self.left[token] -= 1
        request = urllib.request.Request(f"http://{self.upstream}{self.path}", method=self.command)
        for name in ("Accept", "Range"):
            if value := self.headers.get(name):
                request.add_header(name, value)
        with urllib.request.urlopen(request) as response:
            self._answer(
                response.status,
                {k: v for k, v in response.headers.items() if k.startswith("Content-R")},
                response.read(),
            )

    do_GET = _go


def test_tokens_are_fetched_and_fetched_again_when_they_expire(
    registry: str, pushed: Reference, bundle: Path, tmp_path: Path
) -> None:
    handler = type("Handler", (_TokenServer,), {"upstream": registry, "issued": [], "left": {}, "basic": set()})
    with running(handler) as host:
        config(tmp_path / "docker", auths={host: {"auth": base64.b64encode(b"phone:pass").decode()}})
        pull_artifact(parse_reference(f"{host}/{pushed.name}:1.0"), tmp_path / "out", PullOptions(jobs=1))
    assert same_files(bundle, tmp_path / "out")
    assert len(handler.issued) >= 2  # one was not enough for five requests
    assert handler.basic == {"Basic " + base64.b64encode(b"phone:pass").decode()}


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    """A registry that sends its visitors to an address of plain HTTP on another machine."""

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self.send_response(307)
        self.send_header("Location", "http://registry.example.com/v2/")
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_plain_http_is_for_this_machine_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *_, **__: tried.append(str(host)) or _raise())
    with pytest.raises(BrokenTransferError, match=r"registry\.example\.com"):
        open_store(parse_reference("registry.example.com/team/nano:1"))
    assert tried
    monkeypatch.undo()
    refusal = pytest.raises(RequestError, match=r"Plain HTTP(.|\n)*registry\.example\.com(.|\n)*--plain-http")
    with running(_Elsewhere) as host, refusal:
        open_store(parse_reference(f"{host}/team/nano:1"))


def _raise() -> Any:
    raise OSError("no such host")


def test_https_is_used_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from requests.adapters import HTTPAdapter

    asked: list[str] = []

    def send(self: Any, request: Any, **_: Any) -> Any:
        asked.append(request.url)
        raise ConnectionResetError("stop here")

    monkeypatch.setattr(HTTPAdapter, "send", send)
    for plain, scheme in ((False, "https"), (True, "http")):
        with pytest.raises(ConnectionResetError):
            open_store(parse_reference("ghcr.io/team/nano:1"), plain_http=plain)
        assert asked.pop() == f"{scheme}://ghcr.io/v2/"
    with pytest.raises(ConnectionResetError):
        open_store(parse_reference("docker.io/team/nano:1"))
    assert asked.pop() == "https://registry-1.docker.io/v2/"


@pytest.fixture
def certificate(tmp_path: Path, program: Callable[[str], str]) -> tuple[Path, Path]:
    """A certificate of one's own for 127.0.0.1, and its key."""
    made, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    done = run(program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
               "-days", "2", "-subj", "/CN=nanokit", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", made)  # noqa: E501  # fmt: skip
    assert done.returncode == 0, done.stderr
    return made, key


def test_tls_with_a_certificate_of_ones_own(
    certificate: tuple[Path, Path], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str
) -> None:
    with server.serving(tmp_path / "tls", tls=certificate) as host:
        reference = parse_reference(f"{host}/team/nano:1")
        with pytest.raises(RequestError, match=r"certificate is not trusted(.|\n)*REQUESTS_CA_BUNDLE"):
            push_bundle(bundle, reference)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
        push_bundle(bundle, reference)
        pull_artifact(reference, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")


def test_logins_stay_with_their_registry(registry: str, pushed: Reference, bundle: Path, tmp_path: Path) -> None:
    """Blobs that a registry sends one to another address for are fetched there without its login."""
    strangers: list[str] = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

        def do_GET(self) -> None:
            strangers.append(self.headers.get("Authorization", ""))
            data = next(p.read_bytes() for p in bundle.iterdir() if sha256(p) in self.path)
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(data[start:])

    class Front(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

        def do_GET(self) -> None:
            import urllib.request

            if self.headers.get("Authorization") != "Basic " + base64.b64encode(b"a:b").decode():
                self.send_response(401)
                self.send_header("Www-Authenticate", 'Basic realm="here"')
                self.end_headers()
            elif "/blobs/" in self.path:
                self.send_response(307)
                self.send_header("Location", f"http://{other}{self.path}")
                self.end_headers()
            elif self.path == "/v2/":
                self.send_response(200)
                self.end_headers()
            else:
                accept = {"Accept": self.headers["Accept"]}
                with urllib.request.urlopen(
                    urllib.request.Request(f"http://{registry}{self.path}", headers=accept)
                ) as up:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(up.read())

    with running(Elsewhere) as other, running(Front) as host:
        config(tmp_path / "docker", auths={host: {"auth": base64.b64encode(b"a:b").decode()}})
        pull_artifact(parse_reference(f"{host}/{pushed.name}:1.0"), tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")
    assert strangers == [""] * 4


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
