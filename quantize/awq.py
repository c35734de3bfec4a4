"""AWQ: input channels that matter are made larger before rounding, and what comes before them smaller (2306.00978).

A linear's output error is its rounding error weighed by its inputs. Multiplying the weights of input channel k by
s_k and dividing the channel itself by s_k leaves the function as it is and makes that channel's rounding error s_k
times smaller, as long as the group's scale does not grow with it. The division is folded into what produces the
channel: a norm's weight, the rows of up_proj before down_proj, the rows of v_proj before o_proj. Those rows' own
rounding does not change, as a row has scales of its own.

s_k = (mean |x_k|)^a, normalised so that its largest and smallest value are reciprocal; a is searched on a grid from 0
(no change) to 1 for the least squared output error on the calibration inputs, with the weights put on the very grid
(bfloat16 scales searched for the least squared error) that they will get. Clipping is left to that scale search.

Legend: N output channels, K input channels, D hidden width, G key/value heads, A head width, P query heads of one
key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nano.families import family_of, layer_prefix
from nano.progress import track
from quantize.calibrate import Calibration
from quantize.layers import Hidden, advance, embed, load_layer, pass_attention
from quantize.recipe import Grid
from quantize.rtn import round_to_nearest
from quantize.sequential import Stream
from quantize.student import Student
from quantize.view import StudentView, norm_read_by

POWERS = 20
"""Exponents tried, evenly from 0 up to but not including 1: AWQ's own number."""

SEARCH_ROWS = 512
"""Output channels of a linear that the search looks at, spread evenly. They tell as much of the best exponent as all
do, and a search costs `POWERS` roundings of them."""

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
FOLDS = {"attention": ATTENTION, "output": ("self_attn.o_proj",), "mlp": MLP, "down": ("mlp.down_proj",)}
"""What is scaled together, because it reads one input: the linears by the name of their fold."""


@dataclass(frozen=True)
class Scales:
    """A layer's channel scales, by the name of the fold.

    Attributes:
        factor_K: what the columns of the fold's linears are multiplied by, float32.
        power: the exponent that was chosen for each fold.
        error: relative squared output error of the rounded linears, (without scales, with them).
    """

    factor_K: Mapping[str, torch.Tensor]
    power: Mapping[str, float]
    error: Mapping[str, tuple[float, float]]


@dataclass
class InputMoments:
    """Sums over calibration positions of one linear's inputs.

    Attributes:
        outer_KK: x x^T.
        size_K: |x|.
    """

    outer_KK: torch.Tensor
    size_K: torch.Tensor
    positions: int = 0

    def add(self, x_MK: torch.Tensor) -> None:
        """Take some positions."""
        self.outer_KK.addmm_(x_MK.T, x_MK)
        self.size_K += x_MK.abs().sum(0)
        self.positions += x_MK.shape[0]


def awq(student: Student, grids: Mapping[str, Grid], calibration: Calibration) -> tuple[Student, list[Scales]]:
    """Search every layer's scales on calibration text and fold them in: the same function, other weights.

    The float model's hidden states are what the search sees, as in AWQ's own code.

    Args:
        student: the float student, or a view of it.
        grids: what goes on which grid; a fold none of whose linears is on one is left alone.
        calibration: windows of token ids.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = embed(student, [torch.from_numpy(window) for window in calibration.windows.ids])
    layers = []
    with track("awq", student.shape.num_layers, "layers") as bar:
        for layer in range(student.shape.num_layers):
            layers.append(_search_layer(student, layer, grids, hidden, device))
            bar.advance(note=_note(layers[-1]))
    return scaled(student, layers), layers


def _note(scales: Scales) -> str:
    return ", ".join(f"{name} {after / max(before, 1e-30):.0%}" for name, (before, after) in scales.error.items())


def _search_layer(
    student: Student, layer: int, grids: Mapping[str, Grid], hidden: Hidden, device: torch.device
) -> Scales:
    """Scales of one layer; the hidden states go on to the next."""
    stream, shape = Stream(load_layer(student, layer, device), hidden, device), student.shape
    factor: dict[str, torch.Tensor] = {}
    power: dict[str, float] = {}
    error: dict[str, tuple[float, float]] = {}
    for fold, modules in FOLDS.items():
        chosen = [name for name in modules if layer_prefix(layer) + name in grids]
        if chosen or fold == "output":
            moments = measure_inputs(stream, modules[0])
        if chosen:
            size_K = moments.size_K / max(moments.positions, 1)
            if fold == "output":
                size_K = share_heads(size_K, shape.num_kv_heads, shape.head_dim)
            weights = [stream.linear(name).weight for name in chosen]
            on_grids = [grids[layer_prefix(layer) + name] for name in chosen]
            factor_K, power[fold], error[fold] = search(weights, on_grids, size_K, moments.outer_KK)
            factor[fold] = factor_K.cpu()
        if fold == "output":
            pass_attention(stream.model, hidden, stream.attended, device)
    advance(stream.model, hidden, device)
    return Scales(factor, power, error)


@torch.no_grad()
def measure_inputs(stream: Stream, linear: str) -> InputMoments:
    """Moments of what one linear of the running layer sees."""
    k, device = stream.linear(linear).in_features, stream.device
    total = InputMoments(torch.zeros(k, k, device=device), torch.zeros(k, device=device))
    for seen in stream.inputs(linear):
        total.add(seen.x_bTK[seen.valid_bT.to(device)])
    return total


def share_heads(size_K: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
    """One size for all query heads of a key/value head: a channel of v_proj feeds them all."""
    size_GPA = size_K.view(kv_heads, -1, head_dim)
    return size_GPA.mean(1, keepdim=True).expand_as(size_GPA).reshape(-1)


@torch.no_grad()
def search(
    weights: Sequence[torch.Tensor], grids: Sequence[Grid], size_K: torch.Tensor, outer_KK: torch.Tensor
) -> tuple[torch.Tensor, float, tuple[float, float]]:
    """The scales (K) with the least relative output error, summed over linears (N, K) that share their input.

    Args:
        weights: of the linears.
        grids: of each.
        size_K: mean |x|; channels that are never used keep a scale of 1.
        outer_KK: sum of x x^T.

    Returns:
        The scales, their exponent, and the relative error without and with them (mean over the linears).
    """
    rows = [_some_rows(weight_NK) for weight_NK in weights]
    whole = [_energy(weight_NK, outer_KK).clamp_min(1e-30) for weight_NK in rows]
    best_K, best_power, least, first = torch.ones_like(size_K), 0.0, torch.inf, torch.inf
    for step in range(POWERS):
        factor_K = scale_of(size_K, step / POWERS)
        error = 0.0
        for weight_NK, grid, energy in zip(rows, grids, whole, strict=True):
            rounded_NK = round_to_nearest(weight_NK * factor_K, grid).dequantize() / factor_K
            error += float(_energy(rounded_NK - weight_NK, outer_KK) / energy) / len(rows)
        if step == 0:
            first = error
        if error < least:
            best_K, best_power, least = factor_K, step / POWERS, error
    return best_K, best_power, (first, least)


def scale_of(size_K: torch.Tensor, power: float) -> torch.Tensor:
    """size^power, divided by sqrt(largest x smallest); 1 for channels of size 0."""
    live_K = size_K > 0
    if not bool(live_K.any()):
        return torch.ones_like(size_K)
    raw_K = torch.where(live_K, size_K, torch.ones_like(size_K)).clamp_min(1e-4) ** power
    middle = (raw_K[live_K].max() * raw_K[live_K].min()).sqrt()
    return torch.where(live_K, raw_K / middle, torch.ones_like(raw_K))


def _some_rows(weight_NK: torch.Tensor) -> torch.Tensor:
    stride = max(1, len(weight_NK) // SEARCH_ROWS)
    return weight_NK[::stride].float()


def _energy(weight_NK: torch.Tensor, outer_KK: torch.Tensor) -> torch.Tensor:
    """Squared output, summed over rows and positions."""
    return (weight_NK @ outer_KK * weight_NK).sum()


def scaled(student: Student, layers: Sequence[Scales]) -> Student:
    """The student with every layer's scales folded in.

    A norm is stored in the type it has on disk; its readers take the scale that it then really has, so that rounding
    a half-precision norm changes nothing.
    """
    return StudentView(student, _folded(student, layers))


def _folded(student: Student, layers: Sequence[Scales]) -> Callable[[str], torch.Tensor]:
    family, shape = family_of(student.shape.family), student.shape
    norm_of = {fold: norm_name for fold, modules in FOLDS.items() if (norm_name := norm_read_by(modules[0], family))}

    def scaled_norm(layer: int, fold: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm's new weight, and the scale it stands for."""
        old_D = student.tensor(f"{layer_prefix(layer)}{norm_of[fold]}.weight")
        gain_D = old_D.float() + family.norm_offset
        factor_D = layers[layer].factor_K.get(fold)
        if factor_D is None:
            return old_D, torch.ones_like(gain_D)
        new_D = (gain_D / factor_D - family.norm_offset).to(old_D.dtype)
        new_gain_D = new_D.float() + family.norm_offset
        usable_D = (gain_D != 0) & (new_gain_D != 0)
        return torch.where(usable_D, new_D, old_D), torch.where(usable_D, gain_D / new_gain_D, torch.ones_like(gain_D))

    def change(name: str) -> torch.Tensor:
        if not name.startswith("model.layers."):
            return student.tensor(name)
        layer, module = int(name.split(".")[2]), name.removesuffix(".weight").split(".", 3)[3]
        for fold, name_of_norm in norm_of.items():
            if module == name_of_norm:
                return scaled_norm(layer, fold)[0]
            if module in FOLDS[fold]:
                weight_NK = student.tensor(name).float() * scaled_norm(layer, fold)[1]
                rows_N1 = _row_factor(module, layers[layer], shape.num_kv_heads, shape.head_dim)
                return weight_NK / rows_N1
        for fold in ("output", "down"):
            if module in FOLDS[fold] and fold in layers[layer].factor_K:
                return student.tensor(name).float() * layers[layer].factor_K[fold]
        return student.tensor(name)

    return change


def _row_factor(module: str, scales: Scales, kv_heads: int, head_dim: int) -> torch.Tensor:
    """What a linear's rows are divided by (N, 1), because its reader's columns are multiplied by it."""
    if module == "mlp.up_proj" and "down" in scales.factor_K:
        return scales.factor_K["down"][:, None]
    if module == "self_attn.v_proj" and "output" in scales.factor_K:
        return scales.factor_K["output"].view(kv_heads, -1, head_dim)[:, 0].reshape(-1, 1)
    return torch.ones(1, 1)
