"""Whether a folder holds the very files that its manifest names: presence, length, sha256.

manifest.json itself is not signed, so this guards against damage and mix-ups; see `export.verify`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nano.errors import BadFileError
from nano.folder import MIB, sha256_file
from nano.manifest import NAME, Manifest
from nano.progress import track
from nano.untrusted import mapping, whole

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fault:
    """One file that is not what the manifest says.

    Attributes:
        file: path within the folder.
        problem: "missing", "size" or "sha256".
        found, expected: in plain words.
    """

    file: str
    problem: str
    found: str
    expected: str


def file_entries(manifest: Manifest, folder: Path) -> dict[str, tuple[int, str]]:
    """Files that the manifest names, with their sizes and hashes; each must lie within the folder.

    Raises:
        BadFileError: one does not, or its entry has another form.
    """
    entries = {}
    for name, entry in mapping(manifest.files).items() or [("files", manifest.files)]:
        parts = PurePosixPath(name).parts
        within = bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name
        size, sha256 = whole(mapping(entry).get("bytes")), mapping(entry).get("sha256")
        if not within or size is None or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise BadFileError(
                "manifest.json names a file in a form that is not known.",
                found=f"{folder / NAME}: {name!r}: {entry!r}",
                expected='a path within the folder, {"sha256": 64 hex digits, "bytes": a number}',
            )
        entries[name] = (size, sha256)
    return entries


def find_faults(folder: Path, entries: Mapping[str, tuple[int, str]], *, hashes: bool = True) -> Iterator[Fault]:
    """Files that differ, by presence and length before anything is read; `hashes`: then by sha256."""
    whole = []
    for name, (size, sha256) in entries.items():
        path = folder / name
        if not path.is_file():
            yield Fault(name, "missing", "no such file", f"{size:,} bytes")
        elif path.stat().st_size != size:
            yield Fault(name, "size", f"{path.stat().st_size:,} bytes", f"{size:,} bytes")
        elif hashes:
            whole.append((name, size, sha256))
    if not whole:
        return
    with track("hash", sum(size for _, size, _ in whole) // MIB or 1, "MiB") as progress:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if done // MIB > progress.done:
                progress.advance(done // MIB - progress.done)

        for name, _, sha256 in whole:
            found = sha256_file(folder / name, advance)
            if found != sha256:
                yield Fault(name, "sha256", f"sha256 {found}", f"sha256 {sha256}")


def unlisted_files(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """Files below a folder that its manifest does not name."""
    found = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return tuple(name for name in found if name != NAME and name not in manifest.files)
