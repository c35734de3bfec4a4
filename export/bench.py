"""`nanokit bench`: how fast a bundle runs on this machine, and what memory it takes, each time in a fresh process.

Every repeat is a process that measures how fast memory can be read (`export.bench_worker`), then one that loads the
bundle, takes a prompt and decodes. Figures are medians over the repeats, with the least and the most.

Decoding reads every weight once a token, so its limit is the machine's rate of reading memory:

    fraction = tokens a second x bytes a token / bytes a second
    bytes a token = codes and scales of linears and head + float weights + the filled part of the cache

as the file holds them: a runtime that lays weights out larger has to read more, and that counts against it. The rate
is the best seen in the run, since other work on the machine can only lower it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from device_profiles.check import bundle_facts
from device_profiles.footprint import BundleFacts
from nano.errors import RequestError, WorkError, require_module
from nano.folder import human_bytes
from nano.manifest import Manifest, read_manifest
from nano.progress import track
from nano.shapes import SLIDING

PROMPT, DECODE, REPEAT = 256, 32, 3
TIMEOUT = 3600
LOADERS = {"executorch": "export.bench:prepare_executorch", "onnx": "export.bench:prepare_onnx"}
PACKAGES = {"executorch": "executorch", "onnx": "onnxruntime"}


@dataclass(frozen=True)
class Spread:
    """A figure over the repeats."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Bench:
    """What a bundle did on this machine.

    Attributes:
        runtime: name and version.
        machine: processor and operating system.
        date: ISO 8601.
        threads, prompt, decode, repeat: what was asked for (tokens, fresh processes).
        prefill, decoding: tokens a second.
        cpu_token: seconds of processor time, all threads together, that a decoded token costs.
        first_token, load: seconds, the model loaded and not.
        read_rate: bytes a second that memory can be read with by as many threads; the best of the run is the limit.
        token_bytes: that one token must read, half-way through the decoded ones.
        limit_fraction: of the limit that decoding reaches.
        file_bytes: of the model's files.
        baseline: resident bytes of the process before loading; subtracted from the rest.
        loaded, peak: resident bytes after loading, and the most there ever were.
        clean, dirty: of the fullest moment between phases; clean pages are the file's, the system may drop them.
    """

    runtime: str
    machine: str
    date: str
    threads: int
    prompt: int
    decode: int
    repeat: int
    prefill: Spread
    decoding: Spread
    cpu_token: Spread
    first_token: Spread
    load: Spread
    read_rate: Spread
    token_bytes: int
    limit_fraction: Spread
    file_bytes: int
    baseline: Spread | None
    loaded: Spread | None
    peak: Spread | None
    clean: Spread | None
    dirty: Spread | None


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_bench(
    folder: Path, *, threads: int = 0, prompt: int = PROMPT, decode: int = DECODE, repeat: int = REPEAT
) -> Bench:
    """Measure a bundle.

    Args:
        folder: the bundle.
        threads: of the runtime; 0 means all cores.
        prompt: tokens of the prompt, which is random; cut down to the bundle's context.
        decode: tokens decoded after it.
        repeat: fresh processes.

    Raises:
        BadFileError: not a bundle, or a file of it is missing or has changed its size.
        RequestError: numbers that make no sense, or a text that does not fit the context.
        MissingExtraError: the bundle's runtime is not installed.
        WorkError: a measured process failed.
    """
    facts, manifest = bundle_facts(folder), read_manifest(folder)
    prompt = _check(threads, prompt, decode, repeat, facts.context)
    version = getattr(require_module(PACKAGES[manifest.kind], manifest.kind), "__version__", "")
    threads = threads or available_threads()
    _warm(folder, manifest)
    request = {"task": "run", "loader": LOADERS[manifest.kind], "folder": str(folder.resolve()), "threads": threads,
               "prompt": prompt, "decode": decode, "vocabulary": manifest.shape["vocab_size"]}  # fmt: skip
    runs, rates = [], []
    with track("bench", repeat, "processes") as progress:
        for _ in range(repeat):
            rates.append(float(measure({"task": "read", "threads": threads})["bytes_per_second"]))
            runs.append(measure(request))
            progress.advance(note=f"{_rate(runs[-1]):.1f} tokens/s")
    token_bytes = bytes_a_token(facts, manifest.footprint, prompt + decode // 2)
    return Bench(
        runtime=f"{PACKAGES[manifest.kind]} {version or manifest.versions.get(PACKAGES[manifest.kind], '')}".strip(),
        machine=machine(),
        date=date.today().isoformat(),
        threads=threads,
        prompt=prompt,
        decode=decode,
        repeat=repeat,
        read_rate=_spread(rates),
        token_bytes=token_bytes,
        limit_fraction=_spread([_rate(run) * token_bytes / max(rates) for run in runs]),
        file_bytes=int(manifest.footprint["file_bytes"]),
        **summarise(runs, prompt),
    )


def _check(threads: int, prompt: int, decode: int, repeat: int, context: int) -> int:
    """Refuse numbers that make no sense; the prompt's length, cut down to what the context leaves."""
    for name, value, least in (("threads", threads, 0), ("context", prompt, 1), ("decode", decode, 1), ("repeat", repeat, 1)):  # noqa: E501  # fmt: skip
        if value < least:
            raise RequestError(f"--{name} is too small.", found=str(value), expected=f"at least {least}")
    if prompt + decode <= context:
        return prompt
    if prompt != PROMPT or decode >= context:
        raise RequestError(
            "The text does not fit the bundle's context.",
            found=f"--context {prompt} and --decode {decode}",
            expected=f"at most {context} together",
        )
    return context - decode


def bytes_a_token(facts: BundleFacts, footprint: Mapping[str, Any], position: int) -> int:
    """Bytes that decoding one token at a position must read: weights, and what its attention sees of the cache.

    Of the rotation tables, which bundles hold among their float weights, a token reads one row: they are left out.
    """
    shape = facts.shape
    element = {"float32": 4, "float16": 2}.get(str(footprint.get("kv_cache_dtype", "float32")), 1)
    window = shape.sliding_window or position
    seen = sum(min(position, window) if kind == SLIDING else position for kind in shape.layer_types)
    cache = 2 * element * seen * shape.num_kv_heads * shape.head_dim
    rotation = 4 * facts.context * shape.head_dim * len(set(shape.layer_types))
    floats = max(0, int(footprint["float_weight_bytes"]) - rotation)
    return facts.packed_source_bytes + facts.float_head_bytes + floats + cache


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker says to one request, in a process of its own.

    Raises:
        WorkError: it failed, was killed, or took more than an hour.
    """
    command = [sys.executable, "-m", "export.bench_worker", json.dumps(request)]
    threads = str(request["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "NANOKIT_THREADS": threads}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise WorkError("A measured process did not end.", found=f"still running after {TIMEOUT} s") from None
    if done.returncode:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"])[-1]
        killed = f"killed by signal {-done.returncode}; " if done.returncode < 0 else ""
        raise WorkError(
            "A measured process failed.",
            found=killed + last,
            todo="killed by signal 9 means that memory ran out" if done.returncode == -9 else None,
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def summarise(runs: Sequence[Mapping[str, Any]], prompt: int) -> dict[str, Any]:
    """Medians and spreads of what several runs said, by the names of `Bench`."""
    found: dict[str, Any] = {
        "prefill": _spread([prompt / run["prefill_seconds"] for run in runs]),
        "decoding": _spread([_rate(run) for run in runs]),
        "cpu_token": _spread([run["decode_cpu_seconds"] / len(run["decode_seconds"]) for run in runs]),
        "first_token": _spread([run["prefill_seconds"] for run in runs]),
        "load": _spread([run["load_seconds"] for run in runs]),
    }
    if any(run["baseline"] is None for run in runs):
        return {**found, **dict.fromkeys(("baseline", "loaded", "peak", "clean", "dirty"))}
    fullest = [max(run["phases"].values(), key=lambda phase: phase["rss"]) for run in runs]
    return {
        **found,
        "baseline": _spread([run["baseline"] for run in runs]),
        "loaded": _spread([run["phases"]["load"]["rss"] for run in runs]),
        "peak": _spread([run["peak"] for run in runs]),
        "clean": _spread([phase["clean"] for phase in fullest]),
        "dirty": _spread([phase["dirty"] for phase in fullest]),
    }


def _rate(run: Mapping[str, Any]) -> float:
    """Tokens a second of a run's decoding."""
    return float(len(run["decode_seconds"]) / sum(run["decode_seconds"]))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def _warm(folder: Path, manifest: Manifest) -> None:
    """Read the bundle's files once, so that no run waits for storage that another did not wait for."""
    for name in manifest.files:
        with (folder / name).open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def machine() -> str:
    """Processor, cores and operating system, for people."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = named[0] if named else name
    return f"{name}, {available_threads()} cores, {platform.system()} {platform.machine()}"


def prepare_onnx(folder: Path, threads: int) -> Callable[[], Any]:
    """Import what runs an ONNX bundle, open its tokenizer; a function that loads the model, NANOKIT_THREADS wide."""
    from export.onnx_files import check_files
    from export.onnx_runtime import open_onnx
    from nano.tokens import load_tokenizer

    require_module("onnxruntime", "onnx")
    check_files(folder)  # what it imports belongs to the baseline
    tokenizer = load_tokenizer(folder)
    return lambda: open_onnx(folder, tokenizer)


def prepare_executorch(folder: Path, threads: int) -> Callable[[], Any]:
    """Import what runs a .pte, open its tokenizer, size the runtime's thread pool; a function that loads the model."""
    from export.executorch_runtime import load_kernels, open_executorch, set_threads
    from export.silence import silenced
    from nano.tokens import load_tokenizer

    with silenced():
        load_kernels()
        set_threads(threads)
    tokenizer = load_tokenizer(folder)
    return lambda: open_executorch(folder, tokenizer)


def rows(bench: Bench) -> list[tuple[str, str, str]]:
    """The figures as rows for people: what, median with its unit, least to most."""

    def row(label: str, spread: Spread | None, unit: str, factor: float = 1.0) -> tuple[str, str, str]:
        if spread is None:
            return label, "not known here", ""
        median, least, most = (_figures(value * factor) for value in (spread.median, spread.least, spread.most))
        return label, f"{median} {unit}", f"{least} to {most}"

    def seconds(label: str, spread: Spread | None) -> tuple[str, str, str]:
        small = spread is not None and spread.median < 0.1
        return row(label, spread, "ms" if small else "s", 1e3 if small else 1)

    mib = 1 / (1 << 20)
    return [
        row(f"prefill of {bench.prompt} tokens", bench.prefill, "tokens/s"),
        row(f"decode of {bench.decode} tokens", bench.decoding, "tokens/s"),
        row(f"  of the limit, {human_bytes(bench.token_bytes)} a token", bench.limit_fraction, "%", 100),
        row("  processor time", bench.cpu_token, "ms a token", 1e3),
        row("memory read, the limit", bench.read_rate, "GB/s", 1e-9),
        seconds("time to first token", bench.first_token),
        seconds("load", bench.load),
        row("resident after load", bench.loaded, "MiB", mib),
        row(f"peak resident (file {human_bytes(bench.file_bytes)})", bench.peak, "MiB", mib),
        row("  clean: the file's pages", bench.clean, "MiB", mib),
        row("  dirty: cannot be dropped", bench.dirty, "MiB", mib),
    ]


def _figures(value: float) -> str:
    """Four figures, never with an exponent: 0.1234, 12.34, 16,180."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def as_dict(bench: Bench) -> dict[str, Any]:
    """Plain data for --json and the manifest."""
    return asdict(bench)
