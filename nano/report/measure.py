"""The divergence that a report tells: measured on text against a reference, and kept in the model's manifest.

`results.divergence` holds what was measured on what (by hash), the figures of `nano.divergence` by name, and the worst
flips: tokens that the reference has right and the model wrong, those first whose probability fell most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from nano.corpus import Ids, describe_data
from nano.divergence import TokenFigures
from nano.errors import RequestError
from nano.evaluate import EvaluateOptions, Measured, measure_folders, model_entry
from nano.tokens import TextTokenizer

FLIPS = 12
BEFORE = 48
"""Tokens that are decoded before a flip; `WORDS` characters of them are kept."""
WORDS = 120


def measure_divergence(
    folder: Path, reference: Path, data: Sequence[Path], options: EvaluateOptions | None = None
) -> dict[str, Any]:
    """Run a model and a reference over text: plain data for `results.divergence`.

    Args:
        folder: any stage's output.
        reference: what it is held against: the teacher, or what it was made of.
        data: text.
        options: on how much text.

    Raises:
        RequestError: other vocabularies, or the reference is the model.
        BadFileError: a folder or the text cannot be used.
    """
    options = options or EvaluateOptions()
    if folder.resolve() == reference.resolve():
        raise RequestError("The reference is the model itself.", found=str(reference), todo="name its teacher")
    return describe_divergence(measure_folders(folder, data, reference, options), reference, data, options)


def describe_divergence(
    measured: Measured, reference: Path, data: Sequence[Path], options: EvaluateOptions
) -> dict[str, Any]:
    """Plain data of what was measured against a reference."""
    scores = measured.scores
    known = {"sequence_length": options.sequence_length, "activations": options.activations}
    return {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "reference": model_entry(reference),
        "data": {**describe_data(data, tokens=scores.tokens), **known},
        **{name: value for name, value in scores.as_dict().items() if name not in ("kl", "kl_error", "top1")},
        "figures": {name: asdict(figure) for name, figure in (scores.divergence or {}).items()},
        **_flips(measured),
    }


def _flips(measured: Measured) -> dict[str, Any]:
    """How many tokens flipped either way, and the worst of those that were lost."""
    lost = gained = 0
    found: list[tuple[float, int, int]] = []
    for number, figures in enumerate(measured.figures):
        if figures.reference_correct_T is None or figures.reference_nll_T is None:
            return {}
        fallen = np.exp(-figures.reference_nll_T) - np.exp(-figures.nll_T)
        away = figures.reference_correct_T & ~figures.correct_T
        lost, gained = lost + int(away.sum()), gained + int((~figures.reference_correct_T & figures.correct_T).sum())
        found += [(float(fallen[t]), number, int(t)) for t in np.flatnonzero(away)]
    found.sort(key=lambda one: (-one[0], one[1:]))
    worst = _told(found, measured) if measured.figures and measured.figures[0].top_T is not None else ()
    return {"lost": lost, "gained": gained, "flips": list(worst)}


def _told(found: Sequence[tuple[float, int, int]], measured: Measured) -> Iterator[dict[str, Any]]:
    """The first flips with their text."""
    for _fallen, window, t in found[:FLIPS]:
        yield _flip(measured.windows.ids[window], measured.figures[window], t, measured.tokenizer)


def _flip(ids: Ids, figures: TokenFigures, t: int, tokenizer: TextTokenizer) -> dict[str, Any]:
    assert figures.reference_nll_T is not None
    assert figures.top_T is not None
    before = ids[max(0, t + 1 - BEFORE) : t + 1].tolist()
    told = tokenizer.decode(before)
    right, said = (tokenizer.decode([*before, int(one)])[len(told) :] for one in (ids[t + 1], figures.top_T[t]))
    return {
        "before": told[-WORDS:],
        "right": right,
        "said": said,
        "reference_p": round(float(np.exp(-figures.reference_nll_T[t])), 4),
        "right_p": round(float(np.exp(-figures.nll_T[t])), 4),
        "said_p": round(float(figures.confidence_T[t]), 4),
    }
