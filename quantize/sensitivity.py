"""Which linears suffer at 4 bits: the KL divergence from the float model that each causes when it alone is rounded.

Where the whole model fits in memory and is small, it is measured: one linear is replaced, the model is run on the
calibration windows, and its next-token distributions are compared with the float model's. Else it is estimated
layer by layer (`quantize.fisher`). Both round to nearest, so that the figure belongs to the weights and not to a
solver; solvers lower all of them alike.

Legend: S windows, T positions, V vocabulary, N output channels, K input channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from nano.progress import track
from quantize.fisher import estimate_kl, standard_error
from quantize.recipe import Grid
from quantize.rtn import round_to_nearest
from quantize.student import Student
from quantize.whole import kl_of, log_probabilities, whole_model

MEASURED_WORK = 2e13
"""Operations up to which every linear is measured on a CPU: minutes. A GPU is given a thousand times that."""

MEASURED_BYTES = 2 << 30
"""Most memory for the model and its output distributions when measuring."""

WINDOW = 64
"""Tokens of a window: short, because an estimate's standard error goes with the number of windows."""

MEASURED_TOKENS, ESTIMATED_TOKENS = 4096, 8192
"""Calibration tokens looked at."""


@dataclass(frozen=True)
class Sensitivity:
    """What each linear costs when it alone is rounded to nearest.

    Attributes:
        kind: "measured" on the whole model, or "estimated" layer by layer to second order.
        low: KL in nats a token at 4 bits, by module.
        high: the same at 8 bits.
        tokens: calibration tokens it was taken over.
        error: relative standard error of an estimate; 0 where measured.
    """

    kind: Literal["measured", "estimated"]
    low: dict[str, float]
    high: dict[str, float]
    tokens: int
    error: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return asdict(self)


def cut_short(windows: Sequence[torch.Tensor], tokens: int, length: int = WINDOW) -> list[torch.Tensor]:
    """The first `tokens` tokens of some windows in pieces of `length`; a piece goes on without a beginning of its own.

    Pieces are taken from all windows alike, so that few long documents do not fill the quota.
    """
    pieces = [list(torch.split(window, length)) for window in windows]
    turns = [piece[i] for i in range(max(map(len, pieces))) for piece in pieces if i < len(piece)]
    whole = [piece for piece in turns if len(piece) == length] or turns
    return whole[: max(1, tokens // length)]


def measure_sensitivity(
    student: Student, grids: Mapping[str, tuple[Grid, Grid]], windows: Sequence[torch.Tensor], seed: int = 0
) -> Sensitivity:
    """What each decoder linear costs on its 4-bit grid, and what it would cost at 8 bits.

    Args:
        student: the float model.
        grids: decoder linears, each with its 4-bit and its 8-bit grid.
        windows: token ids of calibration text.
        seed: of the estimate's random directions.
    """
    if is_measurable(student, len(grids)):
        windows = cut_short(windows, MEASURED_TOKENS)
        found, kind, error = _measure(student, grids, windows), "measured", 0.0
    else:
        windows = cut_short(windows, ESTIMATED_TOKENS)
        changes = {name: _changes(pair) for name, pair in grids.items()}
        found, kind, error = estimate_kl(student, changes, windows, seed), "estimated", standard_error(len(windows))
    tokens = sum(len(window) for window in windows)
    low, high = ({name: values[i] for name, values in found.items()} for i in (0, 1))
    return Sensitivity(kind, low, high, tokens, error)  # type: ignore[arg-type]


def is_measurable(student: Student, modules: int) -> bool:
    """Whether measuring one module after another on the whole model is a matter of minutes, and fits memory."""
    shape, gpu = student.shape, torch.cuda.is_available()
    work = 4 * modules * shape.num_parameters * MEASURED_TOKENS
    held = 4 * (shape.num_parameters + MEASURED_TOKENS * shape.vocab_size)
    return work <= MEASURED_WORK * (1000 if gpu else 1) and held <= MEASURED_BYTES * (8 if gpu else 1)


def _changes(pair: tuple[Grid, Grid]) -> Any:
    """weight (N, K) to what rounding it to nearest on each grid adds to it."""
    return lambda weight_NK: [_rounded(weight_NK, grid) - weight_NK for grid in pair]


def _rounded(weight_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    return round_to_nearest(weight_NK.cpu(), grid).dequantize().to(weight_NK.device)


def _measure(
    student: Student, grids: Mapping[str, tuple[Grid, Grid]], windows: list[torch.Tensor]
) -> dict[str, list[float]]:
    """KL with each module alone at 4 and at 8 bits, on the whole model."""
    model = whole_model(student)
    reference = log_probabilities(model, windows)
    found: dict[str, list[float]] = {}
    with track("sensitivity", len(grids), "linears") as bar:
        for name, pair in grids.items():
            linear = model.get_submodule(name)
            weight_NK = linear.weight.data
            found[name] = []
            for grid in pair:
                linear.weight.data = _rounded(weight_NK, grid)
                found[name].append(kl_of(model, reference, windows))
            linear.weight.data = weight_NK
            bar.advance()
    return found


def measure_mixes(
    student: Student, mixes: Sequence[Mapping[str, Grid]], windows: Sequence[torch.Tensor]
) -> list[float] | None:
    """KL of the whole model with each mix of grids rounded to nearest; None where the model is too large to hold."""
    if not is_measurable(student, len(mixes)):
        return None
    windows = cut_short(windows, MEASURED_TOKENS)
    model = whole_model(student)
    reference = log_probabilities(model, windows)
    original = {name: model.get_submodule(name).weight.data for name in mixes[0]}
    found = []
    for mix in mixes:
        for name, weight_NK in original.items():
            model.get_submodule(name).weight.data = _rounded(weight_NK, mix[name])
        found.append(kl_of(model, reference, windows))
    return found
