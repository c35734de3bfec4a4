"""Learned rotations: R1 and R2 moved from Hadamard matrices to where the grid is expected to lose least.

SpinQuant (2405.16406) trains its rotations on the whole network's loss. Here the loss is a formula. A weight rounded
with step s is off by about s^2 / 12, whatever its code, so a linear's expected output error, relative to its output, is

    sum over rows n and groups G of  s_nG^2 / 12  x  (energy of the inputs in G)   /   tr(W S W^T),

with S the mean x x^T of its inputs and the energy of a group the sum of its part of S's diagonal. Turning the basis
by R makes W into W R and S into R^T S R. It is smooth in R once a group's largest weight, which sets its step, is
replaced by a high norm; nothing is rounded and no text is run while learning.

R is the start times (I + A)^-1 (I - A) with A skew (Cayley): orthogonal whatever A is.

Legend: B width of the basis that is turned, N rows, K columns, D hidden width, G key/value heads (in `..GAA`), else
groups, P query heads of a key/value head, A head width, g group size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nano.families import LAYER_LINEARS, layer_prefix
from nano.progress import track
from quantize.awq import measure_inputs
from quantize.calibrate import Calibration
from quantize.layers import advance, embed, load_layer, pass_attention
from quantize.recipe import Grid
from quantize.rotate import READERS, WRITERS, Rotation, fold_norms, hadamard_rotation
from quantize.sequential import O_PROJ, SHARED_INPUTS, Stream
from quantize.student import Student

V_PROJ = "self_attn.v_proj"

STEPS = 100
RATE = 0.01
"""Of Adam, on the entries of A, falling to zero by half a cosine."""

NORM = 8
"""Of the norm that stands for a group's largest magnitude. 2 is blind to outliers, the maximum has no slope."""

SAMPLED_LAYERS = 8
"""Layers, spread evenly, whose weights and inputs decide R1: all layers share it."""

SAMPLED_WIDTH = 512
"""Rows of a reader, or columns of a writer, that take part in each of those layers."""


@dataclass(frozen=True)
class Reader:
    """A linear that reads the turned basis.

    Attributes:
        weight_NB: its weight, or some of its rows.
        moments_BB: mean x x^T of its inputs.
        group_size: of its grid.
        whole: its squared output.
    """

    weight_NB: torch.Tensor
    moments_BB: torch.Tensor
    group_size: int
    whole: torch.Tensor


@dataclass(frozen=True)
class Writer:
    """A linear that writes to the turned basis; its own inputs stay as they are.

    Attributes:
        weight_BK: its weight, or some of its columns.
        energy_K: mean squared inputs of those columns.
        group_size: of its grid.
        whole: its squared output.
    """

    weight_BK: torch.Tensor
    energy_K: torch.Tensor
    group_size: int
    whole: torch.Tensor


@dataclass(frozen=True)
class Linears:
    """A layer's linears by name, its norms folded: weights, mean x x^T of their inputs, and grids of those on one."""

    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]
    grids: Mapping[str, Grid]

    def whole(self, name: str) -> torch.Tensor:
        """Mean squared output of a linear, summed over its channels; infinite where there is none to be lost."""
        weight_NK = self.weights[name]
        whole = (weight_NK @ self.moments[name] * weight_NK).sum()
        return torch.where(whole > 0, whole, torch.full_like(whole, torch.inf))

    def readers(self, heads_GAA: torch.Tensor) -> list[Reader]:
        """What reads the residual stream, v_proj's rows turned, at most about `SAMPLED_WIDTH` rows of each."""
        found = []
        for name in READERS:
            if name in self.grids:
                weight_NK = self.weights[name]
                if name == V_PROJ:
                    weight_NK = turn_rows(weight_NK, heads_GAA)
                stride = max(1, len(weight_NK) // SAMPLED_WIDTH)
                share = len(weight_NK[::stride]) / len(weight_NK)
                group, whole = self.grids[name].group_size, self.whole(name) * share
                found.append(Reader(weight_NK[::stride], self.moments[name], group, whole))
        return found

    def writers(self, heads_GAA: torch.Tensor) -> list[Writer]:
        """What writes to the residual stream, o_proj's columns turned, about `SAMPLED_WIDTH` columns of each."""
        found = []
        for name in WRITERS:
            if name in self.grids:
                weight_NK, energy_K = self.weights[name], self.moments[name].diagonal()
                if name == O_PROJ:
                    weight_NK, energy_K = turn_columns(weight_NK, heads_GAA), turn_energy(self.moments[name], heads_GAA)
                group = self.grids[name].group_size
                stride = max(1, weight_NK.shape[1] // max(SAMPLED_WIDTH, group))
                chosen_K = torch.arange(weight_NK.shape[1], device=weight_NK.device).view(-1, group)[::stride].flatten()
                share = len(chosen_K) / weight_NK.shape[1]
                found.append(Writer(weight_NK[:, chosen_K], energy_K[chosen_K], group, self.whole(name) * share))
        return found


def learned_rotation(
    student: Student, grids: Mapping[str, Grid], calibration: Calibration, seed: int, residual: bool = True
) -> Rotation:
    """Learn R2 of every layer, then, where it is asked for and the family can have it, R1.

    Args:
        student: the float student.
        grids: what goes on which grid; linears on none do not count.
        calibration: windows of token ids; the float model runs them once.
        seed: of the Hadamard matrices to start from.
        residual: whether R1 is wanted.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start, shape = hadamard_rotation(student, seed, residual), student.shape
    turned = start.residual_DD is not None
    folded = fold_norms(student) if turned else student
    hidden = embed(folded, [torch.from_numpy(window) for window in calibration.windows.ids])
    stride = math.ceil(shape.num_layers / SAMPLED_LAYERS)
    heads: list[torch.Tensor] = []
    readers: list[Reader] = []
    writers: list[Writer] = []
    with track("rotation", shape.num_layers, "layers") as bar:
        for layer in range(shape.num_layers):
            stream = Stream(load_layer(folded, layer, device), hidden, device)
            own = {name.removeprefix(layer_prefix(layer)): grid for name, grid in grids.items()}
            weights = {name: stream.linear(name).weight.detach() for name in LAYER_LINEARS}
            linears = Linears(weights, _moments(stream, LAYER_LINEARS if turned else (V_PROJ, O_PROJ)), own)
            heads.append(learn_heads(linears, start.heads_LGAA[layer].to(device)))
            if turned and layer % stride == 0:
                readers += linears.readers(heads[-1])
                writers += linears.writers(heads[-1])
            advance(stream.model, hidden, device)
            bar.advance()
    residual_DD = start.residual_DD
    if residual_DD is not None and (readers or writers):
        residual_DD = learn_residual(residual_DD.to(device), readers, writers).cpu()
    return Rotation(residual_DD, torch.stack(heads).cpu())


def _moments(stream: Stream, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
    """Mean x x^T of the inputs of some of the layer's linears, of which attention's are gone afterwards."""
    found = {}
    for together in SHARED_INPUTS:
        if set(together) & set(wanted):
            total = measure_inputs(stream, together[0])
            found.update(dict.fromkeys(together, total.outer_KK / max(total.positions, 1)))
        if together == (O_PROJ,):
            pass_attention(stream.model, stream.hidden, stream.attended, stream.device)
    return found


def turn_rows(weight_NK: torch.Tensor, heads_GAA: torch.Tensor) -> torch.Tensor:
    """v_proj's weight with R2 folded in."""
    return (heads_GAA.mT @ weight_NK.view(*heads_GAA.shape[:2], -1)).reshape(weight_NK.shape)


def turn_columns(weight_NK: torch.Tensor, heads_GAA: torch.Tensor) -> torch.Tensor:
    """o_proj's weight with R2 folded in."""
    groups, width = heads_GAA.shape[:2]
    return (weight_NK.view(len(weight_NK), groups, -1, width) @ heads_GAA).reshape(weight_NK.shape)


def turn_energy(moments_KK: torch.Tensor, heads_GAA: torch.Tensor) -> torch.Tensor:
    """Mean squared inputs (K) of o_proj with R2 folded in: the diagonal of R^T S R for each query head."""
    groups, width = heads_GAA.shape[:2]
    blocks_GPAA = moments_KK.view(-1, width, moments_KK.shape[0] // width, width).diagonal(dim1=0, dim2=2)
    blocks_GPAA = blocks_GPAA.permute(2, 0, 1).reshape(groups, -1, width, width)
    turn_G1AA = heads_GAA[:, None]
    return (turn_G1AA * (blocks_GPAA @ turn_G1AA)).sum(-2).flatten()


def rounding_noise(weight_NK: torch.Tensor, energy_K: torch.Tensor, group_size: int) -> torch.Tensor:
    """Expected squared output error of a weight on a 4-bit grid, but for a constant factor."""
    groups_NGg = weight_NK.view(len(weight_NK), -1, group_size)
    # measured in each group's own largest magnitude, since real weights to the eighth underflow
    unit_NG = groups_NGg.detach().abs().amax(-1)
    live_NG = unit_NG > 0
    unit_NG = torch.where(live_NG, unit_NG, torch.ones_like(unit_NG))
    powers_NG = (groups_NGg / unit_NG[..., None]).abs().pow(NORM).mean(-1)
    step_NG = torch.where(live_NG, powers_NG, torch.ones_like(powers_NG)).pow(2 / NORM) * unit_NG.square() * live_NG
    return (step_NG @ energy_K.view(-1, group_size).sum(-1)).sum()


def learn_heads(linears: Linears, start_GAA: torch.Tensor) -> torch.Tensor:
    """R2 of one layer: least expected error of v_proj and o_proj together."""
    stride = max(1, len(linears.weights[O_PROJ]) // SAMPLED_WIDTH)
    out_NK, value_NK = linears.weights[O_PROJ][::stride], linears.weights[V_PROJ]

    def loss(heads_GAA: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=start_GAA.device)
        if V_PROJ in linears.grids:
            energy_K = linears.moments[V_PROJ].diagonal()
            noise = rounding_noise(turn_rows(value_NK, heads_GAA), energy_K, linears.grids[V_PROJ].group_size)
            total = total + noise / linears.whole(V_PROJ)
        if O_PROJ in linears.grids:
            energy_K = turn_energy(linears.moments[O_PROJ], heads_GAA)
            noise = rounding_noise(turn_columns(out_NK, heads_GAA), energy_K, linears.grids[O_PROJ].group_size)
            total = total + noise * stride / linears.whole(O_PROJ)
        return total

    return minimise(loss, start_GAA) if {V_PROJ, O_PROJ} & set(linears.grids) else start_GAA


def learn_residual(start_DD: torch.Tensor, readers: list[Reader], writers: list[Writer]) -> torch.Tensor:
    """R1: least expected error of everything that reads or writes the residual stream."""

    def loss(turn_DD: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=start_DD.device)
        energy = {id(reader.moments_BB): (turn_DD * (reader.moments_BB @ turn_DD)).sum(0) for reader in readers}
        for reader in readers:
            energy_D = energy[id(reader.moments_BB)]
            total = total + rounding_noise(reader.weight_NB @ turn_DD, energy_D, reader.group_size) / reader.whole
        for writer in writers:
            turned_DK = turn_DD.T @ writer.weight_BK
            total = total + rounding_noise(turned_DK, writer.energy_K, writer.group_size) / writer.whole
        return total

    return minimise(loss, start_DD)


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], start_BB: torch.Tensor) -> torch.Tensor:
    """Orthogonal matrices (..., B, B) of a lower loss than the start's: Adam on Cayley's A, `STEPS` steps."""
    skew_BB = torch.zeros_like(start_BB, requires_grad=True)
    optimizer = torch.optim.Adam([skew_BB], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss(_turned(start_BB, skew_BB)))
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found_BB = _turned(start_BB.double(), skew_BB.double()).float()
        return found_BB if bool(loss(found_BB) < loss(start_BB)) else start_BB


def _turned(start_BB: torch.Tensor, skew_BB: torch.Tensor) -> torch.Tensor:
    """start (I + A)^-1 (I - A), A the skew part of a matrix."""
    a_BB = skew_BB - skew_BB.mT
    identity_BB = torch.eye(a_BB.shape[-1], dtype=a_BB.dtype, device=a_BB.device)
    turned_BB: torch.Tensor = start_BB @ torch.linalg.solve(identity_BB + a_BB, identity_BB - a_BB)
    return turned_BB
