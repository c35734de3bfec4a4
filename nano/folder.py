"""Output folders that are whole or not there: write beside, then rename.

A stage writes into `OUT.partial/` next to its output and renames it when everything is written. What
existed under the output's name stays until that moment, and an interrupted or failed run leaves neither a
half-written output nor the partial folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

from nano.errors import NoSpaceError, OutputExistsError, RequestError
from nano.progress import say

MIB = 1 << 20


def human_bytes(count: float) -> str:
    """Bytes for people, in powers of 1,024: '1.3 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def check_output(out: Path, *, force: bool, made_from: Iterable[Path] = ()) -> None:
    """Refuse an output that exists, before any work is done.

    Args:
        out: the folder to make.
        force: whether it may replace one that exists.
        made_from: files and folders that are read to make it: an output never replaces them, not even by force.

    Raises:
        OutputExistsError: `out` is there and `force` is not set.
        RequestError: `out` or one above it is a file; `out` is the current folder or one above it, a mount point, or
            holds what it is made from; its parent cannot be written to; or the shell left its `~` as it was.
    """
    if out.parts[:1] and out.parts[0].startswith("~") and not Path(out.parts[0]).exists():
        raise RequestError(
            "The output's path begins with ~, which the shell left as it was.",
            found=str(out),
            todo=f"write it apart, as in --out {out}, or the whole path: {_expanded(out)}",
        )
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise RequestError("The output should be a folder.", found=f"a file at {parent}", todo="choose another --out")
    lost = [source for source in made_from if source.resolve().is_relative_to(out.resolve())]
    if out.exists() and lost:
        raise RequestError(
            "The output would replace what it is made from.",
            found=f"--out {out}, which holds {lost[0]}",
            todo="choose another --out",
        )
    if out.exists() and (Path.cwd().resolve().is_relative_to(out.resolve())):
        raise RequestError(
            "The output would replace the folder you stand in.", found=str(out), todo="choose another --out"
        )
    if os.path.ismount(out):
        raise RequestError(
            "The output is a mount point, which cannot be replaced.",
            found=str(out),
            todo=f"choose a folder inside it, such as --out {out / 'model'}",
        )
    if out.exists() and not force:
        raise OutputExistsError(
            "The output folder exists already.",
            found=str(out),
            todo="choose another --out, or give --force to replace it once the new one is complete",
        )
    if not os.access(parent, os.W_OK):
        raise RequestError(
            "The output cannot be written there.", found=f"no write permission in {parent}", todo="choose another --out"
        )


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, or no home
        return path


def require_space(where: Path, needed: int) -> None:
    """Raise NoSpaceError when the disk under `where` has less than `needed` bytes left."""
    parent = next(p for p in (where.absolute(), *where.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise NoSpaceError(
            "There is not enough space on the disk.",
            found=f"{human_bytes(free)} free under {parent}",
            expected=f"about {human_bytes(needed)}",
            todo="free some space, or choose another --out",
        )


@contextlib.contextmanager
def staged_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends well, and vanishes when it does not.

    Where `out` is a symbolic link the folder that it leads to is made or replaced.

    Raises:
        OutputExistsError: see `check_output`.
        RequestError: another process writes the same output now.
        NoSpaceError: the disk filled up while the block wrote.
    """
    check_output(out, force=force)
    place = Path(os.path.realpath(out))
    partial = place.with_name(place.name + ".partial")
    lock = _emptied(partial)
    try:
        with termination_interrupts():
            yield partial
            replace_folder(partial, place)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_no_space(error):
            raise NoSpaceError(
                "The disk is full; nothing was left behind.",
                found=str(error),
                todo=f"free some space under {partial.parent}, or choose another --out",
            ) from None
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP do what Ctrl-C does, so that what it cleans up is cleaned up.

    Build servers, `docker stop` and batch systems send the first, a closing terminal the second. Where one is handled
    or ignored already (nohup), and in threads, that stays as it is.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)] if main else []
    replaced = [number for number in set(numbers) if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in replaced:
            signal.signal(number, stop)
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _emptied(partial: Path) -> int:
    """Make a folder, or empty what a killed run left of it; gives the handle that holds it."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = hold_folder(partial)
    try:
        empty_folder(partial)
    except BaseException:
        os.close(lock)
        raise
    return lock


def empty_folder(folder: Path) -> None:
    """Delete all that a folder holds; it stays itself, and so does a lock on it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def hold_folder(folder: Path) -> int:
    """A handle that holds a folder until it is closed or the process ends, however it ends.

    Where the file system knows no locks it holds nothing.

    Raises:
        RequestError: another process holds it.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RequestError(
            "Another run is making this output now.",
            found=f"{folder}, held by a running process",
            todo="let it end, or choose another --out",
        ) from None
    except OSError:
        say(f"{folder} cannot be locked: do not start a second run with the same --out meanwhile")
    return handle


def is_no_space(error: BaseException) -> bool:
    """Whether an exception says that the disk is full or a quota is spent, whoever raised it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if type(error).__module__.split(".")[0] == "nano":
        return False
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "No space left on device" in str(error) or any(f"(os error {n})" in str(error) for n in numbers)  # Rust's


def replace_folder(new: Path, out: Path) -> None:
    """Put `new` in `out`'s place; an older `out` is moved aside first and put back if that fails."""
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file beside its place and rename it there."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def sha256_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Hex sha256 of a file, read in 1 MiB pieces; `advance` hears how many bytes each piece had."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(MIB):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()
