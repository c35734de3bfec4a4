"""The accuracy gate: whether a model lost more than is allowed against a baseline, and how sure that is.

Documents are drawn again with replacement, both models' scores on a document together (the paired bootstrap; Efron
and Tibshirani 1993, chapter 13; for language models Koehn 2004), so what both find hard cancels. Each figure gets the
interval that holds the given share of the resampled values, widened for few documents (Hesterberg 2015, "What
Teachers Should Know About the Bootstrap", section 5.2, the expanded percentile interval). The rule:

- failed: the whole interval lies above the limit, so the loss is certain;
- passed: the whole interval lies at or below it;
- undecided: the limit lies inside. This passes with a warning, because noise alone would otherwise stop a build; more
  text decides. `undecided = "fail"` in gate.toml turns it round.

Drift asks whether it is the same model, and catches what quality does not show: one layer's scales off by 2% moved the
perplexity of two int4 models by 0.03 to 0.4%, which no text of a sensible size tells from chance, and their
distributions by KL 0.0001 to 0.0016. Run in float the same weights give the same numbers to about 1e-9, so
`max_drift` is far below that. It holds for two bundles too that the same versions made and run on the same kind of
machine: then equal weights give equal bits. Elsewhere int8 activations of phone runtimes flip codes at rounding
borders when an input moves by float32's last bit: that floor is 0.000001 to 0.0004, and from float to int8 0.00003 to
0.0007, so `max_runtime_drift` is wider, and worth lowering where a model's own floor is known. Figures: docs/gate.md.

Legend: N units of text, R resamples, C columns that are added up over units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nano.baseline import Baseline, Unit
from nano.errors import RequestError
from nano.gate.limits import Limits

Floats = npt.NDArray[np.float64]
Columns = dict[str, Floats]
MIN_UNITS = 10
"""Fewer units say nothing about other text."""
WORST = 3
_CHUNK = 4_000_000
_NO_KL = 1e-6
"""Nats a token below which a baseline is its own reference, run or stored, and a rise of its KL has no meaning."""


@dataclass(frozen=True)
class Verdict:
    """One figure, judged.

    Attributes:
        name: of the figure.
        limit_name: its key in gate.toml.
        value: measured over all units: a loss, so more is worse.
        low, high: the interval.
        limit: what is allowed.
        confidence: of the interval.
        outcome: see the module's rule.
        sentence: all of it in words.
        before, after: the figure of the baseline and of the candidate, in words.
        worst: the units that lost most: (loss of the unit, in words; how it begins).
    """

    name: str
    limit_name: str
    value: float
    low: float
    high: float
    limit: float
    confidence: float
    outcome: Literal["passed", "failed", "undecided"]
    sentence: str
    before: str
    after: str
    worst: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Figure:
    """How a figure is computed from columns' sums, and put in words; see `Verdict`."""

    name: str
    limit_name: str
    columns: tuple[str, ...]
    value: Callable[[Columns], Floats]
    phrase: str
    other_phrase: str
    show: Callable[[float], str]
    unit_loss: Callable[[Columns], Floats]
    unit: str
    sides: tuple[Callable[[Columns], Floats] | None, Callable[[Columns], Floats]]
    side_show: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _nats(value: float) -> str:
    return f"{value:.3g}"


FIGURES = (
    _Figure(
        "perplexity", "max_perplexity_rise", ("tokens", "nll_b", "nll_c"),
        lambda s: np.expm1((s["nll_c"] - s["nll_b"]) / s["tokens"]),
        "perplexity rose", "perplexity's rise is", _percent, lambda u: u["nll_c"] - u["nll_b"], "nats less likely",
        (lambda s: np.exp(s["nll_b"] / s["tokens"]), lambda s: np.exp(s["nll_c"] / s["tokens"])), "{:.4f}".format,
    ),
    _Figure(
        "next-token accuracy", "max_accuracy_loss", ("tokens", "correct_b", "correct_c"),
        lambda s: (s["correct_b"] - s["correct_c"]) / s["tokens"],
        "next-token accuracy fell by", "next-token accuracy's loss is", _percent,
        lambda u: u["correct_b"] - u["correct_c"], "fewer tokens right",
        (lambda s: s["correct_b"] / s["tokens"], lambda s: s["correct_c"] / s["tokens"]), _percent,
    ),
    _Figure(
        "drift", "max_drift", ("tokens", "drift"),
        lambda s: s["drift"] / s["tokens"],
        *("the drift from the baseline in nats a token is",) * 2, _nats,
        lambda u: u["drift"] / u["tokens"], "nats a token of drift",
        (None, lambda s: s["drift"] / s["tokens"]), _nats,
    ),
    _Figure(
        "KL rise", "max_kl_rise", ("tokens", "kl_b", "kl_c"),
        lambda s: s["kl_c"] / np.maximum(s["kl_b"], 1e-12) - 1,
        "KL from the reference rose", "the rise of KL from the reference is", _percent,
        lambda u: u["kl_c"] - u["kl_b"], "nats of KL more",
        (lambda s: s["kl_b"] / s["tokens"], lambda s: s["kl_c"] / s["tokens"]), _nats,
    ),
    _Figure(
        "KL", "max_kl", ("tokens", "kl_c"),
        lambda s: s["kl_c"] / s["tokens"],
        *("KL from the reference in nats a token is",) * 2, _nats, lambda u: u["kl_c"], "nats of KL",
        (None, lambda s: s["kl_c"] / s["tokens"]), _nats,
    ),
    _Figure(
        "same most likely token", "min_top1", ("tokens", "same_c"),
        lambda s: 1 - s["same_c"] / s["tokens"],
        *("the share of positions with another most likely token than the reference's is",) * 2, _percent,
        lambda u: u["tokens"] - u["same_c"], "positions differ",
        (None, lambda s: s["same_c"] / s["tokens"]), _percent,
    ),
)  # fmt: skip


def judge(baseline: Baseline, candidate: Baseline, limits: Limits) -> list[Verdict]:
    """Every figure that both sides have and that has a limit, in the order of FIGURES; tokens first.

    Where the text falls into another number of tokens, that alone is judged.

    Raises:
        RequestError: fewer than MIN_UNITS units to compare; or other numbers of tokens, and `same_tokens` is off.
    """
    verdicts = [_same_tokens(baseline, candidate, limits)] if limits.same_tokens else []
    ours, theirs = baseline.units, candidate.units
    if [unit.tokens for unit in ours] != [unit.tokens for unit in theirs]:
        if verdicts:
            return verdicts
        raise RequestError(
            "The two cut the text into other numbers of tokens, so nothing can be compared.",
            found=f"{sum(unit.tokens for unit in ours):,} tokens in {len(ours)} documents or windows, and "
            f"{sum(unit.tokens for unit in theirs):,} in {len(theirs)}",
            todo="compare models with the same tokenizer, at a --sequence-length that both can hold",
        )
    if len(ours) < MIN_UNITS:
        raise RequestError(
            "There is too little text to judge by.", found=f"{len(ours)} documents or windows",
            expected=f"at least {MIN_UNITS}", todo="give more text, or raise --tokens",
        )  # fmt: skip
    direct = candidate.reference and candidate.reference["fingerprint"] == baseline.model["fingerprint"]
    columns = _columns(ours, theirs, bool(direct))
    drift = drift_limit(baseline, candidate)
    figures = [
        dataclasses.replace(figure, limit_name=drift) if figure.name == "drift" else figure
        for figure in FIGURES
        if figure.name != "drift" or drift
    ]
    wanted = [
        figure for figure in figures if _limit(limits, figure) is not None and set(figure.columns) <= set(columns)
    ]
    if "kl_b" in columns and columns["kl_b"].sum() <= _NO_KL * columns["tokens"].sum():
        wanted = [figure for figure in wanted if figure.limit_name != "max_kl_rise"]
    sums = resampled(columns, limits.resamples, limits.seed)
    whole = {name: values.sum(keepdims=True) for name, values in columns.items()}
    words = [unit.words for unit in theirs]
    return [*verdicts, *(_judged(figure, columns, whole, sums, words, limits) for figure in wanted)]


def drift_limit(baseline: Baseline, candidate: Baseline) -> str:
    """The limit that their drift is held against; "" where they are not meant to be the same model."""
    sides = (baseline, candidate)
    kinds = {side.model.get("kind") for side in sides}
    if len(kinds) == 2 and not kinds <= {"int4", "executorch", "onnx"}:
        return ""  # quantizing moves a model: what that may cost is for the other figures
    in_float = all(side.model.get("kind") in ("student", "int4") and side.activations == "float" for side in sides)
    runtime = baseline.model.get("runtime")
    return "max_drift" if in_float or (runtime and runtime == candidate.model.get("runtime")) else "max_runtime_drift"


def resampled(columns: Columns, resamples: int, seed: int) -> Columns:
    """Sums over N units drawn with replacement, R times: the same draws for every column.

    Args:
        columns: (N,) values by name.
        resamples: R.
        seed: of the draws.

    Returns:
        (R,) sums by name.
    """
    table_NC = np.stack(list(columns.values()), axis=1)
    n = len(table_NC)
    random = np.random.default_rng(seed)
    sums, step = [], max(_CHUNK // n, 1)
    for start in range(0, resamples, step):
        counts_RN = random.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        sums.append(counts_RN.astype(np.float64) @ table_NC)
    return dict(zip(columns, np.concatenate(sums).T, strict=True))


def interval(values_R: Floats, units: int, confidence: float) -> tuple[float, float]:
    """The expanded percentile interval of a figure's resampled values."""
    tail = expanded_tail((1 - confidence) / 2, units)
    low, high = np.quantile(values_R, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(tail: float, n: int) -> float:
    """The share to cut off each end so that percentiles of n units reach as far as Student's t would.

    t's quantile is Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5), right to 0.3% from n = 10 on.
    """
    normal = NormalDist()
    z, v = normal.inv_cdf(tail), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return normal.cdf(t * math.sqrt(n / (n - 1)))


def _limit(limits: Limits, figure: _Figure) -> float | None:
    limit: float | None = getattr(limits, figure.limit_name)
    return limit if limit is None or figure.limit_name != "min_top1" else 1 - limit


def _columns(ours: Sequence[Unit], theirs: Sequence[Unit], direct: bool) -> Columns:
    """(N,) values by name, of the baseline with _b and of the candidate with _c; what either lacks is left out.

    `direct`: the candidate's reference is the baseline, so its KL is the drift.
    """
    found: Mapping[str, list[float | None]] = {
        "tokens": [unit.tokens for unit in ours],
        **{f"{name}_b": [getattr(unit, name) for unit in ours] for name in ("nll", "correct", "kl", "same")},
        **{f"{name}_c": [getattr(unit, name) for unit in theirs] for name in ("nll", "correct", "kl", "same")},
    }
    columns = {name: np.array(values, np.float64) for name, values in found.items() if None not in values}
    change = columns["nll_c"] - columns["nll_b"]
    columns["drift"] = columns["kl_c"] if direct and "kl_c" in columns else change**2 / 2
    return columns


def _judged(
    figure: _Figure, columns: Columns, whole: Columns, sums: Columns, words: Sequence[str], limits: Limits
) -> Verdict:
    value = float(figure.value(whole)[0])
    low, high = interval(figure.value(sums), len(words), limits.confidence)
    limit = _limit(limits, figure)
    assert limit is not None
    outcome: Literal["passed", "failed", "undecided"] = "failed" if low > limit else "passed"
    if low <= limit < high:
        outcome = "undecided"
    show = figure.show
    relation = {"failed": "more than", "passed": "within", "undecided": "which may or may not be more than"}[outcome]
    phrase = figure.phrase if value > 0 else figure.other_phrase
    between = f"{100 * limits.confidence:.4g}% interval {show(low)} to {show(high)}"
    sentence = f"{phrase} {show(value)} ({between}), {relation} the {show(limit)} allowed"
    if outcome == "undecided":
        sentence += "; more text would decide"
    loss = figure.unit_loss(columns)
    order = np.argsort(-loss, kind="stable")[:WORST]
    worst = tuple((f"{loss[i]:.4g} {figure.unit}", words[i]) for i in order if loss[i] > 0)
    before, after = (None if side is None else figure.side_show(float(side(whole)[0])) for side in figure.sides)
    return Verdict(
        figure.name, figure.limit_name, value, low, high, limit, limits.confidence, outcome, sentence,
        before or "", after or "", worst,
    )  # fmt: skip


def _same_tokens(baseline: Baseline, candidate: Baseline, limits: Limits) -> Verdict:
    """Whether the text is the same ids to both: certain either way."""
    pairs = list(zip(baseline.units, candidate.units, strict=False))
    other = [theirs for ours, theirs in pairs if ours.ids != theirs.ids]
    share = 1.0 if len(baseline.units) != len(candidate.units) else len(other) / len(pairs)
    sentence = "the text is the same token ids to both"
    if share:
        count = f"{len(other)} of {len(pairs)} documents or windows"
        sentence = f"the text is other token ids in {count}: another tokenizer, or a shorter context"
    worst = tuple(("other ids", unit.words) for unit in other[:WORST])
    return Verdict(
        "tokens", "same_tokens", share, share, share, 0.0, limits.confidence, "failed" if share else "passed",
        sentence, "", "", worst,
    )  # fmt: skip


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """Plain data for `--json`."""
    return dataclasses.asdict(verdict)
