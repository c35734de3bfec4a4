"""`nanokit verify`: is a folder what its manifest says, and does a bundle hold its checkpoint's very codes?

Two questions, asked apart. The first needs no library: every file that manifest.json names is there, of the recorded
length and sha256. The second reads codes and scales back out of the artifact (`export.bundle.read_codes`) and compares
them with the int4 checkpoint's, tensor by tensor; torch is imported for it alone.

manifest.json itself is not signed: whoever can change the files can change it too. So it guards against damage and
mix-ups, and where a trusted copy of it exists (a registry's digest), against everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nano.errors import BadFileError, CheckFailedError, RequestError
from nano.folder import human_bytes
from nano.history import Ancestor, history_of
from nano.integrity import Fault, file_entries, find_faults, unlisted_files
from nano.manifest import NAME, Manifest, fingerprint, read_manifest
from nano.shapes import read_config
from nano.untrusted import mapping

if TYPE_CHECKING:
    from export.bundle import Exactness

BUNDLES = ("executorch", "onnx")


@dataclass(frozen=True)
class Verification:
    """What was checked, and what was found.

    Attributes:
        kind: the stage that made the folder.
        fingerprint: the folder's own, of the manifest's hashes.
        files, bytes: how many were hashed.
        faults: files that are not what the manifest says.
        unlisted: files that the manifest does not name.
        history: inputs, and their inputs, as far as recorded.
        exact: the comparison with an int4 checkpoint, where one was given.
        same_checkpoint: whether that checkpoint has the fingerprint that the manifest names; None without one.
    """

    kind: str
    fingerprint: str
    files: int
    bytes: int
    faults: tuple[Fault, ...] = ()
    unlisted: tuple[str, ...] = ()
    history: tuple[Ancestor, ...] = ()
    exact: Exactness | None = None
    same_checkpoint: bool | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults and not (self.exact and self.exact.differing)


def verify_bundle(folder: Path, against: Path | None = None) -> Verification:
    """Hash every file of a stage's output against its manifest; compare a bundle with its int4 checkpoint.

    Nothing is raised for files or tensors that differ: see `Verification.ok`, and `require_verified` for an error.

    Args:
        folder: any folder with a manifest.json.
        against: an int4 folder; for bundles only. Without it torch is not imported.

    Raises:
        BadFileError: no manifest, one of a form that is not known, or (with `against`) a broken folder.
        RequestError: `against` for a folder that is no bundle.
        UnsupportedError, MissingExtraError: see `export.bundle.read_codes`.
    """
    manifest = read_manifest(folder)
    if against is not None and manifest.kind not in BUNDLES:
        raise RequestError(
            "Only a bundle's tensors can be compared with an int4 checkpoint's.",
            found=f"{folder} is of kind '{manifest.kind}'",
            expected=f"one of kind {' or '.join(BUNDLES)}",
            todo="leave --against out: the files' hashes are checked for every kind",
        )
    if against is not None:
        read_config(against)  # a wrong path is told before gigabytes are hashed
    entries = file_entries(manifest, folder)
    faults = tuple(find_faults(folder, entries))
    exact, same = (None, None) if against is None else _compare(folder, manifest, against, faults)
    return Verification(
        kind=manifest.kind,
        fingerprint=fingerprint(folder),
        files=len(entries),
        bytes=sum(size for size, _ in entries.values()),
        faults=faults,
        unlisted=unlisted_files(folder, manifest),
        history=history_of(manifest.inputs),
        exact=exact,
        same_checkpoint=same,
    )


def require_verified(verification: Verification, folder: Path) -> None:
    """Raise for the first thing that is wrong, and say how many there are.

    Raises:
        CheckFailedError: a file or a tensor differs.
    """
    files = ""
    if verification.faults:
        first = verification.faults[0]
        files = f"'{first.file}': {first.found}"
        if len(verification.faults) > 1:
            files += f"; and {len(verification.faults) - 1} more of {verification.files} files"
    exact = verification.exact
    if exact is not None and exact.differing:
        tensors = f"{len(exact.differing)} tensors differ, the first is '{exact.differing[0]}': {exact.first}"
        raise CheckFailedError(
            f"{folder} does not hold the checkpoint's codes and scales.",
            found=f"{tensors}\n            {files}" if files else tensors,
            expected=f"{NAME} says {verification.faults[0].expected}" if files else None,
            todo="copy the folder again" if files else "name the int4 folder it was made from, or export it again",
        )
    if files:
        raise CheckFailedError(
            f"{folder} is not what its manifest says.",
            found=files,
            expected=verification.faults[0].expected,
            todo="copy the folder again, or make it again",
        )


def _compare(
    folder: Path, manifest: Manifest, against: Path, faults: tuple[Fault, ...]
) -> tuple[Exactness | None, bool]:
    """Codes and scales of the artifact against the checkpoint's; and whether it is the one the manifest names.

    A damaged file is compared too, to name the tensor; where it cannot be read any more, its hash has said so.
    """
    from export.bundle import FORMATS, compare_codes
    from quantize.packed import Int4Checkpoint

    format = next(one for one in FORMATS if one == manifest.kind)
    recorded = mapping(mapping(manifest.inputs).get("int4")).get("fingerprint")
    same = fingerprint(against) == recorded
    with Int4Checkpoint(against) as checkpoint:
        try:
            return compare_codes(folder, format, checkpoint), same
        except BadFileError:
            if not faults:
                raise
            return None, same


def summary(verification: Verification) -> list[tuple[str, str]]:
    """The verification as rows for people: what was checked, and what was found."""
    rows = [
        ("kind", verification.kind),
        ("files as the manifest says", f"{verification.files}, {human_bytes(verification.bytes)}"),
        ("fingerprint", verification.fingerprint[:16]),
    ]
    if verification.exact is not None:
        exact = verification.exact
        rows.append(("codes and scales as in the checkpoint", f"{exact.codes:,} codes in {exact.modules} tensors: all"))
    return rows + history_rows(verification.history)


def history_rows(history: tuple[Ancestor, ...]) -> list[tuple[str, str]]:
    """What something was made of, as rows for people."""
    rows = []
    for ancestor in history:
        kind = f" ({ancestor.kind})" if ancestor.kind and ancestor.kind != ancestor.role else ""
        rows.append((f"{'  ' * (ancestor.depth - 1)}made from {ancestor.role}{kind}", f"{ancestor.fingerprint[:16]}, {ancestor.path}"))  # noqa: E501  # fmt: skip
    return rows
