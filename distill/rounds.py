"""How a deep cut is shared out: several rounds, each to a shape on the way, each healed before the next.

Past half of the parameters one cut leaves little that works, and what importance says of a part was measured among
parts that leave with it. A deep cut is therefore made in R rounds of equal ratio,

    P_r = P_teacher (P_student / P_teacher)^(r / R),

each to a shape that `nano.solve` gives for P_r (the last to the student's own), each measured on the model that the
round before left, and each trained against the same teacher for a share of the steps: `heal` of them go to all rounds
before the last, evenly, since what a passing shape learns is partly cut away again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distill.options import DistillOptions
from nano.errors import RequestError
from nano.shapes import ModelShape
from nano.solve import solve_between

HALF = 0.5
"""What one round at least leaves of the parameters when the number of rounds is "auto"."""

LEAST_STEPS = 8
"""Fewer than this heal nothing: "auto" makes fewer rounds where steps are few."""


@dataclass(frozen=True)
class Round:
    """One cut and its healing.

    Attributes:
        shape: what is cut to.
        first: steps done when it begins.
        last: steps done when it ends.
    """

    shape: ModelShape
    first: int
    last: int

    @property
    def steps(self) -> int:
        """How long it heals."""
        return self.last - self.first


def plan_rounds(teacher: ModelShape, student: ModelShape, options: DistillOptions) -> tuple[Round, ...]:
    """The rounds of a student that is cut from its teacher; one where nothing is cut.

    Raises:
        RequestError: so many rounds as are asked for cannot be made: too few steps, or no shapes between.
    """
    wanted = rounds_wanted(teacher, student, options)
    shapes: list[ModelShape] = []
    for done in range(1, wanted):
        ratio = student.num_parameters / teacher.num_parameters
        size = round(teacher.num_parameters * ratio ** (done / wanted))
        shape = solve_between(shapes[-1] if shapes else teacher, student, size)
        if shape is not None:
            shapes.append(shape)
    if options.rounds != "auto" and len(shapes) + 1 < wanted:
        raise RequestError(
            "There are no shapes for so many rounds between this teacher and this student.",
            found=f"--rounds {options.rounds}, {len(shapes)} shapes between them",
            expected=f"at most --rounds {len(shapes) + 1}",
        )
    return _with_steps([*shapes, student], options)


def rounds_wanted(teacher: ModelShape, student: ModelShape, options: DistillOptions) -> int:
    """How many rounds to make where shapes allow it.

    Raises:
        RequestError: a round would have no step.
    """
    if options.start != "pruned":
        return 1
    if options.rounds == "auto":
        ratio = teacher.num_parameters / student.num_parameters
        deep = max(1, math.ceil(math.log(ratio) / -math.log(HALF) - 1e-9))
        return max(1, min(deep, 1 + int(options.heal * options.steps) // LEAST_STEPS))
    if options.rounds > 1 and int(options.heal * options.steps) < options.rounds - 1:
        raise RequestError(
            "There are too few steps for so many rounds.",
            found=f"--rounds {options.rounds} --steps {options.steps} --heal {options.heal:g}",
            expected=f"a step for each of the {options.rounds - 1} rounds before the last",
        )
    return options.rounds


def _with_steps(shapes: list[ModelShape], options: DistillOptions) -> tuple[Round, ...]:
    before = len(shapes) - 1
    ends = [int(options.heal * options.steps) * (i + 1) // before for i in range(before)] + [options.steps]
    return tuple(Round(shape, first, last) for shape, first, last in zip(shapes, [0, *ends], ends, strict=False))
