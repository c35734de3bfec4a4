"""The measured process of `nanokit bench`: one request, one line of JSON on stdout, and gone.

    python -m export.bench_worker '{"task": "run", "loader": "export.bench:load", ...}'
    python -m export.bench_worker '{"task": "read", "threads": 2}'

"run" loads a model, takes a prompt, decodes. Times are of the model alone: Python's imports and the tokenizer come
before the clock starts, and their memory is the baseline that is subtracted, since no phone has it.

"read" is the limit that decoding runs into: how fast this machine's threads read memory, as STREAM measures it
(https://www.cs.virginia.edu/stream/ref.html): buffers several times the last cache, each written first by the thread
that reads it, all threads started together, the best of several passes. The reading loop is the C library's memchr for
a byte that is not there: vector loads, nothing written, and ctypes lets other threads run meanwhile. STREAM's own
kernels write too; decoding a token only reads.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

PASSES = 8
SMALLEST, LARGEST = 256 << 20, 2 << 30
"""Bytes read in a pass, within which four times the last cache is kept."""
CACHES = 4
"""STREAM's rule: at least four times the sum of the last-level caches."""
SEED = 0


def main() -> None:
    """Do what the request says; libraries' words go to stderr."""
    request = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(run(request) if request["task"] == "run" else read(request["threads"])), file=out, flush=True)
    with suppress(BrokenPipeError):
        out.close()
    os._exit(0)  # a runtime's threads need no farewell, and some hang on one


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Load, prefill, decode greedily.

    Args:
        request: "loader", a "module:function" that takes (folder, threads) and returns a function that loads; "folder",
            "threads", "prompt" and "decode" (tokens), "vocabulary" (ids are drawn below it).

    Returns:
        "load_seconds", "prefill_seconds" (to the first new token), "decode_seconds" for each token after it,
        "decode_cpu_seconds" of all threads for all of them; and memory in bytes: "baseline" (resident before loading),
        "peak" (resident, over it), "phases": after load, prefill and decode, "rss", "clean" and "dirty" over the
        baseline. Memory is None where there is no /proc.
    """
    module, function = request["loader"].split(":")
    load = getattr(importlib.import_module(module), function)(Path(request["folder"]), request["threads"])
    ids = np.random.default_rng(SEED).integers(3, request["vocabulary"], request["prompt"]).tolist()
    before = memory()
    _forget_peak()
    phases: dict[str, Any] = {}

    def timed(name: str, work: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        made = work()
        seconds = time.perf_counter() - start
        phases[name] = memory()
        return made, seconds

    model, load_seconds = timed("load", load)
    logits, prefill_seconds = timed("prefill", lambda: model.prefill(ids))
    steps: list[float] = []
    token, cpu = int(logits.argmax()), time.process_time()
    for _ in range(request["decode"]):
        start = time.perf_counter()
        token = int(model.decode(token).argmax())
        steps.append(time.perf_counter() - start)
    times = {"load_seconds": load_seconds, "prefill_seconds": prefill_seconds, "decode_seconds": steps,
             "decode_cpu_seconds": time.process_time() - cpu}  # fmt: skip
    phases["decode"] = memory()
    if before is None:
        return {**times, "baseline": None, "peak": None, "phases": None}
    over = {name: {key: one[key] - before[key] for key in before} for name, one in phases.items()}
    return {**times, "baseline": before["rss"], "peak": _peak() - before["rss"], "phases": over}


def memory() -> dict[str, int] | None:
    """Resident bytes of this process: rss, clean (files' pages, which the system may drop) and dirty; Linux only."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    found = {key: int(value.split()[0]) << 10 for key, value in (line.split(":") for line in lines)}
    clean, dirty = (found[f"Shared_{kind}"] + found[f"Private_{kind}"] for kind in ("Clean", "Dirty"))
    return {"rss": found["Rss"], "clean": clean, "dirty": dirty}


def _forget_peak() -> None:
    """Set the process's recorded peak back to what it has now (proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def read(threads: int) -> dict[str, Any]:
    """The best rate at which `threads` threads read memory together, in bytes a second, and all passes' rates."""
    size = min(max(CACHES * _last_cache(), SMALLEST), LARGEST) // threads
    find = ctypes.CDLL(None).memchr
    find.restype, find.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    gate, found = threading.Barrier(threads), []
    times: list[list[tuple[float, float]]] = [[] for _ in range(threads)]

    def read_all(mine: list[tuple[float, float]]) -> None:
        buffer = np.full(size, 0x55, np.uint8)
        for _ in range(PASSES):
            gate.wait()
            start = time.perf_counter()
            found.append(find(buffer.ctypes.data, 0xAA, size))
            mine.append((start, time.perf_counter()))

    workers = [threading.Thread(target=read_all, args=(mine,)) for mine in times]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not any(found)
    spans = [max(end for _, end in one) - min(start for start, _ in one) for one in zip(*times, strict=True)]
    rates = [size * threads / span for span in spans]
    return {"bytes_per_second": max(rates), "passes": rates, "bytes": size * threads}


def _last_cache() -> int:
    """Bytes of the last-level cache, from sysfs; 0 where it is not told."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


if __name__ == "__main__":
    main()
