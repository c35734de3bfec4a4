"""Measure what bundles really take, fit the constants of the memory forecast, print its error.

    python benchmarks/footprint.py                     # measure the cases that fit a small machine, print the table
    python benchmarks/footprint.py --large             # and Nano-1 and Nano-2 at their true size
    python benchmarks/footprint.py --write             # and write the constants and benchmarks/footprint.md
    python benchmarks/footprint.py --cases 400M-2048   # some cases only
    python benchmarks/footprint.py --bundle FOLDER ... # predicted against measured for bundles of your own

Each case is a random int4 checkpoint of a real architecture, exported by nanokit itself and run as `nanokit check
--measure` does (`device_profiles.measure`), without a limit: a fresh process, its own runtime, a prompt, 16 tokens
decoded. What counts is anonymous memory over what Python and the libraries took before: what no phone can evict. Of a
long context the first positions are prefilled (`--prefill`), and memory of the size of the rest of the cache is written
instead; that this comes to the same was checked (tests/device_profiles/test_measure.py). The same few constants are
fitted over all cases of a runtime at once by least squares of the relative error; no case has a constant of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from device_profiles.check import bundle_facts
from device_profiles.footprint import CONSTANTS, RUNTIMES, BundleFacts, live_bytes, predict, runtime_constants
from device_profiles.measure import measure_bundle
from device_profiles.speed import PUBLISHED, PublishedSpeed, from_others
from nano.shapes import FULL, SLIDING, ModelShape

REPORT = Path(__file__).resolve().with_suffix(".md")


@dataclass(frozen=True)
class Case:
    """One shape at one context."""

    name: str
    shape: ModelShape
    context: int
    embedding: int
    large: bool = False
    kv_cache: str = "float"


@dataclass(frozen=True)
class Measured:
    """Peak anonymous bytes over the baseline of one bundle, beside its facts."""

    name: str
    facts: BundleFacts
    loaded: int
    peak: int


def _llama(v: int, d: int, f: int, layers: int, h: int, g: int, a: int) -> ModelShape:
    return ModelShape("llama", v, d, f, layers, h, g, a, True, 8192, (FULL,) * layers, None)


def _qwen3(v: int, d: int, f: int, layers: int, h: int, g: int, a: int) -> ModelShape:
    return ModelShape("qwen3", v, d, f, layers, h, g, a, True, 8192, (FULL,) * layers, None)


def _gemma3(v: int, d: int, f: int, layers: int, h: int, g: int, a: int, window: int = 512) -> ModelShape:
    kinds = tuple(FULL if i % 6 == 5 else SLIDING for i in range(layers))
    return ModelShape("gemma3_text", v, d, f, layers, h, g, a, True, 32768, kinds, window)


CASES = (
    Case("5M-512", _llama(4096, 256, 768, 6, 4, 2, 64), 512, 4),
    Case("22M-2048", _llama(8192, 384, 1024, 12, 6, 2, 64), 2048, 4),
    Case("60M-1024", _qwen3(16384, 512, 1536, 12, 8, 4, 64), 1024, 4),
    Case("100M-2048", _llama(32000, 768, 2048, 12, 12, 4, 64), 2048, 4),
    Case("100M-512-float", _llama(32000, 768, 2048, 12, 12, 4, 64), 512, 0),
    Case("170M-4096", _gemma3(65536, 768, 3072, 12, 4, 1, 128), 4096, 4),
    Case("400M-2048", _llama(32000, 1024, 4096, 24, 16, 4, 64), 2048, 4),
    Case("400M-512", _llama(32000, 1024, 4096, 24, 16, 4, 64), 512, 4),
    Case("400M-8192-int8", _llama(32000, 1024, 4096, 24, 16, 4, 64), 8192, 4, kv_cache="int8"),
    Case("nano-1-4096", _gemma3(262144, 1536, 8576, 30, 8, 1, 256), 4096, 4, large=True),
    Case("nano-2-8192", _gemma3(262144, 2048, 10752, 36, 8, 1, 256), 8192, 4, large=True),
)


def write_checkpoint(folder: Path, case: Case) -> None:
    """A random int4 folder with a tokenizer, as nanokit quantize would write it."""
    import torch

    from nano.families import EMBEDDING, HEAD, weight_shapes
    from quantize.grid import QuantizedTensor, bf16_exact
    from quantize.packed import quantization_config, write_int4

    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)

    def tensors() -> Iterator[tuple[str, Any]]:
        for name, size in weight_shapes(case.shape).items():
            if len(size) == 1:
                yield name, torch.ones(size)
            elif name.removesuffix(".weight") in (EMBEDDING, HEAD) and not case.embedding:
                yield name, torch.randn(size, generator=generator) * 0.02
            else:
                codes = torch.randint(-8, 8, size, generator=generator, dtype=torch.int8)
                # all different, as in a real model: ExecuTorch stores equal tensors once
                scales = bf16_exact(0.01 * (0.5 + torch.rand(size[0], size[1] // 32, generator=generator)))
                yield name, QuantizedTensor(codes, scales, 32, case.embedding or 4)

    gemma = case.shape.family == "gemma3_text"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    own = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": case.shape.head_dim}
    config = case.shape.to_hf({
        "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_bias": False,
        "rope_parameters": {FULL: rope, SLIDING: rope} if gemma else rope,
        **(own if gemma else {"hidden_act": "silu"}),
    })  # fmt: skip
    targets = ["Linear", "re:.*embed_tokens"] if case.embedding else ["Linear"]
    config["quantization_config"] = quantization_config({(4, 32): targets}, ["lm_head"])
    write_int4(folder, config, tensors())
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def measure_tokenizer(size: int) -> dict[str, int]:
    """Bytes of tokenizer.json with `size` merges, and of the same tokenizer loaded, in this process."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = list(alphabet), []
    known = set(words)
    for left in range(len(words) * len(alphabet)):
        if len(words) >= size:
            break
        a, b = words[left // len(alphabet)], alphabet[left % len(alphabet)]
        if a + b not in known:
            known.add(a + b)
            words.append(a + b)
            merges.append((a, b))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)).save(str(path))
        written = path.stat().st_size
        code = (
            "import sys; from tokenizers import Tokenizer; from device_profiles.worker import status; "
            "before = status()['RssAnon']; kept = Tokenizer.from_file(sys.argv[1]); "
            "print(status()['RssAnon'] - before)"
        )
        loaded = int(_python("-c", code, str(path)).strip())
    return {"file": written, "loaded": loaded}


def _python(*arguments: str) -> str:
    repo = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=repo, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def measure(name: str, folder: Path, prefill: int) -> Measured:
    """One bundle, in a process of its own."""
    facts = bundle_facts(folder)
    print(f"measuring {name} in {facts.runtime}", file=sys.stderr)
    tokens = prefill if prefill + 64 < facts.context else None
    found = measure_bundle(folder, facts, resident=None, dirty=None, tokens=tokens)
    return Measured(name, facts, found.phases[0].peak_anonymous - found.base, found.peak_dirty)


def build(case: Case, runtime: str, work: Path) -> Path:
    """The case's bundle, made where it is not there yet."""
    bundle, checkpoint = work / f"{case.name}-{runtime}", work / f"{case.name}-int4"
    if not bundle.exists():
        if not checkpoint.exists():
            write_checkpoint(checkpoint, case)
        print(f"exporting {case.name} to {runtime}", file=sys.stderr)
        arguments = ["--format", runtime, "--context", str(case.context), "--out", str(bundle), "--json"]
        arguments += ["--kv-cache", case.kv_cache] if case.kv_cache != "float" else []
        _python("-m", "nano", "export", str(checkpoint), *arguments)
    return bundle


def fit(rows: Sequence[Measured], tokenizer_per_byte: float) -> dict[str, float]:
    """The constants of one runtime: least squares of the relative error of the peak, scores kept or tiled."""
    peaks = np.array([row.peak for row in rows], float)
    known = np.array([r.facts.kv_cache_bytes + r.facts.logits_bytes + tokenizer_per_byte * r.facts.tokenizer_bytes for r in rows])  # noqa: E501  # fmt: skip
    best: tuple[float, float, Any] | None = None
    for scores in (0.0, 1.0):
        live = [live_bytes(r.facts.shape, r.facts.chunk, r.facts.context, scores) for r in rows]
        columns = np.array([[r.facts.packed_source_bytes, r.facts.float_head_bytes, x, 1.0] for r, x in zip(rows, live, strict=True)])  # noqa: E501  # fmt: skip
        solved = _nonnegative(columns / peaks[:, None], (peaks - known) / peaks)
        error = float(np.abs(columns @ solved + known - peaks).max())
        if best is None or error < best[0]:
            best = (error, scores, solved)
    assert best is not None
    packed, head, arena, base = (float(value) for value in best[2])
    return {
        "packed_per_byte": round(packed, 4), "head_per_byte": round(head, 4), "arena_per_byte": round(arena, 4),
        "scores": best[1], "tokenizer_per_byte": round(tokenizer_per_byte, 2), "base_bytes": round(base),
    }  # fmt: skip


def _nonnegative(columns: Any, wanted: Any) -> Any:
    """Least squares with no negative constant: a column that comes out negative is left out."""
    kept = list(range(columns.shape[1]))
    while True:
        part = np.linalg.lstsq(columns[:, kept], wanted, rcond=None)[0]
        if (part >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(np.argmin(part)))
    solved = np.zeros(columns.shape[1])
    solved[kept] = part
    return solved


def largest_error(rows: Sequence[Measured]) -> float:
    """Of the predicted peaks, relatively."""
    return max(abs(predict(row.facts).dirty / row.peak - 1) for row in rows)


def lines_of(rows: Sequence[Measured]) -> list[str]:
    """Predicted against measured, one line of a Markdown table a bundle."""
    found = []
    for row in rows:
        predicted = predict(row.facts).dirty
        shown = (row.facts.packed_source_bytes, row.facts.kv_cache_bytes, row.loaded, row.peak, predicted)
        size = row.facts.shape.num_parameters / 1e6
        cells = [row.name, row.facts.runtime, f"{size:,.0f}", f"{row.facts.context:,}", *(f"{value / 1e6:,.1f}" for value in shown)]  # noqa: E501  # fmt: skip
        found.append("| " + " | ".join([*cells, f"{predicted / row.peak - 1:+.1%}"]) + " |")
    return found


HEAD = """| case | runtime | M parameters | context | packed source | KV | after load | peak | predicted | error |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"""


def report(rows: Sequence[Measured]) -> str:
    """The table with how it was made, and what the speed forecast is held against."""
    speeds = [
        f"| {r.what} | {r.phone} | {r.bytes_per_token / 1e6:,.0f} | {r.tokens_per_second} | {r.efficiency:.0%} | "
        f"{_speed_error(r)} |"
        for r in PUBLISHED
    ]
    return "\n".join([
        "# Memory: predicted against measured",
        "",
        f"{_where()}. Anonymous memory (MB) over what Python and the libraries took.",
        f"Largest error {largest_error(rows):.1%}. Written by `python benchmarks/footprint.py --large --write`; the",
        "constants are fitted over all rows of a runtime.",
        "",
        HEAD,
        *lines_of(rows),
        "",
        "# Speed: forecast against published",
        "",
        "Each is forecast from the mean efficiency of the others on cores of its kind (`device_profiles/speed.py`).",
        "",
        "| model | phone | MB a token | tokens/s | of the bandwidth | error of the forecast |",
        "|---|---|--:|--:|--:|--:|",
        *speeds,
        "",
    ])  # fmt: skip


def _speed_error(row: PublishedSpeed) -> str:
    alike = [other for other in PUBLISHED if other.int8_products is row.int8_products]
    return "none to compare with" if len(alike) < 2 else f"{from_others(row, alike) / row.tokens_per_second - 1:+.1%}"


def write_constants(found: dict[str, dict[str, float]], errors: dict[str, float]) -> None:
    """device_profiles/_constants.toml: what was fitted, how far off it is, where and when."""
    measured = _where()
    kept: dict[str, dict[str, Any]] = {r: dataclasses.asdict(runtime_constants(r)) for r in RUNTIMES if r not in found}
    written = {r: {**constants, "error": round(errors[r], 4), "measured": measured} for r, constants in found.items()}
    lines = ["# Written by `python benchmarks/footprint.py --write`: measured, not chosen. Do not edit."]
    for runtime, constants in sorted({**kept, **written}.items()):
        lines += ["", f"[{runtime}]", *(f"{key} = {json.dumps(value)}" for key, value in constants.items())]
    CONSTANTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _where() -> str:
    packages = [p for p in ("torch", "executorch", "onnxruntime") if _version(p)]
    versions = ", ".join(f"{p} {_version(p)}" for p in packages)
    return f"{datetime.date.today()}, {platform.machine()} Linux, {versions}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, nargs="+", help="bundles to measure with the constants as they are")
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="which cases; default: the small")
    parser.add_argument("--large", action="store_true", help="Nano-1 and Nano-2 too: 16 GB of disk, 6 GB of memory")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--prefill", type=int, default=256, help="positions to prefill of a longer context")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanokit-footprint")
    parser.add_argument(
        "--write", action="store_true", help="fit, write device_profiles/_constants.toml and the report"
    )
    given = parser.parse_args()
    if given.bundle:
        print("\n".join([HEAD, *lines_of([measure(folder.name, folder, given.prefill) for folder in given.bundle])]))
        return
    cases = [c for c in CASES if (c.name in given.cases if given.cases else given.large or not c.large)]
    rows = {r: [measure(c.name, build(c, r, given.work), given.prefill) for c in cases if r == "executorch" or c.kv_cache == "float"] for r in given.runtimes}  # noqa: E501  # fmt: skip
    if given.write:
        sizes = [measure_tokenizer(size) for size in (32_000, 60_000)]
        per_byte = float(np.mean([size["loaded"] / size["file"] for size in sizes]))
        found = {runtime: fit(measured, per_byte) for runtime, measured in rows.items()}
        write_constants(found, dict.fromkeys(found, 0.0))
        runtime_constants.cache_clear()
        write_constants(found, {runtime: largest_error(measured) for runtime, measured in rows.items()})
    told = report([row for measured in rows.values() for row in measured])
    print(told)
    if given.write:
        REPORT.write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main()
