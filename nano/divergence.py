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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nano.lm import Logits

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]
KL_TAIL = {"90.0%": 0.9, "95.0%": 0.95, "99.0%": 0.99, "99.9%": 0.999}
DP_TAIL = {"99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "75.0%": 0.75, "25.0%": 0.25, "10.0%": 0.1,
           "5.0%": 0.05, "1.0%": 0.01, "0.1%": 0.001}  # fmt: skip
FAR = 20.0
"""log(p / q), less its mean, from where on an id may have no weight in float32; such a token's KL is float64's."""
_BLOCK = 1 << 14
"""Logits that are worked on at a time."""
BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017 (arXiv:1706.04599), section 3."""


@dataclass(frozen=True)
class Figure:
    """A number and, where it is known, its standard error.

    Attributes:
        value: the number.
        error: its standard error over tokens.
        estimated: whether it rests on a sample of the reference's distributions (`nano.reference`), not on all of them.
    """

    value: float
    error: float | None = None
    estimated: bool = False


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
        kl_variance_T: variance of kl_T where that is estimated from a sample of the reference; None where it is exact.
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
    kl_variance_T: Floats | None = None


def token_figures(ids: npt.NDArray[np.int64], logits: Logits, reference: Logits | None = None) -> TokenFigures:
    """The figures of one window.

    Args:
        ids: (T + 1,) token ids; row t of the logits predicts id t + 1.
        logits: (T + 1, V) of the model.
        reference: (T + 1, V') of the reference; the columns both have are compared.
    """
    target, width = ids[1:], logits.shape[-1]
    ours = distributions(logits[:-1])
    nll, correct = ours.nll(target), ours.top_T == target
    if reference is None:
        return TokenFigures(nll, correct, ours.confidence_T, top_T=ours.top_T)
    common = min(width, reference.shape[-1])
    theirs = distributions(reference[:-1, :common])
    ours_common = ours if common == width else distributions(logits[:-1, :common])
    return TokenFigures(
        nll, correct, ours.confidence_T, theirs.nll(target), theirs.top_T == target, _kl(theirs, ours_common),
        ours_common.top_T == theirs.top_T, ours.top_T, theirs.top_T,
    )  # fmt: skip


@dataclass(frozen=True)
class Distributions:
    """Rows of logits and what makes probabilities of them.

    Attributes:
        logits_TV: as given.
        top_T: the likeliest id of each row.
        high_T: its logit.
        log_total_T: log of the sum of exp(logit - high), to about 5e-8: its exponentials are float32.
    """

    logits_TV: Logits
    top_T: Ids
    high_T: Floats
    log_total_T: Floats

    @property
    def confidence_T(self) -> Floats:
        """Probability of each row's likeliest id."""
        found: Floats = np.exp(-self.log_total_T)
        return found

    def nll(self, id_T: Ids) -> Floats:
        """Negative log-probability of an id of each row."""
        return self.log_total_T - self.log_ratios(id_T[:, None])[:, 0]

    def log_ratios(self, id_TK: Ids) -> Floats:
        """log of the probability of some ids of each row over the likeliest one's."""
        picked: Floats = np.take_along_axis(self.logits_TV, id_TK, axis=-1).astype(np.float64)
        return picked - self.high_T[:, None]


def distributions(logits_TV: Logits) -> Distributions:
    """What makes probabilities of rows of logits, a few rows at a time so that they stay in the cache."""
    top_T = logits_TV.argmax(-1)
    high_T1 = np.take_along_axis(logits_TV, top_T[:, None], axis=-1)
    total_T = np.empty(len(logits_TV))
    for rows in _blocks(logits_TV):
        total_T[rows] = np.exp(logits_TV[rows] - high_T1[rows]).sum(-1, dtype=np.float64)
    return Distributions(logits_TV, top_T, high_T1[:, 0].astype(np.float64), np.log(total_T))


def _kl(theirs: Distributions, ours: Distributions) -> Floats:
    """KL(theirs || ours) of each row, (T,), to about a millionth of itself.

    With u = log(p / q) less its mean under q, KL = log(sum q e^u) = log(1 + sum q (e^u - 1 - u)). No term is negative,
    so float32 is enough however close the two are, where sum q log(q / p) would lose all its digits.
    """
    kl_T = np.empty(len(ours.top_T))
    for rows in _blocks(ours.logits_TV):
        q_TV = np.exp(theirs.logits_TV[rows] - theirs.high_T[rows, None].astype(np.float32))
        total_T1 = np.exp(theirs.log_total_T[rows])[:, None]
        u_TV = ours.logits_TV[rows] - theirs.logits_TV[rows]
        u_TV -= ((q_TV * u_TV).sum(-1, dtype=np.float64, keepdims=True) / total_T1).astype(np.float32)
        far_T = u_TV.max(-1) > FAR
        q_TV *= _exp_beyond_linear(np.minimum(u_TV, FAR, out=u_TV))
        kl_T[rows] = np.log1p((q_TV.sum(-1, dtype=np.float64, keepdims=True) / total_T1)[:, 0])
        for t in rows.start + np.flatnonzero(far_T):
            log_q, log_p = log_softmax(theirs.logits_TV[t]), log_softmax(ours.logits_TV[t])
            kl_T[t] = (np.exp(log_q) * (log_q - log_p)).sum()
    return kl_T


def _exp_beyond_linear(u: Logits) -> Logits:
    """e^u - 1 - u; near 0, where that cancels, by its series."""
    series = np.full_like(u, 1 / 5040)
    for divisor in (720, 120, 24, 6, 2):
        series *= u
        series += np.float32(1 / divisor)
    series *= u
    series *= u
    beyond = np.exp(u)
    beyond -= 1
    beyond -= u
    found: Logits = np.where(np.abs(u) < 0.5, series, beyond)
    return found


def _blocks(logits_TV: Logits) -> Iterator[slice]:
    step = max(1, _BLOCK // logits_TV.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits_TV), step))


def joined(parts: Sequence[TokenFigures]) -> TokenFigures:
    """Several windows as one; all with a reference, or none."""

    def join(name: str) -> npt.NDArray[np.generic] | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else np.concatenate(found)

    return TokenFigures(**{name: join(name) for name in TokenFigures.__dataclass_fields__})  # type: ignore[arg-type]


def divergence(tokens: TokenFigures) -> dict[str, Figure]:
    """The figures by name: llama.cpp's where it prints them, then flips.

    Empty without a reference. An error is None where there is one token only. Where the reference was sampled, those of
    KL are estimates: the mean is right on average, by the error that "Mean KLD sampling error" gives; the noise of
    single tokens widens the tail, so its upper percentiles and the maximum are rather too high.
    """
    if tokens.kl_T is None or tokens.reference_nll_T is None or tokens.same_T is None:
        return {}
    n = len(tokens.kl_T)
    found = {**_perplexities(tokens.nll_T, tokens.reference_nll_T), "Mean KLD": mean(tokens.kl_T)}
    found["Maximum KLD"] = Figure(float(tokens.kl_T.max()))
    for name, share in reversed(KL_TAIL.items()):
        found[f"{name} KLD"] = Figure(float(np.quantile(tokens.kl_T, share)))
    found["Median KLD"] = Figure(float(np.median(tokens.kl_T)))
    if tokens.kl_variance_T is not None:
        found |= {name: replace(one, estimated=True) for name, one in found.items() if name.endswith("KLD")}
        found["Mean KLD sampling error"] = Figure(math.sqrt(float(tokens.kl_variance_T.sum())) / n)
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


def log_softmax(logits_TV: Logits) -> Floats:
    """(T, V) logits to log-probabilities in float64: KL of close models is a small difference of large numbers."""
    x = logits_TV.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    normalised: Floats = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return normalised
