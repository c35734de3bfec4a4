"""Parity: how a bundle, run by its own runtime, agrees with the dequantised model in torch on real text.

Phone kernels quantize activations to int8 as they run, so the bundle is held against torch twice: with that
quantization simulated (what should agree), and with float activations (what the quantization costs).

How closely two correct implementations can agree has a floor: codes flip at rounding borders when an input moves
by float32's last bit, and later layers carry that on. The floor is measured in the same run, as the simulation
against itself with its embedding moved by 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nano.corpus import Ids, Windows, cut_windows, read_documents
from nano.evaluate import score
from nano.lm import Activations, LanguageModel, generate, open_model
from nano.manifest import read_manifest
from quantize.lm import jitter_embedding, open_int4_model

CONTINUATION = 32
PROMPT_TOKENS = 16
PREFIXES_PER_WINDOW = 4
LONGEST_EDGE = 4096
"""Positions up to which edges are tried; torch's attention over more takes gigabytes."""
FLOOR_JITTER = 1e-7
"""float32's unit roundoff is 6e-8: the size of differences that the order of additions alone makes."""


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
        "tokens"; "simulated" and "float", each with kl, top1, logit_error, perplexity; "floor": the same figures
        of the simulation against itself after a change of 1e-7 (int8 activations only); "greedy": how many of
        the first 32 greedily chosen tokens after a real prompt agree with each; "prefill": the same figures
        for prompts taken in chunks, their lengths around the chunk's border among them; "edges": a token decoded just
        past the sliding window, and at the last position of the context, each with its position, logit_error, same_top.
    """
    bundle = open_model(folder)
    try:
        windows = cut_windows(read_documents(data), bundle.tokenizer, min(sequence_length, bundle.context), tokens)
        report: dict[str, Any] = {
            "tokens": windows.tokens,
            "activations": bundle.activations,
            "greedy": {},
            "prefill": {},
            "edges": {},
        }
        prompt = bundle.tokenizer.decode(windows.ids[0][:PROMPT_TOKENS].tolist())
        ours = generate(bundle, prompt, CONTINUATION)
        against: tuple[tuple[str, Activations], ...] = (("simulated", bundle.activations), ("float", "float"))
        manifest = read_manifest(folder)
        chunk = int(manifest.footprint["chunk"])
        edges = _edge_positions(bundle.context, manifest.shape.get("sliding_window"))
        for name, activations in against:
            reference = open_model(int4, activations=activations)
            report["prefill"][name] = _prefill_agreement(bundle, reference, windows, chunk)
            report[name] = score(bundle, windows, reference).as_dict()
            report["greedy"][name] = _agreeing(ours, reference, prompt)
            report["edges"][name] = {edge: _at_edge(bundle, reference, windows, at) for edge, at in edges.items()}
            reference.close()
        if bundle.activations != "float":
            report["floor"] = _noise_floor(int4, bundle.activations, windows)
        return report
    finally:
        bundle.close()


def _noise_floor(int4: Path, activations: Activations, windows: Windows) -> dict[str, Any]:
    """The simulation against itself, its embedding moved by float32's last bit."""
    reference, moved = (open_int4_model(int4, activations) for _ in range(2))
    jitter_embedding(moved, FLOOR_JITTER)
    return score(moved, windows, reference).as_dict()


def _prefill_agreement(
    bundle: LanguageModel, reference: LanguageModel, windows: Windows, chunk: int
) -> dict[str, float]:
    """Logits after whole prompts of several lengths, against the reference's rows at those positions."""
    difference = magnitude = 0.0
    same = count = 0
    for window in windows.ids[:8]:
        rows = reference.logits([window])[0]
        for length in _prefix_lengths(window, chunk):
            ours, theirs = bundle.prefill(window[:length].tolist()), rows[length - 1]
            difference += float(((ours - theirs).astype(np.float64) ** 2).sum())
            magnitude += float((theirs.astype(np.float64) ** 2).sum())
            same += int(ours.argmax() == theirs.argmax())
            count += 1
    return {"prompts": count, "top1": same / count, "logit_error": (difference / magnitude) ** 0.5}


def _prefix_lengths(window: Ids, chunk: int) -> list[int]:
    """Lengths to try: around the chunk's border where the window reaches it, its end, and some between."""
    wanted = {
        2,
        chunk - 1,
        chunk,
        chunk + 1,
        len(window),
        *range(1, len(window), len(window) // PREFIXES_PER_WINDOW + 1),
    }
    return sorted(n for n in wanted if 1 <= n <= len(window))


def _edge_positions(context: int, window: int | None) -> dict[str, int]:
    """Lengths of text whose last token stands at an edge; those that torch cannot follow are left out."""
    edges = {"context": context} if window is None else {"window": window + 1, "context": context}
    return {name: length for name, length in edges.items() if 2 <= length <= min(context, LONGEST_EDGE)}


def _at_edge(bundle: LanguageModel, reference: LanguageModel, windows: Windows, length: int) -> dict[str, Any]:
    """Agreement on the last of `length` tokens, decoded behind the others; the text is repeated until it is so long."""
    text = np.resize(np.concatenate(windows.ids), length).tolist()
    rows = []
    for model in (bundle, reference):
        model.prefill(text[:-1])
        rows.append(model.decode(text[-1]).astype(np.float64))
    ours, theirs = rows
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    return {"position": length - 1, "logit_error": error, "same_top": bool(ours.argmax() == theirs.argmax())}


def _agreeing(ours: list[int], reference: LanguageModel, prompt: str) -> dict[str, int]:
    """Length of the common beginning of two greedy continuations, and of the longer one."""
    theirs = generate(reference, prompt, CONTINUATION)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return {"same": same, "of": max(len(ours), len(theirs))}
