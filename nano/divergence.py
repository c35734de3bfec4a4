"""How far a model's next-token distributions lie from a reference's, token by token and in figures.

Figures that llama.cpp's `llama-perplexity --kl-divergence` prints too carry its names and follow its definitions
(tools/perplexity/perplexity.cpp): a mean's error is sqrt(var / (n - 1)) with the variance over n; percentiles are
interpolated linearly; the error of the perplexity ratio comes from the paired differences of log-probabilities,
Var(a - b) = Var(a) + Var(b) - 2 Cov(a, b), so what both models find hard cancels; the error of the root mean square
is that of the mean square over twice the root. Probabilities and shares are fractions here, where llama.cpp prints
per cent. Flips and the calibration error are not llama.cpp's.

Legend: T predicted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nano.lm import Logits

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]
KL_TAIL = {"90.0%": 0.9, "95.0%": 0.95, "99.0%": 0.99, "99.9%": 0.999}
DP_TAIL = {"99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "75.0%": 0.75, "25.0%": 0.25, "10.0%": 0.1,
           "5.0%": 0.05, "1.0%": 0.01, "0.1%": 0.001}  # fmt: skip
BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017 (arXiv:1706.04599), section 3."""


@dataclass(frozen=True)
class Figure:
    """A number and, where it is known, its standard error."""

    value: float
    error: float | None = None


@dataclass(frozen=True)
class TokenFigures:
    """What is known of each predicted token.

    Attributes:
        nll_T: negative log-likelihood of the right token under the model, nats.
        correct_T: whether the model's most likely token is the right one.
        confidence_T: probability of the model's most likely token.
        reference_nll_T: of the reference; None without one, and so are the following.
        reference_correct_T: of the reference.
        kl_T: KL(reference || model), nats.
        same_T: whether both have the same most likely token.
        top_T: the model's most likely token id; None where it is not kept.
        reference_top_T: of the reference, among the ids that both have.
    """

    nll_T: Floats
    correct_T: Flags
    confidence_T: Floats
    reference_nll_T: Floats | None = None
    reference_correct_T: Flags | None = None
    kl_T: Floats | None = None
    same_T: Flags | None = None
    top_T: Ids | None = None
    reference_top_T: Ids | None = None


def token_figures(ids: npt.NDArray[np.int64], logits: Logits, reference: Logits | None = None) -> TokenFigures:
    """The figures of one window.

    Args:
        ids: (T + 1,) token ids; row t of the logits predicts id t + 1.
        logits: (T + 1, V) of the model.
        reference: (T + 1, V') of the reference; the columns both have are compared.
    """
    target = ids[1:]
    log_p = log_softmax(logits[:-1])
    nll, top = -_picked(log_p, target), log_p.argmax(-1)
    correct, confidence = top == target, np.exp(_picked(log_p, top))
    if reference is None:
        return TokenFigures(nll, correct, confidence, top_T=top)
    width = min(logits.shape[-1], reference.shape[-1])
    log_q = log_softmax(reference[:-1, :width])
    common = log_p if width == logits.shape[-1] else log_softmax(logits[:-1, :width])
    theirs = log_q.argmax(-1)
    kl = (np.exp(log_q) * (log_q - common)).sum(-1)
    same = common.argmax(-1) == theirs
    return TokenFigures(nll, correct, confidence, -_picked(log_q, target), theirs == target, kl, same, top, theirs)


def joined(parts: Sequence[TokenFigures]) -> TokenFigures:
    """Several windows as one; all with a reference, or none."""

    def join(name: str) -> npt.NDArray[np.generic] | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else np.concatenate(found)

    return TokenFigures(**{name: join(name) for name in TokenFigures.__dataclass_fields__})  # type: ignore[arg-type]


def divergence(tokens: TokenFigures) -> dict[str, Figure]:
    """The figures by name: llama.cpp's where it prints them, then flips.

    Empty without a reference. An error is None where there is one token only.
    """
    if tokens.kl_T is None or tokens.reference_nll_T is None or tokens.same_T is None:
        return {}
    n = len(tokens.kl_T)
    found = {**_perplexities(tokens.nll_T, tokens.reference_nll_T), "Mean KLD": mean(tokens.kl_T)}
    found["Maximum KLD"] = Figure(float(tokens.kl_T.max()))
    for name, share in reversed(KL_TAIL.items()):
        found[f"{name} KLD"] = Figure(float(np.quantile(tokens.kl_T, share)))
    found["Median KLD"] = Figure(float(np.median(tokens.kl_T)))
    change = np.exp(-tokens.nll_T) - np.exp(-tokens.reference_nll_T)
    found["Mean Δp"] = mean(change)
    found["Maximum Δp"] = Figure(float(change.max()))
    for name, share in DP_TAIL.items():
        found[f"{name} Δp"] = Figure(float(np.quantile(change, share)))
    found["Median Δp"] = Figure(float(np.median(change)))
    found["Minimum Δp"] = Figure(float(change.min()))
    square = mean(change**2)
    root = math.sqrt(square.value)
    error = None if square.error is None else square.error / (2 * root) if root else 0.0
    found["RMS Δp"] = Figure(root, error)
    found["Same top p"] = _share(tokens.same_T)
    if tokens.reference_correct_T is not None:
        found["Flips"] = _share(tokens.correct_T != tokens.reference_correct_T)
    assert n == len(tokens.nll_T)
    return found


def calibration_error(tokens: TokenFigures) -> float:
    """Expected calibration error of the most likely token: mean over BINS equal bins of |accuracy - confidence|."""
    which = np.minimum((tokens.confidence_T * BINS).astype(np.int64), BINS - 1)
    gap = np.bincount(which, tokens.correct_T - tokens.confidence_T, minlength=BINS)
    return float(np.abs(gap).sum() / len(which))


def mean(values_T: Floats) -> Figure:
    """Mean and its standard error."""
    n = len(values_T)
    return Figure(float(values_T.mean()), math.sqrt(float(values_T.var()) / (n - 1)) if n > 1 else None)


def _share(flags_T: Flags) -> Figure:
    return mean(flags_T.astype(np.float64))


def _perplexities(nll_T: Floats, reference_T: Floats) -> dict[str, Figure]:
    ours, theirs, ratio = mean(nll_T), mean(reference_T), mean(nll_T - reference_T)
    a, b = math.exp(ours.value), math.exp(theirs.value)
    found = {"Mean PPL(Q)": Figure(a), "Mean PPL(base)": Figure(b), "Mean ln(PPL(Q)/PPL(base))": ratio}
    found["Mean PPL(Q)/PPL(base)"] = Figure(math.exp(ratio.value))
    found["Mean PPL(Q)-PPL(base)"] = Figure(a - b)
    if ours.error is None or theirs.error is None or ratio.error is None:
        return found
    found["Mean PPL(Q)"] = Figure(a, a * ours.error)
    found["Mean PPL(base)"] = Figure(b, b * theirs.error)
    found["Mean PPL(Q)/PPL(base)"] = Figure(math.exp(ratio.value), math.exp(ratio.value) * ratio.error)
    covariance = float(((nll_T - ours.value) * (reference_T - theirs.value)).mean()) / (len(nll_T) - 1)
    variance = (a * ours.error) ** 2 + (b * theirs.error) ** 2 - 2 * a * b * covariance
    found["Mean PPL(Q)-PPL(base)"] = Figure(a - b, math.sqrt(max(variance, 0.0)))
    if ours.error and theirs.error:
        found["Cor(ln(PPL(Q)), ln(PPL(base)))"] = Figure(covariance / (ours.error * theirs.error))
    return found


def _picked(table_TV: Floats, index_T: npt.NDArray[np.int64]) -> Floats:
    picked: Floats = np.take_along_axis(table_TV, index_T[:, None], axis=-1)[:, 0]
    return picked


def log_softmax(logits_TV: Logits) -> Floats:
    """(T, V) logits to log-probabilities in float64: KL of close models is a small difference of large numbers."""
    x = logits_TV.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    normalised: Floats = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return normalised
