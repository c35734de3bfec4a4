"""What evaluating a bundle costs over the runtime's own time for the same tokens.

    python benchmarks/evaluation.py BUNDLE... --data TEXT [--tokens 2048] [--rounds 7]

Each round runs the same windows twice, in turns: the bare runtime (its calls and nothing else, logits left where they
are) and `nano.evaluate.measure` (logits out, perplexity, accuracy, calibration). Times are CPU seconds of the process
with one thread, so that other work on the machine does not count; the ratio is the median over rounds of each
round's own. A bundle with `--logits last` is run token by token, one with `--logits all` in chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NANOKIT_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from nano.corpus import Windows, cut_windows, read_documents
from nano.evaluate import measure
from nano.lm import open_model


def calls(model: Any, windows: Windows) -> list[tuple[np.ndarray[Any, Any], int]]:
    """(ids, position) of every call that the windows take."""
    step = (model.chunk if model.chunk else 1) if model._all else 1
    found = []
    for window in windows.ids:
        size = len(window) if model._all and hasattr(model, "_binding") else step
        found += [(window[i : i + size], i) for i in range(0, len(window), size)]
    return found


def bare_onnx(model: Any, windows: Windows) -> Callable[[], None]:
    """ONNX Runtime's calls alone."""
    inputs = [(ids[None], np.ones((1, at + len(ids)), np.int64)) for ids, at in calls(model, windows)]

    def run() -> None:
        for ids_1T, mask in inputs:
            model._binding.bind_cpu_input("input_ids", ids_1T)
            model._binding.bind_cpu_input("attention_mask", mask)
            model._binding.bind_output("logits")
            model._session.run_with_iobinding(model._binding)

    return run


def bare_executorch(model: Any, windows: Windows) -> Callable[[], None]:
    """ExecuTorch's calls alone."""
    import torch

    inputs = [(torch.from_numpy(ids)[None], torch.tensor([at])) for ids, at in calls(model, windows)]

    def run() -> None:
        for one in inputs:
            model._forward(one)

    return run


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process for some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compared(bundle: Path, data: list[Path], tokens: int, rounds: int) -> dict[str, Any]:
    """The figures of one bundle."""
    model: Any = open_model(bundle)
    windows = cut_windows(read_documents(data), model.tokenizer, min(256, model.context), max_tokens=tokens)
    bare = (bare_onnx if hasattr(model, "_binding") else bare_executorch)(model, windows)
    bare()
    measure(model, windows)
    pairs = [(cpu_seconds(bare), cpu_seconds(lambda: measure(model, windows))) for _ in range(rounds)]
    ratios = sorted(ours / own for own, ours in pairs)
    return {
        "bundle": str(bundle), "logits": "all" if model._all else "last", "vocabulary": model.vocab_size,
        "tokens": windows.tokens,
        "runtime_us_a_token": 1e6 * statistics.median(own for own, _ in pairs) / windows.tokens,
        "evaluate_us_a_token": 1e6 * statistics.median(ours for _, ours in pairs) / windows.tokens,
        "ratio": statistics.median(ratios), "ratios": [round(ratio, 3) for ratio in ratios],
    }  # fmt: skip


def main() -> None:
    """Measure each bundle; a line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--data", action="append", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    for bundle in arguments.bundles:
        print(json.dumps(compared(bundle, arguments.data, arguments.tokens, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
