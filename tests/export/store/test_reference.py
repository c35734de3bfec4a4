"""References are read as docker and skopeo read them, and everything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.store.reference import Reference, default_store, is_loopback, parse_reference
from nano.errors import RequestError

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "host", "name", "tag", "digest"),
    [
        ("nano-2", "", "nano-2", "", ""),
        ("nano-2:1.0", "", "nano-2", "1.0", ""),
        ("team/nano-2:1.0", "", "team/nano-2", "1.0", ""),
        (f"nano-2@{DIGEST}", "", "nano-2", "", DIGEST),
        (f"ghcr.io/team/nano_2:v1@{DIGEST}", "ghcr.io", "team/nano_2", "v1", DIGEST),
        ("localhost/nano:1", "localhost", "nano", "1", ""),
        ("localhost:5000/a/b/c", "localhost:5000", "a/b/c", "", ""),
        ("[::1]:5000/nano:1", "[::1]:5000", "nano", "1", ""),
        ("127.0.0.1:5000/team/nano:_x", "127.0.0.1:5000", "team/nano", "_x", ""),
    ],
)
def test_what_is_read(text: str, host: str, name: str, tag: str, digest: str) -> None:
    found = parse_reference(text, Path("store"))
    assert (found.host, found.name, found.tag, found.digest) == (host, name, tag, digest)
    assert found.folder == (None if host else Path("store"))
    assert str(found) == text


def test_a_layout_folder_in_the_reference() -> None:
    assert parse_reference("oci:build/store:team/nano:1") == Reference("team/nano", "1", folder=Path("build/store"))


@pytest.mark.parametrize(
    "text",
    [
        "", ":1", "Nano:1", "nano:", "nano:-x", "nano:" + "a" * 129, "nano@sha256:00", "nano@md5:" + "0" * 64,
        f"nano@{DIGEST.upper()}", "../nano:1", "a//b:1", "/nano", "a" * 256, "oci::nano:1", "oci:store:",
        "ghcr.io/", "ghcr.io/a b:1", "user@host.io/nano:1", "ho st:1/nano", "https://ghcr.io/team/nano:1", "nano:1\n",
    ],
)  # fmt: skip
def test_what_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not a reference"):
        parse_reference(text)


def test_what_to_ask_for() -> None:
    assert parse_reference("nano").pinned == "latest"
    assert parse_reference("nano:1").pinned == "1"
    assert parse_reference(f"nano:1@{DIGEST}").pinned == DIGEST


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1", "127.3.2.1:80", "[::1]:5000"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.evil.com", "127.0.0.1.evil.com", "128.0.0.1", "evil.com:127", "::2"])
def test_no_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_the_default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOKIT_STORE", "/a/b")
    assert default_store() == Path("/a/b")
    monkeypatch.delenv("NANOKIT_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_store() == Path("/data/nanokit/store")
