"""Parity: how a bundle, run by its own runtime, agrees with the dequantised model in torch on real text.

Phone kernels quantize activations to int8 as they run, so the bundle is held against torch twice: with that
quantization simulated (what should agree), and with float activations (what the quantization costs).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nano.corpus import cut_windows, read_documents
from nano.evaluate import score
from nano.lm import Activations, LanguageModel, generate, open_model

CONTINUATION = 32
PROMPT_TOKENS = 16


def measure_parity(
    folder: Path, int4: Path, data: Sequence[Path], *, tokens: int = 2048, sequence_length: int = 256
) -> dict[str, Any]:
    """Compare a bundle with its int4 folder.

    Args:
        folder: the bundle.
        int4: the int4 folder it was made of.
        data: text.
        tokens: how many tokens to predict.
        sequence_length: longest window.

    Returns:
        "tokens"; "simulated" and "float", each with kl, top1, logit_error, perplexity; "greedy": how many of
        the first 32 greedily chosen tokens after a real prompt agree with each.
    """
    bundle = open_model(folder)
    try:
        windows = cut_windows(read_documents(data), bundle.tokenizer, min(sequence_length, bundle.context), tokens)
        report: dict[str, Any] = {"tokens": windows.tokens, "activations": bundle.activations, "greedy": {}}
        prompt = bundle.tokenizer.decode(windows.ids[0][:PROMPT_TOKENS].tolist())
        ours = generate(bundle, prompt, CONTINUATION)
        against: tuple[tuple[str, Activations], ...] = (("simulated", bundle.activations), ("float", "float"))
        for name, activations in against:
            reference = open_model(int4, activations=activations)
            report[name] = score(bundle, windows, reference).as_dict()
            report["greedy"][name] = _agreeing(ours, reference, prompt)
            reference.close()
        return report
    finally:
        bundle.close()


def _agreeing(ours: list[int], reference: LanguageModel, prompt: str) -> dict[str, int]:
    """Length of the common beginning of two greedy continuations, and of the longer one."""
    theirs = generate(reference, prompt, CONTINUATION)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return {"same": same, "of": max(len(ours), len(theirs))}
