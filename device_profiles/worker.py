"""The measured process: loads one bundle in its real runtime, prefills, decodes, and tells what memory it has.

    python -m device_profiles.worker '{"bundle": ..., "tokens": ..., "decode": ...}'

It is started by `measure.py`, which watches it from outside; the two speak JSON lines. Before each phase it says
which one begins, after each what the kernel counts for it (/proc/self/smaps_rollup) and how many bytes it had to read
from storage (/proc/self/io), so that a process that was killed has told how far it came. It waits for a line from
its parent before its first import and again before it loads anything: in between, the parent sets the limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREPARED = {
    "onnx": ("tokenizers", "onnxruntime", "onnx_ir", "export.onnx_runtime"),
    "executorch": ("tokenizers", "torch", "export.executorch_runtime:load_kernels"),
}
"""What Python imports (and, after a colon, calls) to run a bundle: there before the limit is set, and not counted, as
no phone has it."""

DROPPED_ONCE = "decode, dropped once"
DROPPED_ALWAYS = "decode, dropped always"
"""Decoding after the page cache was dropped, once and before every token: what paging costs."""

PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""

MADV_PAGEOUT = 21
"""linux/mman.h: write back and free the pages of a range. Clean pages of files go; anonymous ones stay without swap."""


def main() -> None:
    """Run the phases; each ends with a line of JSON on the real stdout."""
    request = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an event

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=out, flush=True)

    _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that was killed must not leave this behind
    sys.stdin.readline()  # the parent has put this process under its limit
    for door in PREPARED[request["runtime"]]:
        module, _, function = door.partition(":")
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
    tell(event="ready", memory=memory(), data=status()["VmData"])
    limit = json.loads(sys.stdin.readline())
    if limit["data"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limit["data"], limit["data"]))
    try:
        run(request, tell)
    except MemoryError:
        tell(event="refused", memory=memory())
    except Exception as error:  # told to the parent, which knows whether the limit is to blame
        tell(event="failed", message=f"{type(error).__name__}: {error}"[:2000])


def run(request: dict[str, Any], tell: Callable[..., None]) -> None:
    """Load, prefill, decode; then decode again with the page cache dropped."""
    from nano.lm import open_model

    folder = Path(request["bundle"])

    def phase(name: str, work: Callable[[], Any], units: int) -> Any:
        tell(event="begin", phase=name, units=units)
        started, faults, read = time.monotonic(), _major_faults(), bytes_read()
        made = work()
        tell(
            event="end",
            phase=name,
            seconds=time.monotonic() - started,
            memory=memory(),
            major_faults=_major_faults() - faults,
            bytes_read=bytes_read() - read,
        )
        return made

    model = phase("load", lambda: open_model(folder), 1)
    _libc().munlockall()  # ExecuTorch locks what it maps where it may; phones' limits on that are small
    ids = [3 + i * 7919 % (model.vocab_size - 3) for i in range(request["tokens"] + 3 * request["decode"])]
    start, decode = request["tokens"], request["decode"]
    first = min(start, request["chunk"])
    phase("first chunk", lambda: model.prefill(ids[:first]), first)  # how fast it is, before a prefill of minutes
    phase("prefill", lambda: model.prefill(ids[:start]), start)
    ballast = phase("unused cache", lambda: _ballast(request["ballast"]), 1) if request["ballast"] else None
    phase("decode", lambda: [model.decode(i) for i in ids[start : start + decode]], decode)
    again, left = ids[start + decode :], max(decode // 4, 1)

    def drop_and_decode(token: int) -> None:
        drop_pages(folder)
        model.decode(token)

    def drop_always() -> None:
        for token in again[:left]:
            drop_and_decode(token)

    phase(DROPPED_ONCE, lambda: drop_and_decode(again[0]), 1)
    phase(DROPPED_ALWAYS, drop_always, left)
    del ballast
    tell(event="done", memory=memory())


def _ballast(count: int) -> mmap.mmap:
    """Written memory, as the cache of the positions that were not prefilled would be."""
    held = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, count, mmap.PAGESIZE):
        held[start] = 1
    return held


def drop_pages(folder: Path) -> None:
    """Take a bundle's clean pages from this process and from the page cache: the next use reads them from storage."""
    libc = _libc()
    home = str(folder.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(home):
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)
    drop_cache(folder)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files of a folder; pages that a process has mapped stay."""
    for path in folder.iterdir():
        if path.is_file():
            with contextlib.suppress(OSError), path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes that the kernel counts for a process, from smaps_rollup: rss, pss, clean, dirty, anonymous, swap."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        found[key] = int(value.split()[0]) * 1024
    return {
        "rss": found["Rss"],
        "pss": found["Pss"],
        "clean": found["Shared_Clean"] + found["Private_Clean"],
        "dirty": found["Shared_Dirty"] + found["Private_Dirty"],
        "anonymous": found["Anonymous"],
        "swap": found["Swap"],
    }


def status(pid: int | str = "self") -> dict[str, int]:
    """Bytes of /proc/PID/status: RssAnon, RssFile, VmData. Cheap enough to be read every few milliseconds."""
    lines = (line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: int(value.split()[0]) * 1024 for key, value in lines if key in ("RssAnon", "RssFile", "VmData")}


def bytes_read() -> int:
    """Bytes that this process had fetched from storage."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


if __name__ == "__main__":
    main()
