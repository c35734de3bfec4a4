"""Learned rounding: a layer's codes and scales trained together so that its output comes out right.

GPTQ solves one linear at a time for its own output. Here all linears of a decoder layer, already solved, are
trained on what they are for: the residual stream behind the layer, on calibration text. As in AutoRound
(2309.05516) and OmniQuant (2308.13137) the loss is the mean squared difference from the float network's; the
quantized network's own, already drifted stream is the input, so the layer also makes up for the layers before it.
One layer is in memory at a time, so a model of any size can be tuned where `quantize.recover`, which trains all of
it at once, does not fit.

Legend: S windows, T positions, D hidden width, b windows of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from quantize.grid import QuantizedTensor
from quantize.layers import Hidden, run_layer
from quantize.options import STEPS, QuantizeOptions
from quantize.trainable import BETAS, TrainableLinear, harden, trainable_groups

BATCH_TOKENS = 2048
"""Positions of a training step; AutoRound takes eight windows of 2,048, we take more steps of fewer."""


@dataclass(frozen=True)
class Tuned:
    """A layer after tuning.

    Attributes:
        weights: the tuned linears, by full name, or the given ones where training did not help.
        error_before, error_after: mean squared difference of the layer's outputs over all windows, relative to the
            mean square of what the layer adds to its input.
    """

    weights: dict[str, QuantizedTensor]
    error_before: float
    error_after: float


def tune_layer(
    model: Any,
    prefix: str,
    start: dict[str, QuantizedTensor],
    inputs: Hidden,
    wanted_STD: torch.Tensor,
    options: QuantizeOptions,
) -> Tuned:
    """Train one layer's codes and scales with Adam, its rate on a cosine to zero.

    Args:
        model: the float layer (`quantize.layers.load_layer`); its linears are replaced.
        prefix: of the layer's modules in the whole model, "model.layers.3.".
        start: the solved linears, by full name.
        inputs: the quantized network's hidden states before the layer.
        wanted_STD: the float network's behind it.
        options: steps, learning rate (codes a weight may move a step) and seed (which windows a step sees).
    """
    steps, learning_rate = options.steps or STEPS["tune"], options.rate
    for name, quantized in start.items():
        parent, _, leaf = name.removeprefix(prefix).rpartition(".")
        owner = model.layers[0].get_submodule(parent)
        weight_NK = getattr(owner, leaf).weight
        setattr(owner, leaf, TrainableLinear(quantized, weight_NK.cpu()).to(weight_NK.device))
    device = next(model.parameters()).device
    before = relative_error(model, inputs, wanted_STD, device)
    optimizer = torch.optim.Adam(trainable_groups(model, learning_rate, norms=False), betas=BETAS, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    windows, positions, _ = inputs.x_STD.shape
    per_batch = min(windows, max(1, BATCH_TOKENS // positions))
    length_S = torch.tensor(inputs.length_S)
    random, queue = torch.Generator().manual_seed(options.seed), list[int]()
    for step in range(steps):
        while len(queue) < per_batch:
            queue += torch.randperm(windows, generator=random).tolist()
        chosen_b = torch.tensor(queue[:per_batch])
        del queue[:per_batch]
        real_bT = torch.arange(positions)[None] < length_S[chosen_b, None]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        harden(model, step / steps)
        optimizer.zero_grad()
        out_bTD = run_layer(model, inputs.x_STD[chosen_b].to(device))
        loss = (out_bTD - wanted_STD[chosen_b].to(device))[real_bT.to(device)].square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
    harden(model, 1.0)
    after = relative_error(model, inputs, wanted_STD, device)
    if not after < before:
        return Tuned(start, before, before)
    return Tuned({name: _linear(model, name, prefix).solved() for name in start}, before, after)


def _linear(model: Any, name: str, prefix: str) -> TrainableLinear:
    linear: TrainableLinear = model.layers[0].get_submodule(name.removeprefix(prefix))
    return linear


@torch.no_grad()
def relative_error(model: Any, inputs: Hidden, wanted_STD: torch.Tensor, device: torch.device) -> float:
    """Squared difference of the layer's outputs from the wanted ones, over the square of what the layer adds."""
    lost = added = 0.0
    for part, valid_bT in inputs.batches():
        valid_bT = valid_bT.to(device)
        wanted_MD = wanted_STD[part].to(device)[valid_bT]
        x_bTD = inputs.x_STD[part].to(device)
        lost += float((run_layer(model, x_bTD)[valid_bT] - wanted_MD).square().sum(dtype=torch.float64))
        added += float((wanted_MD - x_bTD[valid_bT]).square().sum(dtype=torch.float64))
    return lost / added if added > 0 else 0.0
