"""How good a model's next-token distributions are, alone and against a reference's.

Perplexity is exp of the mean negative log-likelihood over predicted tokens. KL is KL(reference || model) per
token in nats, the divergence llama.cpp's `--kl-divergence` reports. Top-1 agreement is the share of positions
whose most likely token is the same. The relative logit error is ||a - b||_F / ||b||_F over all logits. Tails and
errors are in `nano.divergence`.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nano.divergence import Figure, TokenFigures, calibration_error, divergence, joined, log_softmax, token_figures
from nano.lm import Logits

__all__ = ["Meter", "Scores", "log_softmax"]


@dataclass(frozen=True)
class Scores:
    """Figures over some text.

    Attributes:
        perplexity: of the model.
        tokens: predicted tokens it is the mean over.
        reference_perplexity: of the reference, where there is one; so are the following.
        kl: mean KL(reference || model) in nats a token.
        kl_error: its standard error over tokens.
        kl_sampling_error: the part of it that a stored reference's sample brings; None where the reference was run.
        top1: share of positions with the same most likely token, 0 to 1.
        logit_error: relative error of the logits; None against a stored reference.
        accuracy: share of tokens that the model finds the most likely, 0 to 1.
        calibration_error: of the model's most likely token, 0 to 1.
        divergence: figures against the reference by name, see `nano.divergence`.
    """

    perplexity: float
    tokens: int
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    kl_sampling_error: float | None = None
    top1: float | None = None
    logit_error: float | None = None
    accuracy: float | None = None
    calibration_error: float | None = None
    divergence: dict[str, Figure] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, one number each; figures without a reference are left out, and so are the tails."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "divergence"}

    def full_dict(self) -> dict[str, Any]:
        """The same with "divergence": name to {"value", "error"}, where there is a reference."""
        tails = {name: asdict(figure) for name, figure in (self.divergence or {}).items()}
        return {**self.as_dict(), **({"divergence": tails} if tails else {})}


class Meter:
    """Takes one window after another; `scores` gives the figures so far.

    Attributes:
        windows: the token figures of each window, in order.
        tokens: predicted tokens so far.
    """

    def __init__(self) -> None:
        self.windows: list[TokenFigures] = []
        self.tokens = 0
        self._nll = self._difference = self._magnitude = 0.0

    def add(self, ids: npt.NDArray[np.int64], logits: Logits, reference: Logits | None = None) -> None:
        """One window.

        Args:
            ids: (T,) token ids; row t of the logits predicts id t + 1.
            logits: (T, V) of the model.
            reference: (T, V') of the reference; the columns both have are compared.
        """
        self.take(token_figures(ids, logits, reference))
        if reference is not None:
            width = min(logits.shape[-1], reference.shape[-1])
            for ours, theirs in zip(logits[:-1, :width], reference[:-1, :width], strict=True):
                gap = ours - theirs
                self._difference += float(np.vdot(gap, gap))
                self._magnitude += float(np.vdot(theirs, theirs))

    def take(self, figures: TokenFigures) -> None:
        """One window whose figures are known."""
        self.windows.append(figures)
        self.tokens += len(figures.nll_T)
        self._nll += float(figures.nll_T.sum())

    @property
    def perplexity(self) -> float:
        """The model's perplexity so far."""
        return math.exp(self._nll / self.tokens)

    def scores(self) -> Scores:
        """The figures over everything added."""
        tokens = joined(self.windows)
        scores = Scores(
            self.perplexity,
            self.tokens,
            accuracy=float(tokens.correct_T.mean()),
            calibration_error=calibration_error(tokens),
        )
        found = divergence(tokens)
        if not found:
            return scores
        return replace(
            scores,
            reference_perplexity=found["Mean PPL(base)"].value,
            kl=found["Mean KLD"].value,
            kl_error=found["Mean KLD"].error,
            kl_sampling_error=found["Mean KLD sampling error"].value if "Mean KLD sampling error" in found else None,
            top1=found["Same top p"].value,
            logit_error=math.sqrt(self._difference / self._magnitude) if self._magnitude else None,
            divergence=found,
        )
