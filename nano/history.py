"""What a folder was made of, and that of what: read from its manifest, and from the folders where they still lie.

A manifest repeats its inputs' history, so a bundle alone tells it back to the teacher. What was added to an input's
manifest since (a scorecard, say) stands in that folder only: where a folder with the recorded fingerprint is found,
its own manifest is read instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from nano.errors import NanokitError
from nano.manifest import Manifest, fingerprint, has_manifest, read_manifest
from nano.untrusted import items, mapping, text

DEEPEST = 12
"""Generations that are followed: a manifest that goes on for ever is no history."""


@dataclass(frozen=True)
class Ancestor:
    """One step of a folder's history, as its manifest tells it.

    Attributes:
        role: what it was to the step after it, for instance "int4" or "teacher".
        kind: the stage that made it; empty where it had no manifest of its own.
        path: where it lay then.
        fingerprint: hex sha256 over its files (`nano.manifest.fingerprint`).
        depth: 1 for the folder's own inputs, 2 for theirs, ...
    """

    role: str
    kind: str
    path: str
    fingerprint: str
    depth: int


@dataclass(frozen=True)
class Step:
    """An ancestor with what its manifest says; empty where that is not known.

    Attributes:
        ancestor: which one.
        folder: where it was found, with the recorded fingerprint; None where it was not.
        created: UTC time, ISO 8601.
        command: the command line that made it.
        versions: of the libraries that made it.
        data: text that was used, as in `nano.manifest.Manifest`.
        shape, recipe, results: likewise.
    """

    ancestor: Ancestor
    folder: Path | None = None
    created: str = ""
    command: tuple[str, ...] = ()
    versions: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)


def history_of(inputs: Any) -> tuple[Ancestor, ...]:
    """What a folder was made of, nearest first, each followed by its own inputs."""
    return tuple(step.ancestor for step in _steps(inputs, None))


def lineage(folder: Path, manifest: Manifest) -> tuple[Step, ...]:
    """The same with all that is known of each step, the folder itself first.

    Args:
        folder: any folder with a manifest.json.
        manifest: its manifest.
    """
    own = Ancestor(manifest.kind, manifest.kind, str(folder), fingerprint(folder), 0)
    return (_step(own, folder, asdict(manifest)), *_steps(manifest.inputs, folder))


def _steps(inputs: Any, near: Path | None, depth: int = 1) -> Iterator[Step]:
    """Ancestors, those of each after it; folders are looked for around `near`, or not at all."""
    if depth > DEEPEST:
        return
    for role, raw in mapping(inputs).items():
        entry = mapping(raw)
        path, digest = text(entry.get("path")), text(entry.get("fingerprint"))
        found = None if near is None else _find(path, digest, near)
        theirs = asdict(read_manifest(found)) if found else mapping(entry.get("manifest"))
        yield _step(Ancestor(str(role), text(theirs.get("kind")), path, digest, depth), found, theirs)
        yield from _steps(theirs.get("inputs"), near, depth + 1)


def _step(ancestor: Ancestor, folder: Path | None, said: Mapping[str, Any]) -> Step:
    command = tuple(text(word) for word in items(said.get("command")))
    parts = {name: mapping(said.get(name)) for name in ("versions", "data", "shape", "recipe", "results")}
    return Step(ancestor, folder, text(said.get("created")), command, **parts)


def _find(path: str, digest: str, near: Path) -> Path | None:
    """The folder of a fingerprint: at the same place relative to folders above `near`, or where it lay then."""
    parts = PurePath(path).parts
    around = [parent.joinpath(*parts[-n:]) for parent in near.absolute().parents[:3] for n in (1, 2) if len(parts) >= n]
    for candidate in [*around, Path(path)] if digest and parts else ():
        try:
            if has_manifest(candidate) and fingerprint(candidate) == digest:
                return candidate
        except (NanokitError, OSError, KeyError, TypeError, AttributeError):  # somebody's folder of the same name
            continue
    return None
