"""A bundle as an OCI artifact, and back: one layer a file, a config that says what the model is, annotations.

    manifest   application/vnd.oci.image.manifest.v1+json (image-spec 1.1), artifactType of CNCF ModelPack
    config     application/vnd.cncf.model.config.v1+json: ModelPack's description of the model
    layers     the bundle's files as they are, not packed: what a registry holds is what a phone maps
    names      org.opencontainers.image.title on each layer (what oras reads) and org.cncf.model.filepath (ModelPack)

The manifest is a function of the bundle's bytes alone. Whoever pushes the same bundle makes the same digest, so a
signature stays valid from registry to registry, and weights that two bundles share are stored once.

Sources: opencontainers/image-spec v1.1 manifest.md and annotations.md; modelpack/model-spec specs-go/v1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from export.store.facts import Facts, annotations_of, facts_of, read_facts
from export.store.names import require_safe_names
from export.store.reference import is_digest
from export.verify import BUNDLES
from nano.errors import BadFileError
from nano.manifest import NAME, Manifest, read_manifest

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
_WEIGHTS = "application/vnd.cncf.model.weight.v1.raw"
_SETTINGS = "application/vnd.cncf.model.weight.config.v1.raw"
TITLE, FILEPATH = "org.opencontainers.image.title", "org.cncf.model.filepath"

MAX_MANIFEST = 4 << 20
"""Bytes; the largest manifest that registries must take (distribution-spec 1.1, "Pushing Manifests")."""
MAX_FILES = 1_000
MAX_FILE = 1 << 40


@dataclass(frozen=True)
class Descriptor:
    """How OCI documents name some bytes.

    Attributes:
        media_type: what they are.
        digest: "sha256:" and their hash.
        size: how many they are.
        annotations: what else is said of them.
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The descriptor as OCI documents write it."""
        plain: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return {**plain, "annotations": dict(self.annotations)} if self.annotations else plain


@dataclass(frozen=True)
class File:
    """One file of an artifact: its path below the bundle's folder, with /, and the blob that it is."""

    path: str
    blob: Descriptor


@dataclass(frozen=True)
class Artifact:
    """A bundle as a store holds it.

    Attributes:
        payload: the manifest's very bytes; their hash is the artifact's digest.
        config: the blob that describes the model.
        files: the bundle's files, safe to create side by side.
        facts: what the annotations say.
    """

    payload: bytes
    config: Descriptor
    files: tuple[File, ...]
    facts: Facts

    @property
    def digest(self) -> str:
        """sha256 of the manifest: the artifact's identity."""
        return digest_of(self.payload)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.blob.size for file in self.files)


def digest_of(data: bytes) -> str:
    """The OCI digest of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """JSON without spaces, keys in the given order: the bytes that are hashed."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def describe_bundle(folder: Path) -> tuple[Artifact, bytes]:
    """The artifact that a bundle is, and its config's bytes. Reads manifest.json and sizes, hashes no other file.

    Raises:
        BadFileError: no bundle, files missing or of another size than recorded, files that nothing vouches for.
    """
    manifest = read_manifest(folder)
    _require_bundle(folder, manifest)
    own = (folder / NAME).read_bytes()
    entries = {name: (f"sha256:{entry['sha256']}", entry["bytes"]) for name, entry in manifest.files.items()}
    entries[NAME] = (digest_of(own), len(own))
    require_safe_names(entries, str(folder / NAME))
    layers = sorted((_layer(name, *entry) for name, entry in entries.items()), key=_order)
    facts = facts_of(manifest)
    config = canonical_json(_config(facts, manifest, layers))
    described = Descriptor(MODEL_CONFIG, digest_of(config), len(config))
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": MODEL,
        "config": described.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": annotations_of(facts),
    }
    files = tuple(File(layer.annotations[TITLE], layer) for layer in layers)
    return Artifact(canonical_json(document), described, files, facts), config


def _require_bundle(folder: Path, manifest: Manifest) -> None:
    from device_profiles.check import check_files
    from nano.integrity import unlisted_files

    if manifest.kind not in BUNDLES:
        raise BadFileError(
            "This folder is not a bundle.",
            found=f"{folder}: a folder of kind '{manifest.kind}'",
            expected="what nanokit export writes",
            todo="nanokit export it first; students and checkpoints belong on a model hub",
        )
    check_files(folder, manifest)
    if extra := unlisted_files(folder, manifest):
        raise BadFileError(
            "The bundle holds files that its manifest does not name, so nothing vouches for them.",
            found=f"{', '.join(extra[:3])}{' ...' if len(extra) > 3 else ''} in {folder}",
            todo="move them elsewhere and push again",
        )


def _layer(name: str, digest: str, size: int) -> Descriptor:
    weights = PurePosixPath(name).suffix in (".pte", ".onnx", ".data")
    return Descriptor(_WEIGHTS if weights else _SETTINGS, digest, size, {TITLE: name, FILEPATH: name})


def _order(layer: Descriptor) -> tuple[bool, str]:
    """Weights first, as ModelPack's tools write them, then by name."""
    return layer.media_type != _WEIGHTS, layer.annotations[TITLE]


def _config(facts: Facts, manifest: Manifest, layers: list[Descriptor]) -> dict[str, Any]:
    """ModelPack's config document (model-spec, schema/config-schema.json; it takes no keys of others)."""
    scale, letter = next(((s, c) for s, c in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if facts.parameters >= s), (1e3, "K"))
    config: dict[str, Any] = {
        "architecture": "transformer",
        "format": "onnx" if manifest.kind == "onnx" else "pte",
        "paramSize": f"{facts.parameters / scale:.1f}{letter}",
        "precision": "int4",
        "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
    }
    if facts.method:
        config["quantization"] = facts.method
    return {
        "descriptor": {"createdAt": facts.created, "family": facts.family, "name": facts.student},
        "config": config,
        "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
    }


def parse_artifact(payload: bytes, where: str) -> Artifact:
    """Read and check an artifact's manifest, whoever wrote it.

    Args:
        payload: the manifest's bytes.
        where: where they came from, for messages.

    Raises:
        BadFileError: not the manifest of a model artifact, or one with unsafe names or impossible sizes.
    """
    document = load_document(payload, where)
    if document.get("artifactType") != MODEL:
        raise BadFileError(
            "This is another kind of artifact.",
            found=f"{where}: artifactType {document.get('artifactType')!r}, mediaType {document.get('mediaType')!r}",
            expected=f"artifactType '{MODEL}', as nanokit push writes it",
        )
    layers = document.get("layers")
    if not isinstance(layers, list) or not 0 < len(layers) <= MAX_FILES:
        raise _malformed(where, "its list of layers", f"1 to {MAX_FILES:,} layers")
    files = []
    for layer in layers:
        blob = read_descriptor(layer, where)
        name = blob.annotations.get(TITLE) or blob.annotations.get(FILEPATH)
        if not name:
            raise _malformed(where, f"a layer without a name ({blob.digest})", f"an annotation '{TITLE}'")
        files.append(File(name, blob))
    require_safe_names((file.path for file in files), where)
    annotations = document.get("annotations", {})
    facts = read_facts(annotations if isinstance(annotations, dict) else {})
    return Artifact(payload, read_descriptor(document.get("config"), where), tuple(files), facts)


def load_document(payload: bytes, where: str) -> dict[str, Any]:
    """A JSON object of a bounded size.

    Raises:
        BadFileError: too large, not JSON, or no object.
    """
    if len(payload) > MAX_MANIFEST:
        raise _malformed(where, f"more than {MAX_MANIFEST:,} bytes", "less")
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise _malformed(where, f"no JSON: {error}", "a JSON object") from None
    if not isinstance(document, dict):
        raise _malformed(where, f"a JSON {type(document).__name__}", "a JSON object")
    return document


def read_descriptor(raw: Any, where: str) -> Descriptor:
    """A descriptor of a document that came from elsewhere.

    Raises:
        BadFileError: a field is missing, the digest is none that we check, or the size is impossible.
    """
    raw = raw if isinstance(raw, dict) else {}
    media_type, digest, size = raw.get("mediaType"), raw.get("digest"), raw.get("size")
    sized = isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= MAX_FILE
    if not isinstance(media_type, str) or not isinstance(digest, str) or not is_digest(digest) or not sized:
        raise _malformed(where, f"{media_type!r}, {digest!r}, {size!r}", "a media type, a sha256 digest, a size")
    notes = raw.get("annotations")
    notes = {k: v for k, v in notes.items() if isinstance(v, str)} if isinstance(notes, dict) else {}
    return Descriptor(media_type, digest, int(size or 0), notes)


def _malformed(where: str, found: str, expected: str) -> BadFileError:
    return BadFileError("This is not a usable OCI document.", found=f"{where}: {found}", expected=expected)
