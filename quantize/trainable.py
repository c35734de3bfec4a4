"""A linear whose weight lives on the grid and can be trained.

A weight becomes a real number u counted in codes; the forward pass uses round(u) x scale, the backward pass treats
rounding as the identity (straight-through, 1308.3432). Counting in codes makes one learning rate fit every layer of
every model: it says how many codes a weight may move a step. A scale trains as its logarithm and goes through
bfloat16 in every forward pass, so what is trained is what the phone computes.

A forward pass may round only partly: codes + (1 - hardness) x (u - codes). Training that begins soft and hardens
decides each rounding while its neighbours can still give way.

Legend: N output channels, K input channels, G groups, g group size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from quantize.grid import QuantizedTensor, bf16_exact, code_range

LEAN = 0.8
"""How far from the middle of its code towards the float weight a u begins. In the middle (0) no weight can change
its code for the first tens of steps and then all do at once: KL 0.0305 against 0.0289 after 160 steps on stories260K.
"""


HARD_AT = 0.7
"""Share of the training after which rounding is whole. From the start (0): KL 0.0247 after 2,000 steps on stories260K,
against 0.0228."""

BETAS = (0.9, 0.99)
"""Adam's: the second moment forgets faster than usual, since runs are of hundreds of steps, not of thousands."""


TABLE_RATE = 0.4
"""Of a float embedding's or head's standard deviation, how much it may move a step for each code of a weight's rate."""


class _OnGrid(torch.autograd.Function):
    """(u, scale) to the weight round(u) x bf16(scale), or partly rounded, with straight-through gradients."""

    @staticmethod
    def forward(
        ctx: Any, u_NGg: torch.Tensor, scale_NG: torch.Tensor, low: Any, high: Any, hardness: float
    ) -> torch.Tensor:
        exact_NG1 = bf16_exact(scale_NG)[..., None]
        codes_NGg = u_NGg.round().clamp_(low, high)
        if hardness < 1:
            codes_NGg.lerp_(u_NGg.clamp(low - 0.5, high + 0.5), 1 - hardness)
        ctx.save_for_backward(u_NGg, codes_NGg, exact_NG1)
        ctx.limits = (low - 0.5, high + 0.5)
        return codes_NGg * exact_NG1

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        u_NGg, codes_NGg, exact_NG1 = ctx.saved_tensors
        low, high = ctx.limits
        (grad_NGg,) = grads
        inside_NGg = (u_NGg >= low) & (u_NGg <= high)
        return grad_NGg * exact_NG1 * inside_NGg, (grad_NGg * codes_NGg).sum(-1), None, None, None


class TrainableLinear(torch.nn.Module):
    """A linear whose weight lives on the grid and can be trained.

    Attributes:
        u_NGg: the weight counted in codes (less the zero point, which stays as it is).
        log_scale_NG: natural logarithm of each scale.
        hardness: 1 rounds, 0 does not, between is between.
    """

    hardness = 1.0
    zero_NG: torch.Tensor | None

    def __init__(self, start: QuantizedTensor, weight_NK: torch.Tensor) -> None:
        super().__init__()
        self.bits, self.group_size = start.bits, start.group_size
        n, k = start.codes_NK.shape
        self.register_buffer("zero_NG", start.zero_NG, persistent=False)
        codes_NGg = start.codes_NK.float().view(n, k // start.group_size, start.group_size)
        if start.zero_NG is not None:
            codes_NGg = codes_NGg - start.zero_NG.float()[..., None]
        float_NGg = weight_NK.float().view_as(codes_NGg) / start.scale_NG[..., None]
        lean_NGg = LEAN * (float_NGg - codes_NGg).clamp(-0.5, 0.5)
        self.u_NGg = torch.nn.Parameter(codes_NGg + lean_NGg)
        self.log_scale_NG = torch.nn.Parameter(start.scale_NG.log())

    def forward(self, x_K: torch.Tensor) -> torch.Tensor:
        arguments = (self.u_NGg, self.log_scale_NG.exp(), *self._limits(), self.hardness)
        weight_NGg: torch.Tensor = _OnGrid.apply(*arguments)  # type: ignore[no-untyped-call]
        return F.linear(x_K, weight_NGg.flatten(1))

    def _limits(self) -> tuple[Any, Any]:
        """Smallest and largest level: numbers, or (N, G, 1) where there are zero points."""
        low, high = code_range(self.bits)
        if self.zero_NG is None:
            return low, high
        zero_NG1 = self.zero_NG.float()[..., None]
        return low - zero_NG1, high - zero_NG1

    @torch.no_grad()
    def solved(self) -> QuantizedTensor:
        """The weight as it is on the grid now."""
        codes_NGg = self.u_NGg.round().clamp(*self._limits())
        if self.zero_NG is not None:
            codes_NGg += self.zero_NG[..., None]
        codes_NK, scale_NG = codes_NGg.to(torch.int8).flatten(1), bf16_exact(self.log_scale_NG.exp())
        return QuantizedTensor(codes_NK, scale_NG, self.group_size, self.bits, self.zero_NG).cpu()


def trainable_groups(
    model: torch.nn.Module, learning_rate: float, norms: bool, tables: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Adam's parameter groups: what trains (and is now told so), each kind at its own rate.

    Args:
        model: holds `TrainableLinear`s.
        learning_rate: codes a weight may move a step.
        norms: whether the model's norms train too.
        tables: full names of embeddings and heads that stay float and train too.
    """
    rates = {"u_NGg": learning_rate, "log_scale_NG": learning_rate / 40}
    if norms:
        rates["norm.weight"] = learning_rate / 20
    groups = []
    for ending, rate in rates.items():
        chosen = [p.requires_grad_() for name, p in model.named_parameters() if name.endswith(ending)]
        groups.append({"params": chosen, "lr": rate})
    for name in tables:
        table = model.get_parameter(name).requires_grad_()
        groups.append({"params": [table], "lr": learning_rate * TABLE_RATE * float(table.detach().std())})
    return groups


def harden(model: torch.nn.Module, progress: float) -> None:
    """Set every linear's hardness to what it should be at some progress (0 to 1) of the training."""
    for module in model.modules():
        if isinstance(module, TrainableLinear):
            module.hardness = min(1.0, progress / HARD_AT)
