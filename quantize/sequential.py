"""Layer by layer through the network with calibration text: each linear is solved on the inputs it will really see.

Two streams of hidden states run side by side, the float network's and the quantized one's. Within a layer the
linears that share an input (q, k and v; gate and up) are solved together, then the layer is run on with them
on the grid to find what the next ones see. Attention runs once a layer and stream (`pass_attention`).

Legend: N output channels, K input channels, D hidden width, M positions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nano.errors import WorkError
from nano.families import family_of, layer_prefix
from quantize.calibrate import Calibration
from quantize.gptq import Curvature, correct, curvature, gptq, relative_error
from quantize.grid import QuantizedTensor
from quantize.layers import (
    Finished,
    Hidden,
    LayerResult,
    Seen,
    advance,
    embed,
    linear_inputs,
    load_layer,
    pass_attention,
)
from quantize.options import STEPS, QuantizeOptions
from quantize.recipe import Grid
from quantize.rtn import round_to_nearest, rounded_ends
from quantize.student import Student
from quantize.tune import tune_layer

SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's linears in the order of data flow, those with one input together."""

O_PROJ = "self_attn.o_proj"

WRITERS = (O_PROJ, "mlp.down_proj")
"""Linears whose output is added to the residual stream as it is (in families without post norms)."""


@dataclass
class Moments:
    """Means over calibration positions of what one linear input is and should be.

    Attributes:
        input_KK: x x^T of the quantized stream's inputs x.
        drift_KK: (f - x) x^T, f the float stream's inputs.
        residual_DK: (float residual - quantized residual) x^T, for writers.
    """

    input_KK: torch.Tensor
    drift_KK: torch.Tensor
    residual_DK: torch.Tensor | None
    positions: int = 0

    def add(self, x_MK: torch.Tensor, float_MK: torch.Tensor, residual_MD: torch.Tensor | None) -> None:
        """Take some positions."""
        self.input_KK.addmm_(x_MK.T, x_MK)
        self.drift_KK.addmm_((float_MK - x_MK).T, x_MK)
        if self.residual_DK is not None and residual_MD is not None:
            self.residual_DK.addmm_(residual_MD.T, x_MK)
        self.positions += x_MK.shape[0]

    def mean(self) -> Moments:
        """Per position."""
        for matrix in (self.input_KK, self.drift_KK, self.residual_DK):
            if matrix is not None:
                matrix.div_(max(self.positions, 1))
        return self

    def missing(self, weight_NK: torch.Tensor) -> torch.Tensor:
        """(wanted output - this weight's output on the real inputs) x^T."""
        missing_NK = weight_NK @ self.drift_KK
        return missing_NK if self.residual_DK is None else missing_NK + self.residual_DK


def calibrated_layers(
    student: Student, grids: dict[str, Grid], options: QuantizeOptions, calibration: Calibration, finished: Finished
) -> Iterator[LayerResult]:
    """Solve layer after layer; a layer that is finished is only run, which leads to the same numbers.

    Raises:
        WorkError: hidden states stop being finite, or a layer's inputs cannot be solved for.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    windows = [torch.from_numpy(window) for window in calibration.windows.ids]
    reference, hidden = embed(student, windows), embed(rounded_ends(student, grids), windows)
    steps = (options.steps or STEPS["tune"]) if options.method == "tune" else 0
    for layer in range(student.shape.num_layers):
        ours = Stream(load_layer(student, layer, device), hidden, device)
        floats = Stream(load_layer(student, layer, device), reference, device)
        result = finished(layer)
        if result is None:
            before = copy.deepcopy(hidden) if steps else None
            result = run_stages(layer, ours, floats, student, grids, options)
            if before is not None:
                _tune(layer, result, before, floats, student, options)
                hidden.x_STD = before.x_STD
                ours.model = load_layer(student, layer, device)
                ours.finish(layer, result)
        else:
            ours.finish(layer, result)
            floats.finish(layer, None)
        student.store.release()
        _check_finite(layer, hidden)
        yield result


def _tune(
    layer: int, result: LayerResult, before: Hidden, floats: Stream, student: Student, options: QuantizeOptions
) -> None:
    """Train the layer's solved linears together, from the hidden states before it to the float ones behind it."""
    model = load_layer(student, layer, floats.device)
    found = tune_layer(model, layer_prefix(layer), result.weights, before, floats.hidden.x_STD, options)
    result.weights, result.layer_error = found.weights, (found.error_before, found.error_after)


@dataclass
class Stream:
    """One of the two networks on its way through a layer.

    Attributes:
        model: the layer.
        hidden: the hidden states before it; moved along as the stages pass.
        device: where it runs.
        attended: the output projection's inputs, between the two stages of attention.
    """

    model: Any
    hidden: Hidden
    device: torch.device
    attended: list[torch.Tensor] = field(default_factory=list)

    def linear(self, name: str) -> Any:
        """One of the layer's linears."""
        return self.model.layers[0].get_submodule(name)

    def finish(self, layer: int, result: LayerResult | None) -> None:
        """Move the hidden states behind the layer, its linears being the solved ones where there are any."""
        for name, weight in (result.weights if result else {}).items():
            self.linear(name.removeprefix(layer_prefix(layer))).weight.data = weight.dequantize().to(self.device)
        advance(self.model, self.hidden, self.device)

    def inputs(self, name: str) -> Iterator[Seen]:
        """What one linear sees, batch by batch; the output projection's inputs are kept."""
        for seen in linear_inputs(self.model, name, self.hidden, self.device):
            if name == O_PROJ:
                self.attended.append(seen.x_bTK)
            yield seen


def run_stages(
    layer: int, ours: Stream, floats: Stream, student: Student, grids: dict[str, Grid], options: QuantizeOptions
) -> LayerResult:
    """Take both streams through one layer, solving its linears on the way."""
    result = LayerResult()
    for together in SHARED_INPUTS:
        modules = [name for name in together if layer_prefix(layer) + name in grids]
        if modules or together == (O_PROJ,):
            input_KK, missing = measure(ours, floats, together[0], modules, student)
        if modules:
            solve = curvature(input_KK, options.damping)
            for name in modules:
                full = layer_prefix(layer) + name
                weight_NK = ours.linear(name).weight.detach()
                target_NK = correct(weight_NK, missing.pop(name), solve)
                solved = gptq(target_NK, solve, grids[full], refine=options.method != "fast")
                _note(full, weight_NK, target_NK, solved, solve, grids[full], result)
                ours.linear(name).weight.data = solved.dequantize()
        if together == (O_PROJ,):
            for stream in (ours, floats):
                pass_attention(stream.model, stream.hidden, stream.attended, stream.device)
    for stream in (ours, floats):
        advance(stream.model, stream.hidden, stream.device)
    return result


def _note(
    name: str,
    weight_NK: torch.Tensor,
    target_NK: torch.Tensor,
    solved: QuantizedTensor,
    solve: Curvature,
    grid: Grid,
    result: LayerResult,
) -> None:
    """Put a solved linear and what was lost with it into the result."""
    rounded = round_to_nearest(target_NK, grid)
    result.error[name] = relative_error(weight_NK, target_NK, solved.dequantize(), solve)
    result.rounding_error[name] = relative_error(weight_NK, target_NK, rounded.dequantize(), solve)
    result.weights[name] = solved.cpu()


@torch.no_grad()
def measure(
    ours: Stream, floats: Stream, name: str, modules: list[str], student: Student
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run both streams up to a linear: its inputs' mean x x^T, and what each module that shares them should add.

    The latter is (wanted output - the module's own output on the real inputs) x^T, (N, K), by module.
    """
    columns = ours.linear(name).in_features
    writes = name in WRITERS and not family_of(student.shape.family).post_norms
    width = student.shape.hidden_size
    total = Moments(
        torch.zeros(columns, columns, device=ours.device),
        torch.zeros(columns, columns, device=ours.device),
        torch.zeros(width, columns, device=ours.device) if writes else None,
    )
    for mine, theirs in zip(ours.inputs(name), floats.inputs(name), strict=True):
        valid_bT = mine.valid_bT.to(ours.device)
        residual_MD = (theirs.residual_bTD - mine.residual_bTD)[valid_bT] if writes else None
        total.add(mine.x_bTK[valid_bT], theirs.x_bTK[valid_bT], residual_MD)
    moments = total.mean()
    return moments.input_KK, {module: moments.missing(ours.linear(module).weight) for module in modules}


def _check_finite(layer: int, hidden: Hidden) -> None:
    if not bool(torch.isfinite(hidden.x_STD).all()):
        raise WorkError(
            f"Layer {layer} gives numbers that are not finite on the calibration text.",
            found="NaN or infinity in its output",
            todo="check that the float model itself works on this text (nanokit evaluate)",
        )
