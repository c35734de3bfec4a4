"""Pull: an artifact out of a store into a folder, whole or not at all.

Files come into OUT.partial/, each under its digest, and become OUT by one rename when all are there and right. What an
interrupted pull brought stays there, and the same command goes on from that byte. Files that the last OUT or the local
store hold are copied, not fetched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.store.artifact import Artifact, Descriptor, File
from export.store.backend import Store, open_store
from export.store.check import require_same_files
from export.store.reference import Reference, default_store
from export.store.select import Tagged, choose
from export.store.signing import require_signature
from export.store.transfer import Meter, fetch, held, in_parallel, require_jobs
from nano.errors import NoSpaceError, OutputExistsError, RequestError
from nano.folder import MIB, check_output, human_bytes, is_no_space, replace_folder, require_space, sha256_file
from nano.manifest import read_manifest
from nano.progress import say, track

JOBS = 4


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        reference: what was pulled, with its digest.
        artifact: what it is.
        out: the folder.
        files: paths below it.
        moved: bytes that came over.
        signed: whether a signature was asked for and is good.
    """

    reference: Reference
    artifact: Artifact
    out: Path
    files: tuple[str, ...]
    moved: int
    signed: bool


@dataclass(frozen=True)
class PullOptions:
    """How to pull.

    Attributes:
        profile: see `choose`.
        format: see `choose`.
        files: only these of the artifact's files, put into a folder that may hold others.
        key: a public key; the artifact must carry a signature of it.
        jobs: files fetched at the same time.
        plain_http: see `open_store`.
        force: replace what is there.
    """

    profile: str = ""
    format: str = ""
    files: tuple[str, ...] = ()
    key: Path | None = None
    jobs: int = JOBS
    plain_http: bool = False
    force: bool = False


def pull_artifact(reference: Reference, out: Path, options: PullOptions) -> Pulled:
    """Bring an artifact into a folder.

    Args:
        reference: what.
        out: the folder: made, or replaced under --force; with `options.files` the folder to put them into.

    Raises:
        NotFoundError, RequestError, CheckFailedError: see `choose`, `require_signature`.
        OutputExistsError: something else is there.
        WorkError: the transfer broke; what came is kept for the next attempt.
    """
    require_jobs(options.jobs)
    _check_out(out, options)
    store = open_store(reference, plain_http=options.plain_http)
    with store.session():
        chosen = choose(store, reference, options.profile, options.format)
        if options.key is not None:
            require_signature(store, reference.name, chosen.artifact.digest, options.key)
        wanted = _wanted(chosen.artifact, options.files)
        place = Path(os.path.abspath(out))
        place.parent.mkdir(parents=True, exist_ok=True)
        whole = not options.files
        parts = place.with_name(place.name + ".partial") if whole else place / ".nanokit-partial"
        lock = place.with_name(f".{place.name}.pull-lock")
        with held(lock, f"another pull into {out} is under way; waiting for it"):
            moved = (_pull_folder if whole else _pull_files)(store, chosen, wanted, out, parts, options)
    pinned = chosen.reference.at(chosen.reference.tag, chosen.artifact.digest)
    return Pulled(pinned, chosen.artifact, out, tuple(f.path for f in wanted), moved, options.key is not None)


def _check_out(out: Path, options: PullOptions) -> None:
    """A whole bundle replaces its folder; single files go into one that may be in use, the current one included."""
    if not options.files:
        check_output(out, force=True)
    elif out.exists() and not out.is_dir():
        raise RequestError("The output should be a folder.", found=f"a file at {out}", todo="choose another --out")


def _wanted(artifact: Artifact, names: Sequence[str]) -> tuple[File, ...]:
    there = {file.path: file for file in artifact.files}
    if missing := [name for name in names if name not in there]:
        raise RequestError(
            "The artifact has no such file.", found=", ".join(missing), expected=f"one of {', '.join(there)}"
        )
    return tuple(there[name] for name in names) if names else artifact.files


def _pull_folder(
    store: Store, chosen: Tagged, wanted: Sequence[File], out: Path, parts: Path, options: PullOptions
) -> int:
    """The whole bundle; gives how many bytes came over."""
    if out.exists():
        if all(_is_there(out / file.path, file.blob) for file in wanted):
            say(f"{out} holds {chosen.reference} already")
            return 0
        if not options.force:
            raise OutputExistsError("The output folder exists already, with other contents.", found=str(out), todo="choose another --out, or give --force to replace it once the new one is complete")  # noqa: E501  # fmt: skip
    moved = _fetch_all(store, chosen, wanted, out, parts, options.jobs)
    whole = parts / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    _arrange(wanted, parts, whole)
    require_same_files(read_manifest(whole).files, tuple(wanted))
    replace_folder(whole, out.absolute())
    shutil.rmtree(parts, ignore_errors=True)
    return moved


def _pull_files(
    store: Store, chosen: Tagged, wanted: Sequence[File], out: Path, parts: Path, options: PullOptions
) -> int:
    """Some files, each renamed into place; others in the folder stay as they are."""
    missing = [file for file in wanted if not _is_there(out / file.path, file.blob)]
    if not missing:
        say(f"{out} holds the wanted files already")
        return 0
    there = [str(out / file.path) for file in missing if (out / file.path).exists()]
    if there and not options.force:
        raise OutputExistsError("A file exists already, with other contents.", found=there[0], todo="choose another --out, or give --force to replace it once the new one is complete")  # noqa: E501  # fmt: skip
    for file in missing:
        if not (out / file.path).parent.resolve().is_relative_to(out.resolve()):
            raise RequestError("A link in the output folder leads out of it.", found=str((out / file.path).parent), todo="choose another --out")  # noqa: E501  # fmt: skip
    moved = _fetch_all(store, chosen, missing, out, parts, options.jobs)
    whole = parts / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    _arrange(missing, parts, whole)
    for file in missing:
        (out / file.path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(whole / file.path, out / file.path)
    shutil.rmtree(parts, ignore_errors=True)
    return moved


def _fetch_all(store: Store, chosen: Tagged, wanted: Sequence[File], out: Path, parts: Path, jobs: int) -> int:
    """Every blob into `parts`, under its digest; gives how many bytes came over."""
    blobs = {file.blob.digest: file.blob for file in wanted}
    held_before = sum(_size(_part(parts, blob)) for blob in blobs.values())
    total = sum(blob.size for blob in blobs.values())
    require_space(out, total - min(held_before, total))
    parts.mkdir(parents=True, exist_ok=True)
    if parts.is_symlink():
        raise RequestError("The folder for unfinished files is a link.", found=str(parts), todo="remove it")
    with _kept(parts):
        for file in wanted:
            _reuse(file, out, parts)
        left = sum(max(blob.size - _size(_part(parts, blob)), 0) for blob in blobs.values())
        with track("pull", max(left // MIB, 1), "MiB") as progress:
            meter = Meter(progress)
            largest_first = sorted(blobs.values(), key=lambda blob: -blob.size)
            in_parallel(
                lambda blob: fetch(store, chosen.reference.name, blob, _part(parts, blob), meter), largest_first, jobs
            )
        return meter.bytes


@contextlib.contextmanager
def _kept(parts: Path) -> Iterator[None]:
    """Say what an interrupted pull leaves behind, and why."""
    try:
        yield
    except BaseException as error:
        size = sum(_size(path) for path in parts.iterdir() if path.is_file()) if parts.is_dir() else 0
        if size:
            say(f"{human_bytes(size)} are kept in {parts}: the same command goes on from there")
        else:
            shutil.rmtree(parts, ignore_errors=True)
        if is_no_space(error):
            raise NoSpaceError("The disk is full.", found=str(error), todo=f"free some space under {parts.parent}, and run the same command again") from None  # noqa: E501  # fmt: skip
        raise


def _reuse(file: File, out: Path, parts: Path) -> None:
    """Copy a file that is here already; whether it is the right one, `fetch` finds by hashing."""
    part = _part(parts, file.blob)
    if part.exists():
        return
    local = default_store() / "blobs" / "sha256" / file.blob.digest.removeprefix("sha256:")
    if _size(local) == file.blob.size:
        shutil.copyfile(local, part)
    elif _size(out / file.path) == file.blob.size and f"sha256:{sha256_file(out / file.path)}" == file.blob.digest:
        shutil.copyfile(out / file.path, part)


def _arrange(files: Sequence[File], parts: Path, whole: Path) -> None:
    """Files under their names in a fresh folder; one blob may be several files."""
    left = [file.blob.digest for file in files]
    for file in files:
        target = whole / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        left.remove(file.blob.digest)
        if file.blob.digest in left:
            shutil.copyfile(_part(parts, file.blob), target)
        else:
            os.replace(_part(parts, file.blob), target)


def _is_there(path: Path, blob: Descriptor) -> bool:
    return _size(path) == blob.size and f"sha256:{sha256_file(path)}" == blob.digest


def _part(parts: Path, blob: Descriptor) -> Path:
    return parts / blob.digest.removeprefix("sha256:")


def _size(path: Path) -> int:
    """Bytes of a plain file; 0 where there is none."""
    return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
