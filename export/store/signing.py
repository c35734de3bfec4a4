"""Signatures in cosign's key-pair scheme: ECDSA P-256 with SHA-256 over a "simple signing" payload.

    payload   {"critical": {"identity": ..., "image": {"docker-manifest-digest": D}, "type": ...}, "optional": null}
    stored    as cosign stores it: an image manifest tagged sha256-<hex of D>.sig beside the artifact, a layer a
              signature, the signature itself in base64 in the annotation dev.cosignproject.cosign/signature

Source: sigstore/cosign specs/SIGNATURE_SPEC.md. `cosign verify --key K.pub --insecure-ignore-tlog` reads what is
written here, and what `cosign sign --key` stored is read here. The manifest's digest covers every file's.

Keys are plain PEM (PKCS#8, with a password where wanted). cosign's own encrypted form (scrypt and NaCl's secretbox)
is not read; `cosign import-key-pair` takes ours the other way.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.store.artifact import MANIFEST, Descriptor, canonical_json, digest_of, load_document, read_descriptor
from export.store.backend import Store, read_blob
from export.store.select import SIGNATURE_SUFFIX
from nano.errors import BadFileError, CheckFailedError, NotFoundError, OutputExistsError, RequestError, require_module
from nano.folder import write_text_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
TYPE = "cosign container image signature"
_IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
MAX_PAYLOAD, MAX_SIGNATURES, MAX_KEY = 64 << 10, 100, 64 << 10
PASSWORD = "NANOKIT_KEY_PASSWORD"


def signature_tag(digest: str) -> str:
    """Where the signatures of an artifact are kept: sha256-<hex>.sig."""
    return digest.replace(":", "-") + SIGNATURE_SUFFIX


def sign_artifact(store: Store, name: str, digest: str, identity: str, key: Path) -> bool:
    """Add a signature to an artifact; others that it has stay.

    Args:
        store, name: where the artifact is.
        digest: of its manifest.
        identity: the reference that the payload names, without tag; verifiers may hold it against what they pulled.
        key: a PEM file with a private key.

    Returns:
        False where the artifact carries a signature of this key already.

    Raises:
        BadFileError: no usable key.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    private = load_private_key(key)
    layers = _signatures(store, name, digest)
    if any(_is_good(store, name, layer, digest, private.public_key()) for layer in layers):
        return False
    payload = canonical_json(
        {
            "critical": {
                "identity": {"docker-reference": identity},
                "image": {"docker-manifest-digest": digest},
                "type": TYPE,
            },
            "optional": None,
        }
    )
    signature = base64.b64encode(private.sign(payload, ECDSA(SHA256()))).decode()
    layer = Descriptor(SIMPLE_SIGNING, digest_of(payload), len(payload), {SIGNATURE: signature})
    _store(store, name, digest, [*layers, layer], payload)
    return True


def _store(store: Store, name: str, digest: str, layers: list[Descriptor], payload: bytes) -> None:
    """The manifest of all signatures, with the newest one's payload."""
    config = canonical_json(
        {
            "architecture": "", "os": "", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        }
    )  # fmt: skip
    described = Descriptor(_IMAGE_CONFIG, digest_of(config), len(config))
    for blob, data in ((layers[-1], payload), (described, config)):
        if not store.has_blob(name, blob):
            store.put_blob(name, blob, data, lambda _: None)
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": described.to_json(),
        "layers": [layer.to_json() for layer in layers],
    }
    store.put_manifest(name, canonical_json(document), MANIFEST, signature_tag(digest))


def require_signature(store: Store, name: str, digest: str, key: Path) -> None:
    """Raise unless an artifact carries a good signature of a key.

    Args:
        store, name: where the artifact is.
        digest: of its manifest; what is signed.
        key: a PEM file with a public key.

    Raises:
        CheckFailedError: no signature, or none of this key over this digest.
        BadFileError: no usable key.
    """
    public = load_public_key(key)
    layers = _signatures(store, name, digest)
    if not any(_is_good(store, name, layer, digest, public) for layer in layers):
        raise CheckFailedError(
            "The artifact is not signed." if not layers else "The artifact is not signed with this key.",
            found=f"{len(layers)} signatures of {digest} in {store.where}, none that {key} confirms",
            expected="a good signature",
            todo="do not use it; or ask whoever published it to nanokit sign it, or for the right public key",
        )


def count_signatures(store: Store, name: str, digest: str) -> int:
    """How many signatures an artifact carries, whoever's and whether good or not."""
    return len(_signatures(store, name, digest))


def _signatures(store: Store, name: str, digest: str) -> list[Descriptor]:
    """Layers of an artifact's signature manifest; empty where there is none."""
    try:
        payload = store.read_manifest(name, signature_tag(digest))
    except NotFoundError:
        return []
    layers = load_document(payload, signature_tag(digest)).get("layers")
    found = [read_descriptor(raw, signature_tag(digest)) for raw in (layers if isinstance(layers, list) else [])]
    return [layer for layer in found if layer.media_type == SIMPLE_SIGNING][:MAX_SIGNATURES]


def _is_good(store: Store, name: str, layer: Descriptor, digest: str, public: EllipticCurvePublicKey) -> bool:
    """Whether a signature is this key's, and over this digest."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        payload = read_blob(store, name, layer, MAX_PAYLOAD)
        public.verify(base64.b64decode(layer.annotations.get(SIGNATURE, ""), validate=True), payload, ECDSA(SHA256()))
        critical: Any = load_document(payload, layer.digest).get("critical")
        return bool(critical["type"] == TYPE and critical["image"]["docker-manifest-digest"] == digest)
    except (InvalidSignature, BadFileError, NotFoundError, binascii.Error, KeyError, TypeError):
        return False


def make_keys(prefix: Path) -> tuple[Path, Path]:
    """A new key pair in PREFIX.key (readable by its owner alone) and PREFIX.pub; never over an existing file.

    The private key is encrypted where $NANOKIT_KEY_PASSWORD (or cosign's $COSIGN_PASSWORD) is set.

    Raises:
        OutputExistsError: one of them is there.
    """
    require_module("cryptography", "oci")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    private_path, public_path = prefix.with_name(prefix.name + ".key"), prefix.with_name(prefix.name + ".pub")
    for path in (private_path, public_path):
        if path.exists():
            raise OutputExistsError("A key of that name exists already.", found=str(path), todo="choose another name; a lost key cannot be made again")  # noqa: E501  # fmt: skip
    if not prefix.absolute().parent.is_dir():
        raise RequestError("There is no such folder.", found=str(prefix.parent))
    private = ec.generate_private_key(ec.SECP256R1())
    password = _password()
    how = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    pem = private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, how)
    with os.fdopen(os.open(private_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(pem)
    public = private.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    write_text_atomically(public_path, public.decode())
    return private_path, public_path


def load_private_key(path: Path) -> EllipticCurvePrivateKey:
    """A private key for signing.

    Raises:
        BadFileError: not a PEM file with an ECDSA P-256 key, or a wrong password.
    """
    require_module("cryptography", "oci")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _pem(path)
    if b"SIGSTORE" in pem or b"COSIGN" in pem:
        raise BadFileError(
            "This is a key in cosign's own encrypted form, which is not read here.", found=str(path),
            expected="PEM that begins with BEGIN PRIVATE KEY, BEGIN EC PRIVATE KEY or BEGIN ENCRYPTED PRIVATE KEY",
            todo="sign with cosign sign --key, which works on the same artifacts; or make a key with nanokit keygen",
        )  # fmt: skip
    key: Any = None
    with contextlib.suppress(ValueError, TypeError):
        password = _password() if b"ENCRYPTED" in pem else None
        key = load_pem_private_key(pem, password)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _unusable(path, f"an ECDSA P-256 private key in PEM; its password, if it has one, in ${PASSWORD}")
    return key


def load_public_key(path: Path) -> EllipticCurvePublicKey:
    """A public key to verify with.

    Raises:
        BadFileError: not a PEM file with an ECDSA P-256 key.
    """
    require_module("cryptography", "oci")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key: Any = None
    with contextlib.suppress(ValueError, TypeError):
        key = load_pem_public_key(_pem(path))
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _unusable(path, "an ECDSA P-256 public key in PEM, as cosign and nanokit keygen write it")
    return key


def _pem(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_KEY)
    except OSError as error:
        raise BadFileError("The key cannot be read.", found=f"{path}: {error.strerror}", todo="check the path") from None  # noqa: E501  # fmt: skip


def _password() -> bytes | None:
    password = os.environ.get(PASSWORD) or os.environ.get("COSIGN_PASSWORD")
    return password.encode() if password else None


def _unusable(path: Path, expected: str) -> BadFileError:
    return BadFileError("This key cannot be used.", found=str(path), expected=expected, todo="nanokit keygen NAME")
