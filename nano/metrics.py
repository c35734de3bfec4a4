"""How good a model's next-token distributions are, alone and against a reference's.

Perplexity is exp of the mean negative log-likelihood over predicted tokens. KL is KL(reference || model) per
token in nats, the divergence llama.cpp's `--kl-divergence` reports. Top-1 agreement is the share of positions
whose most likely token is the same. The relative logit error is ||a - b||_F / ||b||_F over all logits.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nano.lm import Logits


@dataclass(frozen=True)
class Scores:
    """Figures over some text.

    Attributes:
        perplexity: of the model.
        tokens: predicted tokens it is the mean over.
        reference_perplexity: of the reference, where there is one; so are the following.
        kl: mean KL(reference || model) in nats a token.
        kl_error: its standard error over tokens.
        top1: share of positions with the same most likely token, 0 to 1.
        logit_error: relative error of the logits.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    logit_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data; figures without a reference are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Meter:
    """Adds up one window after another; `scores` gives the figures so far."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll = self._reference_nll = 0.0
        self._kl = self._kl_squared = self._same = 0.0
        self._difference = self._magnitude = 0.0
        self._has_reference = False

    def add(self, ids: npt.NDArray[np.int64], logits: Logits, reference: Logits | None = None) -> None:
        """One window.

        Args:
            ids: (T,) token ids; row t of the logits predicts id t + 1.
            logits: (T, V) of the model.
            reference: (T, V') of the reference; the columns both have are compared.
        """
        log_p = log_softmax(logits[:-1])
        target = ids[1:, None]
        self.tokens += len(target)
        self._nll -= float(np.take_along_axis(log_p, target, axis=-1).sum())
        if reference is None:
            return
        self._has_reference = True
        width = min(logits.shape[-1], reference.shape[-1])
        ours, theirs = logits[:-1, :width], reference[:-1, :width]
        log_q = log_softmax(theirs)
        self._reference_nll -= float(np.take_along_axis(log_q, target, axis=-1).sum())
        kl_T = (np.exp(log_q) * (log_q - log_softmax(ours))).sum(-1)
        self._kl += float(kl_T.sum())
        self._kl_squared += float((kl_T**2).sum())
        self._same += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self._difference += float(((ours - theirs).astype(np.float64) ** 2).sum())
        self._magnitude += float((theirs.astype(np.float64) ** 2).sum())

    def scores(self) -> Scores:
        """The figures over everything added."""
        n = self.tokens
        perplexity = math.exp(self._nll / n)
        if not self._has_reference:
            return Scores(perplexity, n)
        mean = self._kl / n
        variance = max(self._kl_squared / n - mean**2, 0.0)
        return Scores(
            perplexity=perplexity,
            tokens=n,
            reference_perplexity=math.exp(self._reference_nll / n),
            kl=mean,
            kl_error=math.sqrt(variance / n),
            top1=self._same / n,
            logit_error=math.sqrt(self._difference / self._magnitude),
        )


def log_softmax(logits_TV: Logits) -> npt.NDArray[np.float64]:
    """(T, V) logits to log-probabilities in float64: KL of close models is a small difference of large numbers."""
    x = logits_TV.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    normalised: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return normalised
