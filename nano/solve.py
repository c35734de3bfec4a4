"""A student's shape from a size: the teacher's own family, the widths int4 kernels like, the right count.

Every layout (layers, hidden width, attention groups, feed-forward width) on the width grid that no dimension of
the teacher is smaller than is counted exactly; of those whose count is right the one that cuts the teacher most
gently is taken. "Gently" is a cost over l, d, f, h = ln(teacher's layers, D, F, heads ÷ student's):

    cost = (d² + f²) + (h² + 0.7 h) + (l² + 0.7 l) + 2 (d - f)²

Why so: Minitron (arXiv 2407.14679, best practice 3: "prefer width over depth pruning for the model scales we
consider (≤ 15B)"; 2408.11796 table 2) halves Llama 3.1 8B by width alone (D 4096 → 3072, F 14336 → 9216) and
keeps its 32 layers and 32 heads. The linear terms do the same here: layers and heads stay whole until the widths
would fall below exp(-0.35) = 0.70 of the teacher's, and for deeper cuts (8B → 1.8B) everything gives a little, as
Llama 3.2 1B/3B and Qwen3's small models do. The last term keeps F ÷ D near the teacher's.

Heads leave in whole groups (a key/value head with all its query heads), so the grouped-query ratio and the head
width stay the teacher's. Where layers differ in kind (Gemma: five sliding, one full) they leave in whole periods,
so that pruning can choose which ones and the pattern stays exact.

Legend: V vocabulary, D hidden width, F feed-forward width, H query heads, G key/value heads, A head width, L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nano.errors import RequestError
from nano.families import family_of
from nano.shapes import FULL, SLIDING, ModelShape

NANO = {"nano-1": 1_800_000_000, "nano-2": 3_250_000_000}
"""Gemini Nano's two sizes (arXiv 2312.11805, section 2.1)."""

TOY_LIMIT = 100_000_000
"""Below this a student is a toy: its widths are multiples of 32 instead of 128.

128 is what phone kernels tile by and lets any int4 group size up to 128 divide a width; 32 is the smallest group
that both phone runtimes take. Under 100 M parameters hidden widths are under ~768, where steps of 128 would be
jumps of a sixth and more, and speed on a phone is no concern.
"""

TOLERANCE, TOY_TOLERANCE = 0.005, 0.03
LIMIT_OF_NEAREST = 0.10
"""Where nothing lies within the tolerance the nearest layout is taken, if it is nearer than this (never for Nano)."""

MAX_EMBEDDING, MAX_FFN_RATIO, MAX_Q_RATIO = 0.75, 8.0, 3.0
"""Past these a student is a lookup table with a thin network: the embeddings' share of the parameters (Gemma 3 270M
has 0.63), F ÷ D (Gemma 3 1B has 6.0), query width ÷ D (Qwen3 0.6B has 2.0). A teacher that has more may keep it."""

DEPTH_THRESHOLD = 0.7
RATIO_WEIGHT = 2.0
DEVIATION_WEIGHT = 0.02
"""Weight of (deviation ÷ tolerance)²: among layouts that are as gentle, the one whose count is nearer."""


EVEN_HEADS = ("llama", "gemma3_text")
"""Families whose transformers config refuses a hidden width that the number of query heads does not divide."""


@dataclass(frozen=True)
class SizeTarget:
    """A size that was asked for.

    Attributes:
        name: as the user wrote it.
        parameters: how many, embeddings counted once.
        tolerance: relative deviation within which every layout counts as right.
        step: hidden and feed-forward widths are multiples of this.
    """

    name: str
    parameters: int
    tolerance: float
    step: int


@dataclass(frozen=True)
class _Layout:
    """One point of the grid, with its exact parameter count and how hard it cuts the teacher."""

    cost: float
    parameters: int
    layers: int
    hidden: int
    ffn: int
    kv_heads: int


def parse_size(size: str) -> SizeTarget:
    """What "nano-1", "nano-2", "1.2B", "40M" or "150k" asks for.

    Raises:
        RequestError: it is none of these, or not positive.
    """
    name = size.strip()
    if name.lower() in NANO:
        return SizeTarget(name.lower(), NANO[name.lower()], TOLERANCE, 128)
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)([kKmMbB]?)", name.replace("_", ""))
    count = round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]) if match else 0
    if count < 1 or (match and not match[2] and count < 1000):
        raise RequestError(
            "The student's size is not understood.",
            found=repr(size),
            expected="nano-1, nano-2, or a number of parameters like 1.2B, 40M or 150k",
        )
    toy = count < TOY_LIMIT
    return SizeTarget(name, count, TOY_TOLERANCE if toy else TOLERANCE, 32 if toy else 128)


def solve_student(teacher: ModelShape, size: str | SizeTarget) -> ModelShape:
    """The student's shape: the teacher's family, vocabulary and head width, as many parameters as `size` says.

    Nano-1 and Nano-2 are met within 0.5%; other sizes within 0.5% (toys: 3%) or, where the grid has nothing that
    close, by the nearest layout, at most 10% off. The result depends on the arguments alone.

    Raises:
        RequestError: the size is not understood, exceeds the teacher's, leaves no room beside the vocabulary, or
            lies too far from everything on the grid.
    """
    target = parse_size(size) if isinstance(size, str) else size
    if target.parameters > teacher.num_parameters:
        raise RequestError(
            "The student would be larger than its teacher.",
            found=f"{target.name}: {target.parameters:,} parameters; the teacher has {teacher.num_parameters:,}",
            expected="at most as many parameters as the teacher",
            todo="ask for a smaller student, or take a larger teacher",
        )
    layouts = list(_layouts(teacher, target))
    right = _gentlest_first(layouts, target)
    if right:
        return _shaped(teacher, right[0])
    off = {layout: abs(layout.parameters - target.parameters) / target.parameters for layout in layouts}
    allowed = target.tolerance if target.name in NANO else LIMIT_OF_NEAREST
    nearest = min(layouts, key=lambda x: (off[x], x.cost), default=None)
    if nearest is None or off[nearest] > allowed:
        raise _nothing_fits(teacher, target)
    return _shaped(teacher, nearest)


def solve_shapes(teacher: ModelShape, size: str, count: int) -> list[ModelShape]:
    """At most `count` shapes of a size, unlike each other: the gentlest F of each (L, D, G), the gentlest first.

    The first is `solve_student`'s. How much each really loses only a cut can tell (`distill.search`).

    Raises:
        RequestError: as `solve_student`.
    """
    target, first = parse_size(size), solve_student(teacher, size)
    found: dict[tuple[int, int, int], _Layout] = {}
    for layout in _gentlest_first(_layouts(teacher, target), target):
        found.setdefault((layout.layers, layout.hidden, layout.kv_heads), layout)
    return [_shaped(teacher, layout) for layout in found.values()][:count] or [first]


def _gentlest_first(layouts: Iterable[_Layout], target: SizeTarget) -> list[_Layout]:
    """Those whose count is right, ranked."""
    off = {layout: abs(layout.parameters - target.parameters) / target.parameters for layout in layouts}
    weight = DEVIATION_WEIGHT / target.tolerance**2
    right = (layout for layout in off if off[layout] <= target.tolerance)
    return sorted(right, key=lambda x: (x.cost + weight * off[x] ** 2, x.layers, x.hidden, x.ffn))


def solve_between(teacher: ModelShape, student: ModelShape, parameters: int) -> ModelShape | None:
    """A shape on the way from a teacher to a student of it: what the student may be cut from, cut from the teacher.

    Of the layouts that no dimension of the student exceeds the gentlest whose count is right is taken, as
    `solve_student` does; where none is right, the nearest that lies between both.

    Args:
        teacher, student: the ends; the student has no more layers of a kind, heads or width than the teacher.
        parameters: how many the shape should have.

    Returns:
        the shape, or None where the grid has nothing between the two.
    """
    toy = parameters < TOY_LIMIT
    target = SizeTarget("", parameters, TOY_TOLERANCE if toy else TOLERANCE, 32 if toy else 128)
    least = (student.num_layers, student.hidden_size, student.intermediate_size, student.num_kv_heads)
    between = (student.num_parameters, teacher.num_parameters)
    weight = DEVIATION_WEIGHT / target.tolerance**2
    ranked = []
    for layout in _layouts(teacher, target, student.intermediate_size):
        sizes = (layout.layers, layout.hidden, layout.ffn, layout.kv_heads)
        off = abs(layout.parameters - parameters) / parameters
        if all(a >= b for a, b in zip(sizes, least, strict=True)) and between[0] < layout.parameters < between[1]:
            right = off <= target.tolerance
            rank = layout.cost + weight * off**2 if right else off
            ranked.append((not right, rank, *sizes, layout))
    for *_rank, layout in sorted(ranked, key=lambda entry: entry[:-1]):
        shape = _shaped(teacher, layout)
        if can_be_cut(shape, student):
            return shape
    return None


def can_be_cut(teacher: ModelShape, student: ModelShape) -> bool:
    """Whether a student's parts can all be taken from a teacher's: no width, head, or layer of a kind is missing."""
    widths = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
    merged = math.ceil((student.num_heads // student.num_kv_heads) / (teacher.num_heads // teacher.num_kv_heads))
    return (
        all(getattr(student, name) <= getattr(teacher, name) for name in widths)
        and all(student.layer_types.count(kind) <= teacher.layer_types.count(kind) for kind in (FULL, SLIDING))
        and merged * student.num_kv_heads <= teacher.num_kv_heads
    )


def canonical_shape(size: str) -> ModelShape:
    """The shape to train from scratch, without a teacher: Gemma 3's architecture as Gemini Nano is described.

    Decoder-only, multi-query attention, five sliding layers to one full, 32,768 positions, 262,144 vocabulary
    entries, tied embeddings. Depth and width follow Gemma 3's own trend (D ÷ L: 1B 44,
    4B 75; here 51 and 57); layers are whole periods of six, so the last one sees everything. Other sizes, up to
    Nano-2's, are cut from it as from a teacher.

    Raises:
        RequestError: the size is not understood, or larger than Nano-2.
    """
    target = parse_size(size)
    if target.name == "nano-1":
        return _canonical(hidden=1536, ffn=8576, layers=30)
    largest = _canonical(hidden=2048, ffn=10752, layers=36)
    return largest if target.name == "nano-2" else solve_student(largest, target)


def canonical_config(size: str) -> dict[str, Any]:
    """A complete config.json for `canonical_shape`, as transformers loads it; constants are Gemma 3 1B's."""
    shape = canonical_shape(size)
    base: dict[str, Any] = {
        "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
        "query_pre_attn_scalar": shape.head_dim, "rms_norm_eps": 1e-6, "use_cache": True,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return shape.to_hf(base)


def _canonical(hidden: int, ffn: int, layers: int) -> ModelShape:
    return ModelShape(
        family="gemma3_text",
        vocab_size=262_144,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=1,
        head_dim=256,
        tied=True,
        max_positions=32_768,
        layer_types=tuple(FULL if i % 6 == 5 else SLIDING for i in range(layers)),
        sliding_window=512,
    )


def _layouts(teacher: ModelShape, target: SizeTarget, least_ffn: int = 0) -> Iterator[_Layout]:
    """Every sensible (L, D, G) of the grid with the one or two F, of those allowed, whose count lies nearest."""
    step = target.step
    for hidden, kv_heads in _widths(teacher, step):
        embeddings, widest = _embeddings(teacher, hidden), _widest_ffn(teacher, hidden)
        d = math.log(teacher.hidden_size / hidden)
        group_cost = _threshold_cost(teacher.num_kv_heads / kv_heads)
        for layers in _layer_counts(teacher):
            fixed, per_ffn = _count_in_ffn(teacher, layers, hidden, kv_heads)
            if fixed > target.parameters:
                break
            wanted = (target.parameters - fixed) / (per_ffn * step)
            for ffn in {max(least_ffn, units * step) for units in (math.floor(wanted), math.ceil(wanted))}:
                count = fixed + per_ffn * ffn
                if not 0 < ffn <= widest or embeddings > MAX_EMBEDDING * count:
                    continue
                f = math.log(teacher.intermediate_size / ffn)
                cost = d * d + f * f + RATIO_WEIGHT * (d - f) ** 2
                cost += group_cost + _threshold_cost(teacher.num_layers / layers)
                yield _Layout(cost, count, layers, hidden, ffn, kv_heads)


def _widths(teacher: ModelShape, step: int) -> Iterator[tuple[int, int]]:
    """All sensible (D, G) that no dimension of the teacher is smaller than."""
    q_per_group = teacher.num_heads // teacher.num_kv_heads * teacher.head_dim
    q_ratio = max(MAX_Q_RATIO, q_per_group * teacher.num_kv_heads / teacher.hidden_size)
    for hidden in range(step, teacher.hidden_size + 1, step):
        for kv_heads in _group_counts(teacher, step):
            heads = kv_heads * (teacher.num_heads // teacher.num_kv_heads)
            loadable = teacher.family not in EVEN_HEADS or hidden % heads == 0
            if loadable and kv_heads * q_per_group <= q_ratio * hidden:
                yield hidden, kv_heads


def _embeddings(teacher: ModelShape, hidden: int) -> int:
    return teacher.vocab_size * hidden * (1 if teacher.tied else 2)


def _widest_ffn(teacher: ModelShape, hidden: int) -> float:
    ratio = max(MAX_FFN_RATIO, teacher.intermediate_size / teacher.hidden_size)
    return min(teacher.intermediate_size, ratio * hidden)


def _threshold_cost(ratio: float) -> float:
    log = math.log(ratio)
    return log * log + DEPTH_THRESHOLD * log


def _count_in_ffn(teacher: ModelShape, layers: int, hidden: int, kv_heads: int) -> tuple[int, int]:
    """(a, b): the parameters are a + b F. Written out because the table of tensors is too slow 10⁵ times."""
    family = family_of(teacher.family)
    width = teacher.head_dim * kv_heads
    q_width = width * (teacher.num_heads // teacher.num_kv_heads)
    norms = len(family.layer_norms) * hidden + (2 * teacher.head_dim if family.qk_norm else 0)
    return _embeddings(teacher, hidden) + hidden + layers * (
        2 * hidden * (q_width + width) + norms
    ), 3 * layers * hidden


def _group_counts(teacher: ModelShape, step: int) -> list[int]:
    """Numbers of key/value heads whose query width is a multiple of the step, else of 32, else the teacher's own."""
    per_group = teacher.num_heads // teacher.num_kv_heads * teacher.head_dim
    for multiple in (step, 32):
        counts = [g for g in range(1, teacher.num_kv_heads + 1) if g * per_group % multiple == 0]
        if counts:
            return counts
    return [teacher.num_kv_heads]


def _period(layer_types: tuple[str, ...]) -> int:
    """After how many layers the kinds repeat; the number of layers where they do not."""
    count = len(layer_types)
    return next((p for p in range(1, count) if all(a == b for a, b in zip(layer_types, layer_types[p:], strict=False))), count)  # noqa: E501  # fmt: skip


def _layer_counts(teacher: ModelShape) -> list[int]:
    period = _period(teacher.layer_types)
    if 2 * period > teacher.num_layers:  # no repeating pattern to keep: kinds are sampled in proportion instead
        return list(range(1, teacher.num_layers + 1))
    return list(range(teacher.num_layers, 0, -period))[::-1]


def _layer_types(teacher: ModelShape, layers: int) -> tuple[str, ...]:
    """The student's layer kinds: always a subsequence of the teacher's, so pruning can pick matching layers."""
    if 2 * _period(teacher.layer_types) <= teacher.num_layers:
        return teacher.layer_types[:layers]
    return tuple(teacher.layer_types[i * teacher.num_layers // layers] for i in range(layers))


def _shaped(teacher: ModelShape, layout: _Layout) -> ModelShape:
    layer_types = _layer_types(teacher, layout.layers)
    shape = teacher.resized(
        hidden_size=layout.hidden,
        intermediate_size=layout.ffn,
        num_layers=layout.layers,
        num_heads=layout.kv_heads * (teacher.num_heads // teacher.num_kv_heads),
        num_kv_heads=layout.kv_heads,
        layer_types=layer_types,
        sliding_window=teacher.sliding_window if SLIDING in layer_types else None,
    )
    assert shape.num_parameters == layout.parameters
    return shape


def _nothing_fits(teacher: ModelShape, target: SizeTarget) -> RequestError:
    """Why no layout has the size: widths under the grid, a vocabulary that takes it all, or a grid too coarse."""
    step = target.step
    if min(teacher.hidden_size, teacher.intermediate_size) < step:
        return RequestError(
            "The teacher is narrower than the narrowest student.",
            found=f"hidden_size {teacher.hidden_size}, intermediate_size {teacher.intermediate_size}",
            expected=f"widths of at least {step}: a student's are multiples of it, for int4 kernels' sake",
            todo="take a wider teacher",
        )
    below, above = _nearest(teacher, target)
    if below is not None:
        nearest = [f"{count:,}" for count in (below, above) if count is not None]
        return RequestError(
            "No student of this size can be cut from this teacher: its widths leave nothing near enough.",
            found=f"{target.name}; the nearest have {' and '.join(nearest)} parameters",
            expected=f"a layout within {target.tolerance if target.name in NANO else LIMIT_OF_NEAREST:.1%}",
            todo="ask for one of those",
        )
    untied = "" if teacher.tied else " (the output head is not tied, so it counts twice)"
    ask = "" if above is None else f"ask for {_round_up(above)} or more, or "
    return RequestError(
        "The teacher's vocabulary leaves no room for a student of this size.",
        found=f"{target.name}: {target.parameters:,} parameters, of which {teacher.vocab_size:,} tokens take "
        f"{_embeddings(teacher, step):,} for every {step} of hidden width{untied}",
        expected=f"at most {MAX_EMBEDDING:.0%} of the parameters in the embeddings, queries at most "
        f"{MAX_Q_RATIO:.0f} and the feed-forward at most {MAX_FFN_RATIO:.0f} times as wide as the hidden state",
        todo=ask + "take a teacher with a smaller vocabulary",
    )


def _nearest(teacher: ModelShape, target: SizeTarget) -> tuple[int | None, int | None]:
    """The largest count below the target and the smallest above it that sensible layouts have, however far off."""
    below: list[int] = []
    above: list[int] = []
    for hidden, kv_heads in _widths(teacher, target.step):
        widest = math.floor(_widest_ffn(teacher, hidden) / target.step)
        for layers in _layer_counts(teacher):
            fixed, per_ffn = _count_in_ffn(teacher, layers, hidden, kv_heads)
            unit = per_ffn * target.step
            least = max(1, math.ceil((_embeddings(teacher, hidden) / MAX_EMBEDDING - fixed) / unit))
            wanted = (target.parameters - fixed) / unit
            if least <= min(widest, wanted):
                below.append(fixed + min(widest, math.floor(wanted)) * unit)
            if max(least, wanted) <= widest:
                above.append(fixed + max(least, math.ceil(wanted)) * unit)
    smallest = min(above, default=None)
    if target.step == 32 and smallest is not None and smallest >= TOY_LIMIT:  # beyond the toys the grid is another
        _, smallest = _nearest(teacher, SizeTarget(target.name, TOY_LIMIT, TOLERANCE, 128))
    return max(below, default=None), smallest


def _round_up(count: int) -> str:
    """A size in three digits, not below the count: 41_234_567 gives '41.3M'."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            digits = 2 if count < 10 * unit else 1
            scaled = math.ceil(count / unit * 10**digits) / 10**digits
            return f"{scaled:g}{letter}"
    return str(count)
