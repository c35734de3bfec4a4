"""The ladder: what each version of a model still knows of each capability, as a share of the full model's score.

Drawn as Gemini's report draws its Nano models (arXiv:2312.11805, figure 3): a group of bars a capability, in it a bar
a version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.scorecard import CapabilityScore

if TYPE_CHECKING:
    from rich.table import Table

Scores = Mapping[str, CapabilityScore]
STAGES = {"student": "float", "int4": "int4", "executorch": ".pte", "onnx": "onnx"}
"""What a stage is called in a narrow column."""
RUNTIMES = ("executorch", "onnx")
WIDEST = 8
"""Characters of a heading's line."""
HUES = ((37, 99, 201), (194, 87, 12), (27, 128, 84), (124, 58, 166))
FADED = 0.6
"""How far the last stage's colour is from its student's towards white."""


@dataclass(frozen=True)
class Rung:
    """One version of a model.

    Attributes:
        student: whose.
        stage: "student", "int4", "executorch" or "onnx".
        scores: capability to score.
    """

    student: str
    stage: str
    scores: Scores


@dataclass(frozen=True)
class Ladder:
    """A full model's scores and those of all that was made of it.

    Attributes:
        teacher: capability to score of the full model.
        rungs: in the order in which they were made.
    """

    teacher: Scores
    rungs: tuple[Rung, ...]

    @property
    def capabilities(self) -> tuple[str, ...]:
        """In the order of the tasks."""
        return tuple(self.teacher)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        rungs = [
            {
                "student": rung.student,
                "stage": rung.stage,
                "of_teacher": {n: s.of_teacher for n, s in rung.scores.items()},
            }
            for rung in self.rungs
        ]
        teacher = {name: score.score for name, score in self.teacher.items()}
        return {"teacher": teacher, "rungs": rungs, "apart": [apart.as_dict() for apart in disagreements(self)]}


@dataclass(frozen=True)
class Apart:
    """A capability of which a runtime's score differs from torch's by more than either's error."""

    student: str
    stage: str
    capability: str
    torch: float
    runtime: float
    error: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def disagreements(ladder: Ladder) -> tuple[Apart, ...]:
    """Where a bundle in its runtime and the same codes in torch are further apart than the larger standard error."""
    found = []
    torch = {rung.student: rung.scores for rung in ladder.rungs if rung.stage == "int4"}
    for rung in ladder.rungs:
        if rung.stage not in RUNTIMES or rung.student not in torch:
            continue
        for name, theirs in rung.scores.items():
            ours = torch[rung.student][name]
            error = max(ours.error or 0.0, theirs.error or 0.0, 1 / theirs.questions)
            if abs(ours.score - theirs.score) > error + 1e-9:
                found.append(Apart(rung.student, rung.stage, name, ours.score, theirs.score, error))
    return tuple(found)


def ladder_table(ladder: Ladder) -> Table:
    """The ladder as a table of at most 80 columns: shares of the teacher, whose own scores stand above them."""
    from rich import box
    from rich.table import Table

    table = Table(title="What is left of each capability, as a share of the teacher's score", title_justify="left",
                  box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)  # fmt: skip
    table.add_column("")
    for name in (*ladder.capabilities, "mean"):
        table.add_column(heading(name), justify="right", no_wrap=True)
    own = [score.score for score in ladder.teacher.values()]
    table.add_row("teacher", *(f"{value:.0%}" for value in (*own, sum(own) / len(own))), end_section=True)
    last = ""
    for rung in ladder.rungs:
        if rung.student != last:
            table.add_row(rung.student)
        last = rung.student
        shares = [rung.scores[name].of_teacher for name in ladder.capabilities]
        known = [share for share in shares if share is not None]
        cells = ["–" if share is None else f"{share:.0%}" for share in shares]
        table.add_row(f"  {STAGES[rung.stage]}", *cells, f"{sum(known) / len(known):.0%}" if known else "–")
    errors = [100 * s.error for rung in ladder.rungs for s in rung.scores.values() if s.error]
    table.caption = f"the teacher's own row: answers that are right, of {_questions(ladder)} each"
    if errors:
        table.caption += f"; standard errors up to {max(errors):.0f}%"
    return table


def agreement(ladder: Ladder) -> str:
    """One line for people on whether torch and the runtimes give the same scores."""
    apart = disagreements(ladder)
    if not apart:
        return "torch, ExecuTorch and ONNX Runtime agree within the error on every capability"
    told = (
        f"{a.student}/{a.stage} {a.capability} {a.runtime:.0%} (torch {a.torch:.0%}, ±{a.error:.0%})" for a in apart
    )
    return "further from torch's int4 than the error: " + ", ".join(told)


def heading(name: str) -> str:
    """A capability's name in lines of at most WIDEST characters: cut at its hyphens, a longer word in equal pieces."""
    lines = []
    for word in name.split("-"):
        pieces = math.ceil(len(word) / WIDEST) if len(word) > WIDEST else 1
        size = math.ceil(len(word) / pieces)
        cut = [word[i : i + size] for i in range(0, len(word), size)]
        lines += [piece + "-" for piece in cut[:-1]] + cut[-1:]
    return "\n".join(lines)


def _questions(ladder: Ladder) -> str:
    counts = sorted({score.questions for score in ladder.teacher.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def draw_ladder(ladder: Ladder, path: Path) -> None:
    """Grouped bars as a PNG: a group a capability, a colour a student, its stages from dark to light."""
    from nano.figure import INK, MUTED, blank_figure, quiet

    figure = blank_figure((11, 4.2), 110)
    panel = figure.add_subplot()
    quiet(panel)
    names, width = ladder.capabilities, 0.84 / max(1, len(ladder.rungs))
    for number, (rung, colour) in enumerate(zip(ladder.rungs, _colours(ladder.rungs), strict=True)):
        at = [group - 0.42 + width * (number + 0.5) for group in range(len(names))]
        shares = [100 * (rung.scores[name].of_teacher or 0.0) for name in names]
        errors = [_error_of_share(rung.scores[name]) for name in names]
        panel.bar(at, shares, 0.9 * width, color=colour, label=f"{rung.student} {STAGES[rung.stage]}", zorder=2)
        panel.errorbar(at, shares, errors, fmt="none", ecolor=MUTED, elinewidth=0.7, zorder=3)
    panel.axhline(100, color=INK, lw=1.0, zorder=3)
    panel.annotate(
        "teacher", (len(names) - 0.5, 100), (0, 3), textcoords="offset points", ha="right", fontsize=8.5, color=INK
    )
    panel.set_xlim(-0.5, len(names) - 0.5)
    panel.set_ylim(0, max(112, panel.get_ylim()[1]))
    own = [f"{name}\n({score.score:.0%})" for name, score in ladder.teacher.items()]
    panel.set_xticks(range(len(names)), own, color=INK)
    panel.set_ylabel("share of the teacher's score, %", color=MUTED, fontsize=8.5)
    figure.suptitle("What is left of each capability (in brackets: the teacher's own score)", x=0.01, ha="left",
                    fontsize=11, color=INK)  # fmt: skip
    figure.legend(loc="outside lower center", ncols=min(4, max(1, len(ladder.rungs))), fontsize=8.5, frameon=False)
    figure.savefig(path)


def _error_of_share(score: CapabilityScore) -> float:
    """The score's own standard error, as a share of the teacher's score, per cent; the teacher's is not in it."""
    if not score.error or not score.of_teacher or not score.score:
        return 0.0
    return 100 * score.error * score.of_teacher / score.score


def _colours(rungs: Sequence[Rung]) -> list[tuple[float, float, float]]:
    """A hue a student, paler with each stage."""
    students = list(dict.fromkeys(rung.student for rung in rungs))
    found, seen = [], dict.fromkeys(students, 0)
    for rung in rungs:
        stages = sum(other.student == rung.student for other in rungs)
        pale = FADED * seen[rung.student] / max(1, stages - 1)
        seen[rung.student] += 1
        red, green, blue = (part / 255 for part in HUES[students.index(rung.student) % len(HUES)])
        found.append((red + (1 - red) * pale, green + (1 - green) * pale, blue + (1 - blue) * pale))
    return found
