"""The gate for scorecards: which capability lost, how much, how sure that is, and which answers changed.

Questions are drawn again with replacement, both models' answers to a question together, within each capability
(the paired bootstrap, as in `nano.gate.verdicts`, with its rule of failed, passed and undecided). The capabilities'
intervals hold together with the confidence asked for: each of K has 1 - (1 - confidence) / K (Bonferroni), else a card
of seven would fail every sixth build by chance.

A flip is a question that one model had right and the other wrong (Dutta et al. 2024, arXiv:2407.09141): two models can
have the same score and still not be the same. Of graded answers it is a score that changed by half or more.

Legend: N questions, R resamples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nano.errors import RequestError
from nano.gate.limits import Limits
from nano.gate.verdicts import Floats, Verdict, interval
from nano.scorecard import FLIP, Answer
from nano.scorecard_file import SavedCard

MIN_QUESTIONS = 10
"""Fewer questions say nothing about others."""
WORST = 5
MEAN, FLIPS = "mean of the capabilities", "flips"


@dataclass(frozen=True)
class Change:
    """A question that the two models answered differently.

    Attributes:
        task: that it is of.
        capability: of the task.
        label: the question.
        expected: the right answer.
        before, after: what either said.
        score_before, score_after: 0 to 1.
    """

    task: str
    capability: str
    label: str
    expected: str
    before: str
    after: str
    score_before: float
    score_after: float

    @property
    def flipped(self) -> bool:
        """Whether one had it right and the other wrong."""
        return abs(self.score_after - self.score_before) >= FLIP

    @property
    def words(self) -> str:
        """The question and both answers."""
        return f"{self.label} | expected: {self.expected} | before: {self.before} | after: {self.after}"


def changes_of(before: SavedCard, after: SavedCard) -> tuple[Change, ...]:
    """Every question whose answer or score is another, the largest losses first.

    Of a long answer its beginning and its score are compared.
    """
    found = [
        Change(
            ours.task, before.card.tasks[ours.task].capability, theirs.label, theirs.expected, ours.said, theirs.said,
            ours.score, theirs.score,
        )
        for ours, theirs in zip(before.card.answers, after.card.answers, strict=True)
        if (ours.said, ours.score) != (theirs.said, theirs.score)
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda change: change.score_after - change.score_before))


def judge_cards(before: SavedCard, after: SavedCard, limits: Limits, *, flips: bool) -> list[Verdict]:
    """Every capability that has a limit, their mean where there are several, and the flips.

    Args:
        before: the baseline.
        after: the candidate, asked the same questions.
        limits: what may be lost.
        flips: whether flips are judged; they are not where the candidate is meant to be another model.

    Raises:
        RequestError: a capability of fewer than MIN_QUESTIONS questions, or a limit for one that was not asked.
    """
    losses = _losses(before, after)
    _check(losses, limits)
    several = len(losses) > 1
    confidence = 1 - (1 - limits.confidence) / (len(losses) + several)
    changes = changes_of(before, after)
    means = [_resampled_mean(loss_N, limits, number) for number, loss_N in enumerate(losses.values())]
    ours, theirs = ({n: s.score for n, s in card.card.capabilities.items()} for card in (before, after))
    verdicts = []
    for (name, loss_N), mean_R in zip(losses.items(), means, strict=True):
        limit = limits.capabilities.get(name, limits.max_capability_loss)
        if limit is not None:
            span = interval(mean_R, len(loss_N), confidence)
            mine = [change for change in changes if change.capability == name]
            verdicts.append(_loss(name, ours[name], theirs[name], _Judged(span, limit, confidence), mine))
    if several and limits.max_score_loss is not None:
        span = interval(np.mean(means, axis=0), min(map(len, losses.values())), confidence)
        was, now = (sum(side.values()) / len(losses) for side in (ours, theirs))
        verdicts.append(_loss(MEAN, was, now, _Judged(span, limits.max_score_loss, confidence), changes))
    if flips and limits.max_flips is not None:
        verdicts.append(_flips(before, after, changes, limits))
    return verdicts


@dataclass(frozen=True)
class _Judged:
    """An interval against a limit."""

    span: tuple[float, float]
    limit: float
    confidence: float

    @property
    def outcome(self) -> Literal["passed", "failed", "undecided"]:
        low, high = self.span
        if low > self.limit:
            return "failed"
        return "undecided" if high > self.limit else "passed"

    @property
    def words(self) -> str:
        """The interval and how it lies to the limit."""
        low, high = (f"{bound:.1%}" for bound in self.span)
        relation = {"failed": "more than", "passed": "within", "undecided": "which may or may not be more than"}
        more = "; more questions would decide" if self.outcome == "undecided" else ""
        return (
            f"({100 * self.confidence:.4g}% interval {low} to {high}), {relation[self.outcome]} the {self.limit:.1%} "
            f"allowed{more}"
        )


def _losses(before: SavedCard, after: SavedCard) -> dict[str, Floats]:
    """Capability to (N,) score before less score after."""
    found: dict[str, list[float]] = {}
    for ours, theirs in zip(before.card.answers, after.card.answers, strict=True):
        found.setdefault(before.card.tasks[ours.task].capability, []).append(ours.score - theirs.score)
    return {name: np.array(values, np.float64) for name, values in found.items()}


def _check(losses: Mapping[str, Floats], limits: Limits) -> None:
    few = {name: len(loss_N) for name, loss_N in losses.items() if len(loss_N) < MIN_QUESTIONS}
    if few:
        raise RequestError(
            "There are too few questions to judge by.", found=", ".join(f"{name}: {n}" for name, n in few.items()),
            expected=f"at least {MIN_QUESTIONS} for a capability", todo="more tasks, or a higher --task-limit",
        )  # fmt: skip
    unknown = sorted(set(limits.capabilities) - set(losses))
    if unknown:
        raise RequestError(
            "The gate file has a limit for a capability that was not asked.", found=", ".join(unknown),
            expected=", ".join(losses), todo="add its tasks, or take the limit out",
        )  # fmt: skip


def _resampled_mean(values_N: Floats, limits: Limits, number: int) -> Floats:
    """(R,) means of N questions drawn again; each capability's draws are its own.

    How often each distinct value is drawn is multinomial too, and losses of right and wrong are -1, 0 and 1 only.
    """
    distinct, counts = np.unique(values_N, return_counts=True)
    n = len(values_N)
    drawn = np.random.default_rng((limits.seed, number)).multinomial(n, counts / n, size=limits.resamples)
    means_R: Floats = drawn @ distinct / n
    return means_R


def _loss(name: str, before: float, after: float, judged: _Judged, changes: Sequence[Change]) -> Verdict:
    """Of one capability, or of their mean."""
    value = before - after
    worst = [change for change in changes if change.score_after < change.score_before][:WORST]
    return Verdict(
        name, "max_score_loss" if name == MEAN else "max_capability_loss", value, *judged.span, judged.limit,
        judged.confidence, judged.outcome, f"{name} lost {value:.1%} {judged.words}", f"{before:.1%}", f"{after:.1%}",
        tuple((_scores(change), change.words) for change in worst),
    )  # fmt: skip


def _flips(before: SavedCard, after: SavedCard, changes: Sequence[Change], limits: Limits) -> Verdict:
    """How many questions flipped, over all capabilities."""
    pairs = zip(before.card.answers, after.card.answers, strict=True)
    flipped_N = np.array([float(_flipped(ours, theirs)) for ours, theirs in pairs])
    limit = limits.max_flips
    assert limit is not None
    value = float(flipped_N.mean())
    mean_R = _resampled_mean(flipped_N, limits, len(before.card.capabilities))
    judged = _Judged(interval(mean_R, len(flipped_N), limits.confidence), limit, limits.confidence)
    count = f"{int(flipped_N.sum())} of {len(flipped_N)} answers flipped between right and wrong"
    worst = tuple((_scores(change), change.words) for change in changes if change.flipped)[:WORST]
    return Verdict(
        FLIPS, "max_flips", value, *judged.span, limit, limits.confidence, judged.outcome,
        f"{count}, {value:.1%} {judged.words}", "", f"{value:.1%}", worst,
    )  # fmt: skip


def _flipped(ours: Answer, theirs: Answer) -> bool:
    return abs(ours.score - theirs.score) >= FLIP


def _scores(change: Change) -> str:
    return f"{change.task} {change.score_before:.2g} → {change.score_after:.2g}"


def summary(changes: Sequence[Change], questions: int) -> str:
    """How many answers changed, in one line."""
    lost = sum(change.flipped and change.score_after < change.score_before for change in changes)
    gained = sum(change.flipped for change in changes) - lost
    rest = len(changes) - lost - gained
    return f"{len(changes)} of {questions} answers changed: {lost} became wrong, {gained} became right, {rest} neither"


def as_dicts(changes: Sequence[Change]) -> list[dict[str, object]]:
    """Plain data for `--json`."""
    return [{**dataclasses.asdict(change), "flipped": change.flipped} for change in changes]
