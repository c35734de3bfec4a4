"""A real registry (Debian's docker-registry) with faults in front of it: broken, wrong, busy, refused, killed."""

from __future__ import annotations

import base64
import http.server
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from export.store.artifact import describe_bundle
from export.store.backend import BrokenTransferError, NotFoundError, open_store
from export.store.check import verify_stored
from export.store.manage import inspect_artifact, list_artifacts, list_tags
from export.store.pull import PullOptions, pull_artifact
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from nano.errors import BadFileError, RequestError, WorkError

from .conftest import WEIGHTS, Fault, make_bundle, run, same_files, server

IN_FLIGHT = 10_000_000
"""Bytes that may be on their way, in the buffers of two sockets, when a client is killed."""


@pytest.fixture
def pushed(proxy: Any, repository: str, bundle: Path) -> Reference:
    """The bundle in the registry, named through the proxy."""
    reference = parse_reference(f"{proxy.host}/{repository}:1.0")
    push_bundle(bundle, reference)
    proxy.blob_bytes = proxy.upload_bytes = 0
    proxy.requests.clear()
    return reference


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses without a Retry-After are a hundredth of what users see."""
    sleep = time.sleep
    monkeypatch.setattr("export.store.registry.time.sleep", lambda s: sleep(s if s > 0.9 and s < 1.1 else s / 100))


def total(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.iterdir())


def test_a_bundle_goes_up_and_comes_down(pushed: Reference, proxy: Any, bundle: Path, tmp_path: Path) -> None:
    done = pull_artifact(pushed, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")
    assert done.moved == proxy.blob_bytes == total(bundle)
    assert done.artifact.digest == describe_bundle(bundle)[0].digest
    assert list_tags(pushed) == ["1.0"]
    assert inspect_artifact(pushed)["bytes"] == total(bundle)
    verify_stored(pushed)


def test_only_what_is_new_goes_up(pushed: Reference, proxy: Any, bundle: Path, tmp_path: Path) -> None:
    assert push_bundle(bundle, pushed).moved == proxy.upload_bytes == 0
    newer = make_bundle(tmp_path / "newer", created="2026-11-23T10:00:00+00:00")
    done = push_bundle(newer, pushed.at("1.1"))
    assert done.moved == (newer / "manifest.json").stat().st_size
    assert proxy.upload_bytes < done.moved + 2_000  # and the config
    assert [one.reference.tag for one in list_artifacts(pushed.at())] == ["1.0", "1.1"]


@pytest.mark.parametrize("cuts", [[0], [1], [1_500_000], [2_999_999], [100_000, 200_000, 300_000, 400_000]])
def test_a_broken_download_goes_on_from_its_byte(
    pushed: Reference, proxy: Any, bundle: Path, weights: str, tmp_path: Path, cuts: list[int]
) -> None:
    proxy.faults[:] = [Fault(weights, cut=at) for at in cuts]
    done = pull_artifact(pushed, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")
    assert not any(fault.times for fault in proxy.faults)
    assert done.moved == proxy.blob_bytes == total(bundle)


def test_a_flipped_byte_is_seen_and_fetched_again(
    pushed: Reference, proxy: Any, bundle: Path, weights: str, tmp_path: Path
) -> None:
    proxy.faults[:] = [Fault(weights, flip=2_000_000)]
    assert pull_artifact(pushed, tmp_path / "out", PullOptions()).moved == total(bundle) + WEIGHTS
    assert same_files(bundle, tmp_path / "out")
    proxy.faults[:] = [Fault(weights, flip=2_000_000, times=9)]
    with pytest.raises(WorkError, match="other bytes"):
        pull_artifact(pushed, tmp_path / "never", PullOptions())
    assert not (tmp_path / "never").exists()


def test_a_server_without_ranges(pushed: Reference, proxy: Any, bundle: Path, weights: str, tmp_path: Path) -> None:
    proxy.faults[:] = [Fault(weights, cut=1_000_000), Fault(weights, ignore_range=True)]
    pull_artifact(pushed, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_registry_is_asked_again(
    pushed: Reference, proxy: Any, bundle: Path, tmp_path: Path, status: int
) -> None:
    proxy.faults[:] = [Fault(part, status=status, times=2) for part in ("/v2/$", "/manifests/", "/blobs/")]
    pull_artifact(pushed, tmp_path / "out", PullOptions())
    assert same_files(bundle, tmp_path / "out")
    proxy.faults[:] = [Fault("/blobs/uploads/", method, status=status, times=2) for method in ("POST", "PUT")]
    proxy.faults += [Fault("/manifests/", "PUT", status=status), Fault("/blobs/", "HEAD", status=status)]
    other = make_bundle(tmp_path / "other", seed=3)
    push_bundle(other, pushed.at("2.0"))
    assert not any(fault.times for fault in proxy.faults)
    verify_stored(pushed.at("2.0"))


def test_retry_after_is_kept_to(pushed: Reference, proxy: Any, weights: str, tmp_path: Path) -> None:
    proxy.faults[:] = [Fault(weights, status=429, headers={"Retry-After": "1"})]
    started = time.monotonic()
    pull_artifact(pushed, tmp_path / "out", PullOptions())
    assert time.monotonic() - started >= 1.0
    proxy.faults[:] = [Fault(weights, status=503, headers={"Retry-After": "3600"}, times=99)]
    with pytest.raises(WorkError, match=r"much later(.|\n)*3600"):
        pull_artifact(pushed, tmp_path / "later", PullOptions())


def test_a_registry_that_stays_down(pushed: Reference, proxy: Any, tmp_path: Path) -> None:
    proxy.faults[:] = [Fault("/blobs/", status=503, times=999)]
    with pytest.raises(BrokenTransferError, match="busy"):
        pull_artifact(pushed, tmp_path / "out", PullOptions(jobs=1))
    assert not (tmp_path / "out").exists()
    with pytest.raises(BrokenTransferError, match="cannot be reached"):
        open_store(parse_reference(f"127.0.0.1:{server.free_port()}/a:1"))


def test_what_is_not_there(pushed: Reference, proxy: Any, weights: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="404"):
        pull_artifact(pushed.at("9.9"), tmp_path / "out", PullOptions())
    with pytest.raises(NotFoundError):
        list_tags(Reference("test/nothing", host=proxy.host))
    proxy.faults[:] = [Fault(weights, status=404, times=9)]
    with pytest.raises(NotFoundError):
        pull_artifact(pushed, tmp_path / "out", PullOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 1_000_000, 2_900_000])
def test_a_broken_upload_is_finished(proxy: Any, repository: str, bundle: Path, weights: str, cut: int) -> None:
    """Distribution 2.8 drops a broken upload, so the file begins again; others are not sent twice."""
    reference = parse_reference(f"{proxy.host}/{repository}:1")
    proxy.faults[:] = [Fault(f"/uploads/.*{weights[7:]}", "PUT", cut=cut)]
    push_bundle(bundle, reference)
    assert not any(fault.times for fault in proxy.faults)
    assert proxy.upload_bytes <= total(bundle) + cut + 5_000
    verify_stored(reference)


def test_a_push_killed_halfway_leaves_no_tag_and_is_finished_later(
    proxy: Any, repository: str, bundle: Path, tmp_path: Path
) -> None:
    reference = parse_reference(f"{proxy.host}/{repository}:1")
    big = make_bundle(tmp_path / "big", size=30_000_000)
    process = subprocess.Popen([sys.executable, "-m", "nano", "push", big, str(reference)], stderr=subprocess.DEVNULL)
    while proxy.upload_bytes < 4_000_000 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(NotFoundError):
        inspect_artifact(reference)
    push_bundle(big, reference)
    verify_stored(reference)


def test_a_pull_killed_halfway_goes_on(proxy: Any, repository: str, tmp_path: Path) -> None:
    big = make_bundle(tmp_path / "big", size=30_000_000)
    reference = parse_reference(f"{proxy.host}/{repository}:1")
    push_bundle(big, reference)
    command = [sys.executable, "-m", "nano", "pull", str(reference), "--out", tmp_path / "out"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while proxy.blob_bytes < 15_000_000 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "out").exists():  # it may have been quicker than the kill
        assert (tmp_path / "out.partial").is_dir()
    pull_artifact(reference, tmp_path / "out", PullOptions())
    assert same_files(big, tmp_path / "out")
    assert proxy.blob_bytes <= total(big) + IN_FLIGHT
    assert not list(tmp_path.glob("out.*"))


def test_ctrl_c_says_what_is_kept(proxy: Any, repository: str, tmp_path: Path) -> None:
    big = make_bundle(tmp_path / "big", size=40_000_000)
    reference = parse_reference(f"{proxy.host}/{repository}:1")
    push_bundle(big, reference)
    proxy.faults[:] = [Fault("sha256:", status=503, headers={"Retry-After": "60"}, times=9)]
    command = [sys.executable, "-m", "nano", "pull", str(reference), "--out", tmp_path / "out"]
    (tmp_path / "out.partial").mkdir()
    weights = next(f.blob.digest for f in describe_bundle(big)[0].files if f.path == "model.pte")
    (tmp_path / "out.partial" / weights[7:]).write_bytes((big / "model.pte").read_bytes()[:10_000_000])
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while any(fault.times == 9 for fault in proxy.faults):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "are kept in" in said
    assert "Traceback" not in said


def test_a_file_that_is_not_what_the_manifest_says_is_not_pushed(proxy: Any, repository: str, bundle: Path) -> None:
    data = (bundle / "model.pte").read_bytes()
    (bundle / "model.pte").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reference = parse_reference(f"{proxy.host}/{repository}:1")
    with pytest.raises(BadFileError, match="not what the bundle's manifest says"):
        push_bundle(bundle, reference)
    with pytest.raises(NotFoundError):
        inspect_artifact(reference)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants user "phone" with password "s3cret:x"."""
    bcrypt = "$2y$05$" + "abcdefghijklmnopqrstuuCO2PptOpuUmFLSLIzaonwQ7mmTqkWGK"
    folder = tmp_path_factory.mktemp("locked")
    found = run("htpasswd", "-nbB", "phone", "s3cret:x") if _has("htpasswd") else None
    if found is None:
        found_hash = _bcrypt("s3cret:x")
        if found_hash is None:
            pytest.skip("neither htpasswd nor Python's bcrypt or crypt makes a bcrypt hash here")
        bcrypt = found_hash
    (folder / "htpasswd").write_text(found.stdout.strip() if found else f"phone:{bcrypt}")
    try:
        with server.serving(folder / "data", htpasswd=folder / "htpasswd") as host:
            yield host
    except server.NoRegistryError as error:
        pytest.skip(str(error))


def _has(name: str) -> bool:
    import shutil

    return shutil.which(name) is not None


def _bcrypt(password: str) -> str | None:
    done = subprocess.run(["perl", "-e", 'print crypt($ARGV[0], q($2b$05$abcdefghijklmnopqrstuu))', password],
                          capture_output=True, text=True, check=False)  # fmt: skip
    return done.stdout if done.stdout.startswith("$2b$") else None


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
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    host = f"127.0.0.1:{running.server_port}"
    config(tmp_path / "docker", auths={host: {"auth": base64.b64encode(b"phone:pass").decode()}})
    try:
        pull_artifact(parse_reference(f"{host}/{pushed.name}:1.0"), tmp_path / "out", PullOptions(jobs=1))
    finally:
        running.shutdown()
        running.server_close()
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
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(RequestError, match=r"Plain HTTP(.|\n)*registry\.example\.com(.|\n)*--plain-http"):
            open_store(parse_reference(f"127.0.0.1:{running.server_port}/team/nano:1"))
    finally:
        running.shutdown()
        running.server_close()


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


def test_the_commands_speak_of_it(pushed: Reference, bundle: Path, tmp_path: Path, nanokit: Callable[..., Any]) -> None:
    done = nanokit("pull", pushed, "--out", tmp_path / "out", "--json").json()
    assert (done["bytes"], done["moved"], done["signed"]) == (total(bundle), total(bundle), False)
    assert nanokit("tags", pushed.at()).stdout == "1.0\n"
    assert "1.0" in nanokit("ls", pushed.at()).stdout
    missing = nanokit("pull", pushed.at("2.0"), "--out", tmp_path / "no")
    assert missing.status == 2
    assert "Traceback" not in missing.stderr
