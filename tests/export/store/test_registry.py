"""A real registry (Debian's docker-registry) with faults in front of it: broken, wrong, busy, refused, killed."""

from __future__ import annotations

import http.server
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.store.artifact import describe_bundle
from export.store.backend import open_store
from export.store.check import verify_stored
from export.store.manage import inspect_artifact, list_artifacts, list_tags
from export.store.pull import PullOptions, pull_artifact
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from nano.errors import BadFileError, BrokenTransferError, NotFoundError, WorkError

from .conftest import WEIGHTS, Fault, make_bundle, running, same_files, server

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


def test_the_commands_speak_of_it(pushed: Reference, bundle: Path, tmp_path: Path, nanokit: Callable[..., Any]) -> None:
    done = nanokit("pull", pushed, "--out", tmp_path / "out", "--json").json()
    assert (done["bytes"], done["moved"], done["signed"]) == (total(bundle), total(bundle), False)
    assert nanokit("tags", pushed.at()).stdout == "1.0\n"
    assert "1.0" in nanokit("ls", pushed.at()).stdout
    missing = nanokit("pull", pushed.at("2.0"), "--out", tmp_path / "no")
    assert missing.status == 2
    assert "Traceback" not in missing.stderr


class _Keeping(http.server.BaseHTTPRequestHandler):
    """A registry, in memory, that keeps what it got of a broken upload and says how much (distribution-spec 1.1).

    Blobs come from another address, as those of registries in clouds do.
    """

    protocol_version = "HTTP/1.1"
    kept: dict[str, bytes]
    seen: list[tuple[str, str, int]]
    elsewhere: str
    strangers: list[str]
    break_after: int

    def log_message(self, *_: Any) -> None:
        return

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/v2/":
            self._answer(200)
        elif "/uploads/" in self.path:
            length = len(self.kept.get("upload", b""))
            self._answer(204, Range=f"0-{length - 1}", Location=self.path)
        elif self.path in self.kept:
            self._answer(307, Location=f"http://{self.elsewhere}{self.path}")
        else:
            self._answer(404)

    def do_HEAD(self) -> None:
        self._answer(200 if self.path in self.kept else 404)

    def do_POST(self) -> None:
        self.kept["upload"] = b""
        self._answer(202, Location="/v2/team/nano/blobs/uploads/one?state=a%2Fb")

    def _take(self) -> bool:
        """The body onto what is kept; breaks off once."""
        left = int(self.headers.get("Content-Length") or 0)
        self.seen.append((self.command, self.headers.get("Content-Range", ""), left))
        if 0 <= self.break_after < left:
            self.kept["upload"] += self.rfile.read(self.break_after)
            type(self).break_after = -1
            self.close_connection = True
            self.connection.close()
            return False
        self.kept["upload"] += self.rfile.read(left)
        return True

    def do_PATCH(self) -> None:
        if self._take():
            self._answer(202, Location=self.path)

    def do_PUT(self) -> None:
        if "/manifests/" in self.path:
            self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(201)
        elif self._take():
            import hashlib

            data = self.kept.pop("upload")
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            right = digest[7:] in self.path and "state=a%2Fb" in self.path
            self.kept[f"/v2/team/nano/blobs/{digest}"] = data
            self._answer(201 if right else 400)


def test_an_upload_goes_on_where_the_registry_says(bundle: Path) -> None:
    handler = type("Handler", (_Keeping,), {"kept": {}, "seen": [], "break_after": 1_200_000})
    with running(handler) as host:
        done = push_bundle(bundle, parse_reference(f"{host}/team/nano:1"), jobs=1)
    assert done.moved == total(bundle)
    (broken,) = [one for one in handler.seen if one[0] == "PUT" and one[2] == WEIGHTS]
    (rest,) = [one for one in handler.seen if one[0] == "PATCH"]
    assert rest == ("PATCH", f"1200000-{WEIGHTS - 1}", WEIGHTS - 1_200_000)
    assert broken[1] == ""
    data = (bundle / "model.pte").read_bytes()
    assert data in handler.kept.values()
