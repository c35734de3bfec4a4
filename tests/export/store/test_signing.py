"""Signatures: made, found, refused; read by openssl, and by openssl written; keys of every kind."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.store.artifact import Descriptor, canonical_json, describe_bundle, digest_of
from export.store.backend import open_store
from export.store.check import verify_stored
from export.store.layout import Layout
from export.store.manage import inspect_artifact, list_store, list_tags
from export.store.pull import PullOptions, pull_artifact
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from export.store.signing import (
    SIGNATURE,
    SIMPLE_SIGNING,
    _store,
    load_private_key,
    load_public_key,
    make_keys,
    sign_artifact,
    signature_tag,
)
from nano.errors import BadFileError, CheckFailedError, OutputExistsError

from .conftest import make_bundle, run, same_files


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path / "team")


def signed(stored: Reference, key: Path) -> str:
    store = open_store(stored)
    digest = inspect_artifact(stored)["digest"]
    assert sign_artifact(store, stored.name, digest, str(stored.at()), key)
    return str(digest)


def signature_manifest(stored: Reference, digest: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(open_store(stored).read_manifest(stored.name, signature_tag(digest)))
    return raw


def test_it_is_stored_as_cosign_stores_it(stored: Reference, keys: tuple[Path, Path]) -> None:
    digest = signed(stored, keys[0])
    assert signature_tag(digest) == "sha256-" + digest[7:] + ".sig"
    raw = signature_manifest(stored, digest)
    (layer,) = raw["layers"]
    assert layer["mediaType"] == "application/vnd.dev.cosign.simplesigning.v1+json"
    assert set(layer["annotations"]) == {"dev.cosignproject.cosign/signature"}
    payload = json.loads(Layout(stored.folder or Path()).blob_path(layer["digest"]).read_bytes())
    assert payload == {
        "critical": {
            "identity": {"docker-reference": "team/nano-2"},
            "image": {"docker-manifest-digest": digest},
            "type": "cosign container image signature",
        },
        "optional": None,
    }


def test_openssl_reads_it(
    stored: Reference, keys: tuple[Path, Path], tmp_path: Path, program: Callable[[str], str]
) -> None:
    digest = signed(stored, keys[0])
    (layer,) = signature_manifest(stored, digest)["layers"]
    (tmp_path / "signature").write_bytes(base64.b64decode(layer["annotations"][SIGNATURE]))
    payload = Layout(stored.folder or Path()).blob_path(layer["digest"])
    openssl = program("openssl")
    done = run(openssl, "dgst", "-sha256", "-verify", keys[1], "-signature", tmp_path / "signature", payload)
    assert done.stdout.strip() == "Verified OK"


def test_what_openssl_signed_is_taken(stored: Reference, tmp_path: Path, program: Callable[[str], str]) -> None:
    """As cosign does it: its payload has other spacing and claims of its own."""
    openssl, key, public = program("openssl"), tmp_path / "o.key", tmp_path / "o.pub"
    assert run(openssl, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key).returncode == 0
    assert run(openssl, "ec", "-in", key, "-pubout", "-out", public).returncode == 0
    digest = str(inspect_artifact(stored)["digest"])
    payload = json.dumps(
        {"critical": {"identity": {"docker-reference": "ghcr.io/x"}, "image": {"docker-manifest-digest": digest},
                      "type": "cosign container image signature"}, "optional": {"creator": "ci"}}, indent=1
    ).encode()  # fmt: skip
    (tmp_path / "payload").write_bytes(payload)
    made = run(openssl, "dgst", "-sha256", "-sign", key, "-out", tmp_path / "sig", tmp_path / "payload")
    assert made.returncode == 0
    signature = base64.b64encode((tmp_path / "sig").read_bytes()).decode()
    layer = Descriptor(SIMPLE_SIGNING, digest_of(payload), len(payload), {SIGNATURE: signature})
    _store(open_store(stored), stored.name, digest, [layer], payload)
    assert verify_stored(stored, public).signed
    assert load_private_key(key)


def test_pulls_want_the_right_key(stored: Reference, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_keys(tmp_path / "other")
    wanted = PullOptions(key=keys[1])
    with pytest.raises(CheckFailedError, match="is not signed"):
        pull_artifact(stored, tmp_path / "out", wanted)
    signed(stored, other[0])
    with pytest.raises(CheckFailedError, match="not signed with this key"):
        pull_artifact(stored, tmp_path / "out", wanted)
    assert not list(tmp_path.glob("out*"))
    signed(stored, keys[0])
    assert pull_artifact(stored, tmp_path / "out", wanted).signed
    assert pull_artifact(stored, tmp_path / "out2", PullOptions(key=other[1])).signed  # the first one stayed
    assert same_files(bundle, tmp_path / "out")


def test_signing_twice_is_once(stored: Reference, keys: tuple[Path, Path]) -> None:
    digest = signed(stored, keys[0])
    assert not sign_artifact(open_store(stored), stored.name, digest, "x", keys[0])
    assert len(signature_manifest(stored, digest)["layers"]) == 1


def test_a_signature_is_for_one_artifact(stored: Reference, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Moved to another artifact's tag it is worth nothing."""
    digest = signed(stored, keys[0])
    evil = push_bundle(make_bundle(tmp_path / "evil", seed=6), stored.at("1.1"))
    store = open_store(stored)
    payload = canonical_json(signature_manifest(stored, digest))
    store.put_manifest(
        stored.name, payload, "application/vnd.oci.image.manifest.v1+json", signature_tag(evil.artifact.digest)
    )
    with pytest.raises(CheckFailedError):
        pull_artifact(stored.at("1.1"), tmp_path / "out", PullOptions(key=keys[1]))


@pytest.mark.parametrize("change", ["payload", "signature", "not base64", "none", "huge", "type"])
def test_spoiled_signatures_are_worth_nothing(stored: Reference, keys: tuple[Path, Path], change: str) -> None:
    digest = signed(stored, keys[0])
    layout, raw = Layout(stored.folder or Path()), signature_manifest(stored, digest)
    (layer,) = raw["layers"]
    match change:
        case "payload":
            data = layout.blob_path(layer["digest"]).read_bytes().replace(b'"optional":null', b'"optional":{}  ')
            layer.update(digest="sha256:" + hashlib.sha256(data).hexdigest(), size=len(data))
            layout.put_blob("", Descriptor("x", layer["digest"], len(data)), data, lambda _: None)
        case "signature":
            spoiled = bytearray(base64.b64decode(layer["annotations"][SIGNATURE]))
            spoiled[-1] ^= 1
            layer["annotations"][SIGNATURE] = base64.b64encode(spoiled).decode()
        case "not base64":
            layer["annotations"][SIGNATURE] = "%%%"
        case "none":
            layer["annotations"] = {}
        case "huge":
            layer["size"] = 1 << 30
        case "type":
            layer["mediaType"] = "text/plain"
    layout.put_manifest(
        stored.name, canonical_json(raw), "application/vnd.oci.image.manifest.v1+json", signature_tag(digest)
    )
    with pytest.raises(CheckFailedError):
        verify_stored(stored, keys[1])


def test_signatures_are_no_artifacts(stored: Reference, keys: tuple[Path, Path]) -> None:
    signed(stored, keys[0])
    assert list_tags(stored) == ["1.0"]
    assert [one.reference.tag for one in list_store(stored.folder or Path())] == ["1.0"]
    assert inspect_artifact(stored)["signatures"] == 1


def test_in_a_registry_and_after_moving_to_another(
    registry: str, repository: str, bundle: Path, keys: tuple[Path, Path], tmp_path: Path, nanokit: Callable[..., Any]
) -> None:
    reference = f"{registry}/{repository}:1"
    push_bundle(bundle, parse_reference(reference))
    assert nanokit("verify", reference, "--require-signature", keys[1]).status == 1
    assert nanokit("sign", reference, "--key", keys[0]).status == 0
    done = nanokit("pull", reference, "--require-signature", keys[1], "--out", tmp_path / "out", "--json")
    assert done.json()["signed"] is True
    found = nanokit("verify", reference, "--require-signature", keys[1], "--json").json()
    assert found["signed"] is True
    assert [step["role"] for step in found["history"]] == ["int4", "student"]


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = make_keys(tmp_path / "k")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert load_private_key(private).public_key() == load_public_key(public)
    with pytest.raises(OutputExistsError):
        make_keys(tmp_path / "k")
    monkeypatch.setenv("NANOKIT_KEY_PASSWORD", "correct horse")
    locked, public = make_keys(tmp_path / "locked")
    assert b"ENCRYPTED" in locked.read_bytes()
    assert load_private_key(locked).public_key() == load_public_key(public)
    for password in ("wrong", ""):
        monkeypatch.setenv("NANOKIT_KEY_PASSWORD", password)
        with pytest.raises(BadFileError, match="cannot be used"):
            load_private_key(locked)


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_files_that_are_no_keys(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    for load in (load_private_key, load_public_key):
        with pytest.raises(BadFileError):
            load(tmp_path / "k")
    with pytest.raises(BadFileError, match="cannot be read"):
        load_public_key(tmp_path / "none")


def test_keys_of_other_kinds(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for number, key in enumerate((ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate())):
        path = tmp_path / f"{number}.key"
        path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        with pytest.raises(BadFileError, match="P-256"):
            load_private_key(path)
    (tmp_path / "cosign.key").write_text("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAAAA\n-----END\n")
    with pytest.raises(BadFileError, match="cosign's own"):
        load_private_key(tmp_path / "cosign.key")
    with pytest.raises(BadFileError):
        load_public_key(keys[0])  # the private one, by mistake


def test_the_signed_digest_is_the_manifests(stored: Reference, bundle: Path, keys: tuple[Path, Path]) -> None:
    assert signed(stored, keys[0]) == describe_bundle(bundle)[0].digest
