"""`nanokit compare` of scorecards: saved ones, or models that are asked now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.capabilities import Task
from nano.errors import RequestError
from nano.gate.cards import Change, changes_of, judge_cards, summary
from nano.gate.limits import Limits
from nano.lm import stage_of
from nano.scorecard_file import Asked, SavedCard, card_of, check_asked, check_same_questions, is_card, read_card

if TYPE_CHECKING:
    from nano.gate.verdicts import Verdict

SAME_KINDS = {"int4", "executorch", "onnx"}
"""Stages that hold the same codes: one of them is meant to answer as another does."""


@dataclass(frozen=True)
class ComparedCards:
    """Two scorecards that were judged; see `nano.gate.compare.Compared`."""

    baseline: SavedCard
    candidate: SavedCard
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    changes: tuple[Change, ...]
    seconds: float


def concerns_cards(paths: Sequence[Path], names: Sequence[str]) -> bool:
    """Whether tasks are compared rather than text."""
    return bool(names) or any(path.is_file() and is_card(path) for path in paths)


def compare_cards(
    baseline: Path, candidate: Path, asked: Asked, limits: Limits, named: frozenset[str]
) -> ComparedCards:
    """Read what is a file, ask what is a model, and judge.

    Args:
        baseline: a saved scorecard, or a model folder.
        candidate: the same.
        asked: the tasks, where a model is asked; a saved side's own where no names are given.
        limits: what may be lost.
        named: the keys that gate.toml gives.

    Raises:
        RequestError: the two cannot be compared; says what differs.
        BadFileError: a file or folder cannot be used.
    """
    started = time.monotonic()
    saved = [read_card(path) if path.is_file() else None for path in (baseline, candidate)]
    if None not in saved and (asked.names or asked.data or asked.limit):
        raise RequestError("Both sides are saved scorecards: nothing is asked.", found="--tasks, --task-data or --task-limit", todo="leave them out")  # noqa: E501  # fmt: skip
    known = saved[0] or saved[1]
    tasks: Sequence[Task] = ()
    if None in saved:
        asked = _as_saved(asked, known)
        tasks = asked.load()
        for path, side in zip((baseline, candidate), saved, strict=True):
            if side is None:
                stage_of(path)  # a folder that is no model is refused before the other one is asked
        if known is not None:
            check_asked(known, tasks)
    sides = [side or card_of(path, asked, tasks) for path, side in zip((baseline, candidate), saved, strict=True)]
    before, after = sides
    check_same_questions(before, after)
    flips = "max_flips" in named or meant_to_be_same(before, after)
    changes = changes_of(before, after)
    notes = [summary(changes, len(after.card.answers))]
    if len(after.card.capabilities) > 1:
        notes.append(f"the capabilities' intervals hold together with {100 * limits.confidence:.4g}%")
    if not flips:
        notes.append(
            "flips were not judged: the two are not meant to be the same; max_flips in the gate file judges them"
        )
    verdicts = judge_cards(before, after, limits, flips=flips)
    return ComparedCards(before, after, tuple(verdicts), tuple(notes), changes, time.monotonic() - started)


def meant_to_be_same(before: SavedCard, after: SavedCard) -> bool:
    """Whether one is meant to answer as the other does: the same stage, or stages that hold the same codes."""
    kinds = {str(side.model["kind"]) for side in (before, after)}
    return len(kinds) == 1 or kinds <= SAME_KINDS


def _as_saved(asked: Asked, known: SavedCard | None) -> Asked:
    """As the saved side was asked, where nothing else is said."""
    if known is None:
        return asked
    limit: Any = known.data["limit"] if asked.limit is None else asked.limit
    return Asked(asked.names or tuple(known.data["tasks"]), asked.data, limit)
