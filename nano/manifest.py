"""`manifest.json`: what a stage made, of what, how, and how good it is.

Every stage's output folder carries one, naming its inputs by hash, so that a bundle's history can be walked
back to the teacher. Plain JSON, small enough for git; written last, so its presence means the folder is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from nano.errors import BadFileError, RequestError
from nano.folder import sha256_file, write_text_atomically
from nano.model_files import read_json_object
from nano.untrusted import items
from nano.version import __version__

NAME = "manifest.json"
SCHEMA_VERSION = 1
REPEATED_RESULTS = (
    "parameters", "held_out", "relative_error", "rounding_error", "bits", "bits_per_weight", "kl_before_training",
    "kl_after_training", "scorecard", "divergence",
)  # fmt: skip
"""Figures of an input that whatever is made of it repeats, so that a bundle alone can tell its history."""
KINDS = ("student", "int4", "bitsandbytes", "executorch", "onnx")
"""Stages' outputs: an HF float folder, a packed HF folder, one of bitsandbytes, a .pte bundle, an ONNX Runtime GenAI
bundle."""


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    Attributes:
        kind: one of `KINDS`.
        inputs: role (for instance "teacher") to {"path", "fingerprint", and "manifest" where it had one}.
        files: path within the folder to {"sha256", "bytes"}; every file but the manifest itself.
        recipe: the stage's options as plain data.
        data: text that was used: {"files": [{"path", "sha256"}], "tokens", "seed"}.
        results: figures measured while making it (losses, errors, parity).
        footprint: facts that memory prediction needs (bundles only), in bytes unless named otherwise.
        shape: the model's dimensions.
        command: the exact command line.
        created: UTC time, ISO 8601.
        versions: of nanokit and the libraries that shaped the output.
    """

    kind: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    footprint: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file under `folder`, fill in command, time and versions, write manifest.json.

    Call it last: it vouches for everything that lies there.
    """
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }
    full = dataclasses.replace(
        manifest,
        files=files,
        command=manifest.command or ("nanokit", *sys.argv[1:]),
        created=manifest.created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=manifest.versions or library_versions(),
    )
    write_text_atomically(folder / NAME, json.dumps(dataclasses.asdict(full), indent=2, default=str) + "\n")
    return full


def add_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Add figures that were found later to a folder's manifest.json; its files are not hashed again.

    Raises:
        RequestError: the folder cannot be written to.
    """
    manifest = read_manifest(folder)
    added = dataclasses.replace(manifest, results={**manifest.results, **results})
    try:
        write_text_atomically(folder / NAME, json.dumps(dataclasses.asdict(added), indent=2, default=str) + "\n")
    except OSError as error:
        raise RequestError(
            "manifest.json cannot be written.", found=f"{folder / NAME}: {error.strerror}", todo="check its permissions"
        ) from None


def read_manifest(folder: Path) -> Manifest:
    """manifest.json of a folder.

    Raises:
        BadFileError: missing, not JSON, or of a schema this version does not know.
    """
    path = folder / NAME
    if folder.is_file():
        raise BadFileError(
            "This should be a folder.",
            found=f"the file {folder}",
            todo=f"name the folder that holds it: {folder.parent}",
        )
    if not folder.is_dir():
        raise BadFileError("There is no such folder.", found=str(folder), todo="check the path")
    if not path.is_file():
        raise BadFileError(
            "This folder has no manifest.json, so nanokit did not make it (or it is not whole).",
            found=str(folder),
            expected="the output of nanokit distill, quantize or export",
        )
    raw = read_json_object(path)
    if raw.get("schema_version") != SCHEMA_VERSION or raw.get("kind") not in KINDS:
        raise BadFileError(
            "manifest.json is of a form that this nanokit does not know.",
            found=f"{path}: schema_version {raw.get('schema_version')!r}, kind {raw.get('kind')!r}",
            expected=f"schema_version {SCHEMA_VERSION}, kind one of {', '.join(KINDS)}",
            todo="make it again, or use the nanokit that made it",
        )
    wrong = next((f.name for f in dataclasses.fields(Manifest) if not _sound(f.name, raw.get(f.name, f.default))), None)
    if wrong is not None:
        raise BadFileError(
            "manifest.json has an unusable value.",
            found=f"{path}: {wrong} = {str(raw[wrong])[:60]}",
            todo="make it again, or copy it again",
        )
    known = {f.name for f in dataclasses.fields(Manifest)}
    raw["command"] = tuple(items(raw.get("command")))
    return Manifest(**{key: value for key, value in raw.items() if key in known})


def _sound(field_name: str, value: Any) -> bool:
    """Whether a field is of the kind that its readers count on; what lies deeper they check themselves."""
    if value is dataclasses.MISSING or field_name in ("schema_version", "command"):
        return True
    if field_name in ("kind", "created"):
        return isinstance(value, str)
    return isinstance(value, dict) and (field_name != "files" or all(isinstance(e, dict) for e in value.values()))


def has_manifest(folder: Path) -> bool:
    """Whether a folder carries a manifest.json."""
    return (folder / NAME).is_file()


def fingerprint(folder: Path) -> str:
    """Hex sha256 over names and contents of a model folder.

    With a manifest its recorded hashes stand in for the contents (and the manifest's time and command do not
    count), so two runs that made the same bytes have the same fingerprint.
    """
    if has_manifest(folder):
        entries = {name: entry["sha256"] for name, entry in read_manifest(folder).files.items()}
    else:
        entries = {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def input_entry(folder: Path) -> dict[str, Any]:
    """How a manifest names one input folder: where it lay, its fingerprint, and its own history."""
    entry: dict[str, Any] = {"path": str(folder), "fingerprint": fingerprint(folder)}
    if has_manifest(folder):
        theirs = dataclasses.asdict(read_manifest(folder))
        kept = ("kind", "created", "command", "versions", "data", "shape", "recipe", "inputs")
        results = {name: theirs["results"][name] for name in REPEATED_RESULTS if name in theirs["results"]}
        entry["manifest"] = {**{name: theirs[name] for name in kept}, "results": results}
    return entry


def library_versions() -> dict[str, str]:
    """Versions of nanokit and of those libraries that are installed and shape an output."""
    found = {"nanokit": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "transformers", "compressed-tensors", "executorch", "torchao", "onnx", "onnxruntime", "onnxruntime-genai", "bitsandbytes"):  # noqa: E501  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
