"""Which linears get 8 bits: the most KL divergence saved within a number of bits a weight, or within a phone.

A linear at 8 bits, one scale a row (the int8 grid that both phone runtimes multiply by), costs about 3.5 bits a
weight more than at 4 in groups of 32, and saves what it loses there (`quantize.sensitivity`). Choosing the set that
saves most within the bytes to spare is a 0/1 knapsack, solved exactly by dynamic programming: linears come in a
handful of sizes, all multiples of a common unit.

The savings are taken to add up. They do so nearly: every linear of stories260K at 4 bits costs 0.105 nats together
and 0.090 in the sum of each alone; the curve shows predicted and measured side by side.

Legend: N output channels, K input channels, V vocabulary, D hidden width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from device_profiles.budget import judge, require_fit
from device_profiles.footprint import (
    FLOAT_BYTES,
    RUNTIMES,
    BundleFacts,
    EmbeddingBits,
    PlannedRecipe,
    Runtime,
    planned_facts,
    runtime_constants,
)
from device_profiles.profile import decimal_bytes, load_profile
from nano.errors import RequestError
from nano.families import EMBEDDING, HEAD, LAYER_LINEARS, linear_names, weight_shapes
from nano.folder import human_bytes
from nano.shapes import ModelShape
from quantize.options import QuantizeOptions
from quantize.recipe import Grid, QuantRecipe
from quantize.rules import Rule
from quantize.runtimes import check_runtime

if TYPE_CHECKING:
    import torch

    from quantize.sensitivity import Sensitivity
    from quantize.student import Student

SCALE_BITS = 16
"""A scale is a bfloat16 to the phone's int4 kernel."""

MOST_UNITS = 100_000
"""Steps of the knapsack; where the room is more of them, sizes are rounded up: of each linear that is chosen, at most
1e-5 of the room is lost."""

DEFAULT_CONTEXT = 2048
"""Positions that the memory forecast is for where none are given; what `nanokit export` keeps by default."""

CURVE = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the way from all linears at 4 bits to all at 8 for which the curve is drawn."""


@dataclass(frozen=True)
class Room:
    """What the linears may grow by.

    Attributes:
        extra_bytes: over every linear as the recipe has it.
        why: where the number comes from, one line for people.
    """

    extra_bytes: int
    why: str


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        bits: mean bits a weight over the linears on the grid, scales included.
        bytes: of those linears' codes and scales.
        eight: how many linears are at 8 bits.
        predicted: sum of each linear's KL alone, nats a token.
        measured: KL of the whole model with all linears rounded to nearest; None where it is too large to measure.
        chosen: whether this is the budget that was asked for.
    """

    bits: float
    bytes: int
    eight: int
    predicted: float
    measured: float | None
    chosen: bool


@dataclass(frozen=True)
class Choice:
    """What was decided.

    Attributes:
        recipe: the recipe with the rules for 8 bits before the others.
        room: what there was to spend.
        sensitivity: what it was decided by.
        curve: budgets around it.
    """

    recipe: QuantRecipe
    room: Room
    sensitivity: Sensitivity
    curve: tuple[Point, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        return {
            "budget": asdict(self.room),
            "sensitivity": self.sensitivity.as_dict(),
            "curve": [asdict(point) for point in self.curve],
        }


def linear_bits(shape: ModelShape, grids: Mapping[str, Grid]) -> tuple[int, int]:
    """Bits of codes and bfloat16 scales of the decoder linears on a grid, and how many weights they have."""
    sizes, bits, weights = weight_shapes(shape), 0, 0
    for name in linear_names(shape):
        if name in grids:
            bits += _bits(sizes[name + ".weight"], grids[name])
            weights += math.prod(sizes[name + ".weight"])
    return bits, weights


def _bits(size: tuple[int, ...], grid: Grid) -> int:
    weights = math.prod(size)
    zeros = 0 if grid.symmetric else grid.bits
    return weights * grid.bits + weights // grid.group_size * (SCALE_BITS + zeros)


def eight_bit_grids(shape: ModelShape, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The 8-bit grid of each decoder linear that is at 4 bits: symmetric, one scale a row."""
    sizes = weight_shapes(shape)
    names = [name for name in linear_names(shape) if name in grids and grids[name].bits == 4]
    return {name: Grid(8, sizes[name + ".weight"][1]) for name in names}


def extra_bytes(shape: ModelShape, grids: Mapping[str, Grid]) -> dict[str, int]:
    """What each decoder linear at 4 bits would grow by at 8, in bytes of codes and bfloat16 scales."""
    sizes = weight_shapes(shape)
    return {
        name: -(-(_bits(sizes[name + ".weight"], eight) - _bits(sizes[name + ".weight"], grids[name])) // 8)
        for name, eight in eight_bit_grids(shape, grids).items()
    }


def find_room(
    shape: ModelShape, grids: Mapping[str, Grid], options: QuantizeOptions, tokenizer_bytes: int
) -> Room | None:
    """What the options leave for 8 bits; None where no budget was asked for. Reads no weight.

    Raises:
        RequestError: the budget cannot be met, or there is nothing to choose.
        CheckFailedError: not even 4 bits fit the phone; says by how much and what would.
    """
    if not options.bits_budget and not options.profile:
        return None
    eight = eight_bit_grids(shape, grids)
    if not eight:
        raise RequestError("There is nothing to choose.", found="no decoder linear at 4 bits in the recipe")
    mixed = {**grids, **eight}
    check_runtime(shape, {n: (g.bits, g.group_size, g.symmetric) for n, g in mixed.items()}, options.runtime)
    if options.profile:
        return _phone_room(shape, grids, options, tokenizer_bytes)
    bits, weights = linear_bits(shape, grids)
    extra = (options.bits_budget * weights - bits) / 8
    if extra < 0:
        raise RequestError(
            "The bits budget is below what the recipe takes without any 8-bit linear.",
            found=f"--bits-budget {options.bits_budget:g}",
            expected=f"{bits / weights:.4g} or more bits a weight (codes and bfloat16 scales of the decoder linears)",
            todo="raise it, or give a larger --group-size (fewer scales)",
        )
    return Room(math.floor(extra + 1e-6), f"{options.bits_budget:g} bits a weight, scales included")


def _phone_room(shape: ModelShape, grids: Mapping[str, Grid], options: QuantizeOptions, tokenizer_bytes: int) -> Room:
    """What a phone leaves on each runtime that the model is meant for, by the memory forecast; the least counts."""
    profile = load_profile(options.profile)
    context = options.context or min(DEFAULT_CONTEXT, shape.max_positions)
    offered = profile.runtimes.value if isinstance(profile.runtimes.value, tuple) else RUNTIMES
    wanted = [r for r in RUNTIMES if (r in offered if options.runtime == "any" else r == options.runtime)]
    if not wanted:
        raise RequestError(
            "A phone's memory cannot be forecast for this runtime.",
            found=f"--runtime {options.runtime} with --profile {options.profile}",
            expected="--runtime any, executorch or onnx",
        )
    rooms = []
    for runtime in wanted:
        facts = phone_facts(shape, grids, runtime, context, tokenizer_bytes)
        verdict = judge(facts, profile, context)
        require_fit(verdict)
        spare = min(limit.allowed - limit.needed for limit in verdict.limits if limit.allowed is not None)
        why = f"{decimal_bytes(spare)} to spare on {profile.name} with {runtime} at context {context:,}"
        rooms.append(Room(math.floor(spare / runtime_constants(runtime).packed_per_byte), why))
    least = min(rooms, key=lambda room: room.extra_bytes)
    return replace(least, extra_bytes=min(least.extra_bytes, sum(extra_bytes(shape, grids).values())))


def phone_facts(
    shape: ModelShape, grids: Mapping[str, Grid], runtime: Runtime, context: int, tokenizer_bytes: int
) -> BundleFacts:
    """A bundle's facts for any mix of grids, before it is written."""
    table: EmbeddingBits = "float" if EMBEDDING not in grids else ("4" if grids[EMBEDDING].bits == 4 else "8")
    plan = PlannedRecipe(runtime, embedding=table, context=context, tokenizer_bytes=tokenizer_bytes)
    sizes, head = weight_shapes(shape), EMBEDDING if shape.tied else HEAD
    scale_bits = {"executorch": SCALE_BITS, "onnx": 32}[runtime]
    packed = left_float = 0
    for name in (*linear_names(shape), head):
        weights = math.prod(sizes[name + ".weight"])
        if name in grids:
            packed += (weights * grids[name].bits + weights // grids[name].group_size * scale_bits) // 8
        else:
            left_float += FLOAT_BYTES * weights
    return replace(planned_facts(shape, plan), packed_source_bytes=packed, float_head_bytes=left_float)


def choose(gain: Mapping[str, float], cost: Mapping[str, int], room: int) -> list[str]:
    """The names whose gains add up to the most while their costs stay within `room` (0/1 knapsack, exact).

    Exact up to `MOST_UNITS` units of size; beyond that sizes are rounded up, so the room is never overrun.
    """
    names = [name for name in cost if gain[name] > 0]
    if sum(cost[name] for name in names) <= room:
        return names
    unit = math.gcd(*(cost[name] for name in names))
    unit *= max(1, math.ceil(room / unit / MOST_UNITS))
    capacity = room // unit
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(names), capacity + 1), dtype=bool)
    for row, name in enumerate(names):
        size = -(-cost[name] // unit)
        if size <= capacity:
            with_it = best[: capacity + 1 - size] + gain[name]
            taken[row, size:] = with_it > best[size:]
            best[size:] = np.maximum(best[size:], with_it)
    chosen, left = [], capacity
    for row in reversed(range(len(names))):
        if taken[row, left]:
            chosen.append(names[row])
            left -= -(-cost[names[row]] // unit)
    return [name for name in names if name in set(chosen)]


def eight_bit_rules(modules: Iterable[str]) -> tuple[Rule, ...]:
    """Rules that put some decoder linears on 8 bits, one for each kind of linear."""
    layers: dict[str, list[int]] = {}
    for name in modules:
        _, _, layer, linear = name.split(".", 3)
        layers.setdefault(linear, []).append(int(layer))
    return tuple(
        Rule(rf"model\.layers\.({'|'.join(map(str, sorted(layers[linear])))})\.{re.escape(linear)}", 8, "channel")
        for linear in LAYER_LINEARS
        if linear in layers
    )


def choose_bits(
    student: Student, recipe: QuantRecipe, room: Room, windows: Sequence[torch.Tensor], seed: int = 0
) -> Choice:
    """Measure each linear, spend the room where it saves most, and draw the curve around it.

    Args:
        student: the float model.
        recipe: the grids to start from.
        room: see `find_room`.
        windows: token ids of calibration text.
        seed: of the estimate's random directions, where one is needed.
    """
    from quantize.sensitivity import measure_mixes, measure_sensitivity

    grids = recipe.grids(student.shape)
    eight_bits, cost = eight_bit_grids(student.shape, grids), extra_bytes(student.shape, grids)
    sensitivity = measure_sensitivity(student, {n: (grids[n], eight_bits[n]) for n in cost}, windows, seed)
    gain = {name: sensitivity.low[name] - sensitivity.high[name] for name in cost}
    rooms = sorted({room.extra_bytes, *(math.floor(share * sum(cost.values())) for share in CURVE)})
    sets = [choose(gain, cost, extra) for extra in rooms]
    mixes = [{name: eight_bits[name] if name in eight else grids[name] for name in cost} for eight in sets]
    measured: Sequence[float | None] = measure_mixes(student, mixes, windows) or [None] * len(mixes)
    points = []
    for extra, eight, mix, kl in zip(rooms, sets, mixes, measured, strict=True):
        bits, weights = linear_bits(student.shape, {**grids, **mix})
        predicted = sum(sensitivity.high[name] if name in eight else sensitivity.low[name] for name in cost)
        points.append(Point(bits / weights, bits // 8, len(eight), predicted, kl, extra == room.extra_bytes))
    chosen = sets[rooms.index(room.extra_bytes)]
    mixed = QuantRecipe((*eight_bit_rules(chosen), *recipe.rules))
    return Choice(mixed, room, sensitivity, tuple(points))


def bits_record(shape: ModelShape, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """Bits of each module on the grid and the linears' mean with scales, for a manifest."""
    bits, weights = linear_bits(shape, grids)
    return {"bits": {name: grid.bits for name, grid in grids.items()}, "bits_per_weight": bits / max(weights, 1)}


def curve_table(choice: Choice) -> Any:
    """The curve as a table for people, within 80 columns."""
    from rich.table import Table

    how = choice.sensitivity
    note = f", ± {how.error:.0%}" if how.error else ""
    title = f"KL to the float model by budget ({how.kind} one by one on {how.tokens:,} tokens{note})"
    table = Table(title=title, title_justify="left", title_style="bold", width=80)
    for heading in ("bits a weight", "linears", "at 8 bits", "KL predicted", "KL measured", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for point in choice.curve:
        measured = "–" if point.measured is None else f"{point.measured:.5f}"
        eight = f"{point.eight} of {len(how.low)}"
        cells = (f"{point.bits:.3f}", human_bytes(point.bytes), eight, f"{point.predicted:.5f}", measured)
        table.add_row(*cells, "chosen" if point.chosen else "", style="bold" if point.chosen else "")
    return table
