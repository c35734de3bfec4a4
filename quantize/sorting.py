"""Channels put into an order that suits the grid: like weights share a group, and so a scale.

The numbering of a layer's feed-forward neurons and of the residual stream's dimensions is arbitrary: any order computes
the same. Sorted by the size of the weights that read them, a group of 32 input channels holds weights of one size, and
its scale wastes fewer codes on the small ones. stories260K, KL of recover after 4,000 steps: 0.0187 against 0.0193.

Legend: D model width, F feed-forward width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nano.families import EMBEDDING, FINAL_NORM, HEAD, family_of, layer_prefix
from quantize.student import Student
from quantize.view import StudentView

if TYPE_CHECKING:
    import torch

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Linears whose input channels are the stream's dimensions."""

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Linears whose output channels are."""


def sorted_channels(student: Student) -> Student:
    """A view of the student with neurons and the stream's dimensions in order of their largest weights."""
    stream_D = stream_order(student)
    neurons_F = {layer_prefix(i): neuron_order(student, i) for i in range(student.shape.num_layers)}
    norms = family_of(student.shape.family).layer_norms

    def change(name: str) -> torch.Tensor:
        tensor, module = student.tensor(name), name.removesuffix(".weight")
        if module in (EMBEDDING, HEAD):
            return tensor[:, stream_D]
        if module == FINAL_NORM:
            return tensor[stream_D]
        prefix = next(prefix for prefix in neurons_F if module.startswith(prefix))
        leaf = module.removeprefix(prefix)
        if leaf in READERS:
            tensor = tensor[:, stream_D]
            return tensor[neurons_F[prefix]] if leaf.startswith("mlp.") else tensor
        if leaf in WRITERS:
            tensor = tensor[stream_D]
            return tensor[:, neurons_F[prefix]] if leaf.startswith("mlp.") else tensor
        return tensor[stream_D] if leaf in norms else tensor

    return StudentView(student, change)


def stream_order(student: Student) -> torch.Tensor:
    """The stream's dimensions (D,), those first whose largest weight in a reader is large, on the mean over readers."""
    import torch

    size_D = torch.zeros(student.shape.hidden_size)
    for layer in range(student.shape.num_layers):
        for reader in READERS:
            weight_ND = student.tensor(f"{layer_prefix(layer)}{reader}.weight").float().abs()
            size_D += weight_ND.amax(0) / weight_ND.mean()
    return size_D.argsort(descending=True, stable=True)


def neuron_order(student: Student, layer: int) -> torch.Tensor:
    """A layer's neurons (F,), those first whose largest weight in down_proj is large."""
    weight_DF = student.tensor(f"{layer_prefix(layer)}mlp.down_proj.weight").float()
    return weight_DF.abs().amax(0).argsort(descending=True, stable=True)
