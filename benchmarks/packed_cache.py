"""What a loaded .pte costs in memory, by where XNNPACK's packed weights lie: heap, or a file (executorch#19862).

    python benchmarks/packed_cache.py BUNDLE [--context-tokens 128] [--decode 16]

XNNPACK packs a second copy of all weights as it loads; by default that copy is dirty memory. Given "packed_cache_path"
when the program is loaded, it lies in a file: clean pages, which the system may drop, and a second start reads it
instead of packing. Phone apps can give that option; the Python wheel cannot, so a small C++ loader
(packed_cache.cpp) is compiled here against the wheel. Needs g++ and Linux. Prints one JSON object a row, each from a
process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")
CASES = ("heap, no cache", "heap, weight cache", "file, first start", "file, second start")


def main() -> None:
    """Measure the cases in processes of their own and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measure(given.bundle, given.case, given.work, given.context_tokens, given.decode)))
        return
    with tempfile.TemporaryDirectory(dir=given.bundle.parent) as scratch:
        build(Path(scratch))
        for case in CASES:
            command = [sys.executable, __file__, str(given.bundle), "--case", case, "--work", scratch]
            command += ["--context-tokens", str(given.context_tokens), "--decode", str(given.decode)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            print(done.stdout.strip(), flush=True)


def wheel() -> Path:
    """Where executorch is installed."""
    return Path(sysconfig.get_paths()["platlib"]) / "executorch"


def runtime_library() -> Path:
    """The runtime's extension module, which exports the C++ API."""
    return next((wheel() / "extension" / "pybindings").glob("_portable_lib*.so"))


def build(folder: Path) -> None:
    """Compile the loader against the wheel's headers and library."""
    include = wheel() / "include"
    core = include / "executorch" / "runtime" / "core" / "portable_type" / "c10"
    library = runtime_library()
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    command += [f"-I{include}", f"-I{core}", str(SOURCE), str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", str(folder / "loader.so")], check=True)


def memory() -> dict[str, int]:
    """Resident megabytes of this process: its heap, its files, of them dirty, and the highest so far."""
    kinds = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file", "VmHWM": "peak"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in kinds:
            found[kinds[key]] = int(value.split()[0]) * 1024
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Dirty", "Shared_Dirty")):
            found["dirty"] = found.get("dirty", 0) + int(line.split()[1]) * 1024
    return {key: round(value / 1e6) for key, value in found.items()}


def measure(bundle: Path, case: str, work: Path, prompt: int, decode: int) -> dict[str, Any]:
    """Load a bundle in this process, run it, and say what memory it took."""
    from export.executorch_runtime import load_kernels

    load_kernels()
    loader = ctypes.CDLL(str(work / "loader.so"))
    loader.load_pte.restype = ctypes.c_void_p
    loader.load_pte.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    loader.step_pte.restype = ctypes.c_int64
    loader.step_pte.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p]
    cache = str(work / "packed.bin") if case.startswith("file") else ""
    before = memory()
    began = time.perf_counter()
    path = bundle / "model.pte"
    model = loader.load_pte(str(path).encode(), cache.encode(), case != CASES[0])
    if not model:
        raise SystemExit(f"cannot load {path}")
    row: dict[str, Any] = {"case": case, "load_s": round(time.perf_counter() - began, 2), "before_mb": before}
    row["loaded_mb"] = memory()
    best, ids = ctypes.c_int64(), (ctypes.c_int64 * prompt)(*range(3, 3 + prompt))
    tokens = []
    for position in range(prompt - 1, prompt + decode):
        count = prompt if position < prompt else 1
        if loader.step_pte(model, ids, count, 0 if count > 1 else position, ctypes.byref(best)) < 0:
            raise SystemExit("cannot run it")
        tokens.append(best.value)
        ids[0] = best.value
        if position < prompt:
            began = time.perf_counter()
    row["decode_tokens_per_s"] = round(decode / (time.perf_counter() - began), 2)
    size = path.stat().st_size
    row |= {"used_mb": memory(), "file_mb": round(size / 1e6), "cache_mb": 0, "tokens": tokens[:8]}
    if cache and os.path.exists(cache):
        row["cache_mb"] = round(os.path.getsize(cache) / 1e6)
    row["loaded_rss_over_file"] = round(row["loaded_mb"]["rss"] * 1e6 / size, 3)
    row["peak_rss_over_file"] = round(row["used_mb"]["peak"] * 1e6 / size, 3)
    return row


if __name__ == "__main__":
    main()
