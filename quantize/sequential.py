"""Layer by layer through the network with calibration text: each linear is solved on the inputs it will really see.

Within a layer the linears that share an input (q, k and v; gate and up) are solved together, then the layer is
run again with them on the grid to find what the next ones see.

Legend: N output channels, K input channels, M positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nano.errors import WorkError
from nano.families import layer_prefix
from quantize.calibrate import Calibration
from quantize.gptq import Curvature, gptq, relative_error
from quantize.grid import QuantizedTensor
from quantize.layers import Hidden, advance, embed, linear_inputs, load_layer
from quantize.options import QuantizeOptions
from quantize.recipe import Grid
from quantize.student import Student

SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A layer's linears in the order of data flow, those with one input together."""


def calibrated_layers(
    student: Student, grids: dict[str, Grid], options: QuantizeOptions, calibration: Calibration
) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, float]]]:
    """Per layer, its modules on the grid and each one's relative output error on the calibration text.

    Raises:
        WorkError: hidden states stop being finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = embed(student, [torch.from_numpy(window) for window in calibration.windows.ids])
    for layer in range(student.shape.num_layers):
        model = load_layer(student, layer, device)
        weights: dict[str, QuantizedTensor] = {}
        errors: dict[str, float] = {}
        for together in SHARED_INPUTS:
            modules = [name for name in together if layer_prefix(layer) + name in grids]
            if not modules:
                continue
            hessian_KK = curvature(model, modules[0], hidden, device)
            for name in modules:
                full, linear = layer_prefix(layer) + name, model.layers[0].get_submodule(name)
                weights[full] = gptq(linear.weight, hessian_KK, grids[full], options.damping)
                solved_NK = weights[full].dequantize()
                errors[full] = relative_error(linear.weight, solved_NK, hessian_KK)
                linear.weight.data = solved_NK
        advance(model, hidden, device)
        if not bool(torch.isfinite(hidden.x_STD).all()):
            raise WorkError(
                f"Layer {layer} gives numbers that are not finite on the calibration text.",
                found="NaN or infinity in its output",
                todo="check that the float model itself works on this text (nanokit evaluate)",
            )
        yield weights, errors


def curvature(model: Any, linear: str, hidden: Hidden, device: torch.device) -> torch.Tensor:
    """Mean x x^T (K, K) of what a linear of the layer sees."""
    columns = model.layers[0].get_submodule(linear).in_features
    total = Curvature.zeros(columns, device)
    for _part, x_bTK, valid_bT in linear_inputs(model, linear, hidden, device):
        total.add(x_bTK[valid_bT.to(x_bTK.device)])
    return total.mean()
