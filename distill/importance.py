"""What of the teacher matters, measured by its activations on calibration text, forward passes only.

After Minitron (arXiv 2407.14679, section 2.2); neurons and heads are weighed by the weights that write them, so
that a score is the size of what a part adds to the residual stream and not of a number inside it:

    hidden channel i     sum over norms l that read the residual stream: mean_t |norm_l(x)_i|
    FFN neuron j         rms_t(act(gate)_j * up_j) * ||W_down[:, j]||
    head h               rms_t ||W_o[:, h] attention_h(x)||, of a group: root of the summed squares of its heads
    layer                1 - mean_t cos(x_in, x_out)      (block influence, ShortGPT, arXiv 2403.03853)

Rank correlation with the damage of ablating one part at a time on stories260K: neurons 0.53 and 0.63 (layers 1, 3),
where mean |activation| alone gives 0.34 and 0.58; hidden channels 0.86, weighed by their readers' norms 0.83.

Legend: D hidden width, F feed-forward width, H query heads, A head width, N positions that carry a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from distill.data import Batch
from distill.models import hidden_states, linear_weight, positions_of, skipped
from nano.families import FINAL_NORM, family_of, layer_prefix
from nano.progress import track
from nano.shapes import ModelShape


@dataclass(frozen=True)
class Importance:
    """Scores on the calibration text; only their order within a row matters.

    Attributes:
        hidden_D: float64, of residual channels.
        ffn_LF: of each layer's neurons.
        heads_LH: of each layer's query heads.
        layers_L: block influence.
        energy: for every norm of width D by name: mean over tokens of x_i^2 / mean_j x_j^2 of its input, (D,);
            says how a norm's statistic changes when channels leave.
    """

    hidden_D: torch.Tensor
    ffn_LF: torch.Tensor
    heads_LH: torch.Tensor
    layers_L: torch.Tensor
    energy: dict[str, torch.Tensor]


class _Sums:
    """Running sums that hooks add to; `keep_BT` says which positions of the batch under way count."""

    def __init__(self) -> None:
        self.keep_BT: torch.Tensor | None = None
        self.positions = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def real(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """The positions that count, as float32 (N, X)."""
        assert self.keep_BT is not None
        return x_BTX[self.keep_BT].float()

    def mean(self, name: str) -> torch.Tensor:
        return self._sums[name] / self.positions


def measure(model: Any, shape: ModelShape, batches: list[Batch], dropped: Sequence[int] = ()) -> Importance:
    """Scores of every part of a teacher.

    Args:
        model: transformers' model of the teacher, in evaluation mode.
        shape: its shape.
        batches: calibration text.
        dropped: layers that leave anyway: the others are measured as they work without them.
    """
    sums, watching = _Sums(), track("importance", len(batches), "batches")
    with torch.inference_mode(), skipped(model, dropped), _hooks(model, shape, sums), watching as progress:
        for batch in batches:
            sums.keep_BT = positions_of(batch)
            sums.positions += int(sums.keep_BT.sum())
            hidden_states(model, shape, batch)
            progress.advance()
    return _scores(model, shape, sums)


@contextmanager
def _hooks(model: Any, shape: ModelShape, sums: _Sums) -> Iterator[None]:
    handles = []
    for name in norm_names(shape):
        handles.append(model.get_submodule(name).register_forward_hook(_watch_norm(sums, name)))
    for i in range(shape.num_layers):
        prefix = layer_prefix(i)
        layer = model.get_submodule(prefix.rstrip("."))
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(_watch_neurons(sums, f"{prefix}ffn")))
        weight_DHA = linear_weight(layer.self_attn.o_proj).view(shape.hidden_size, shape.num_heads, shape.head_dim)
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(_watch_heads(sums, f"{prefix}heads", weight_DHA)))  # noqa: E501  # fmt: skip
        handles.append(layer.register_forward_hook(_watch_layer(sums, f"{prefix}layer"), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_norm(sums: _Sums, name: str) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x_ND = sums.real(inputs[0])
        sums.add(f"{name}.energy", (x_ND**2 / (x_ND**2).mean(-1, keepdim=True).clamp_min(1e-30)).sum(0).double())
        sums.add(f"{name}.size", sums.real(output).abs().sum(0).double())

    return hook


def _watch_neurons(sums: _Sums, name: str) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        sums.add(name, (sums.real(inputs[0]) ** 2).sum(0).double())

    return hook


def _watch_heads(sums: _Sums, name: str, weight_DHA: torch.Tensor) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x_N = sums.real(inputs[0])
        x_NHA = x_N.view(x_N.shape[0], *weight_DHA.shape[1:])
        written_NHD = torch.einsum("nha,dha->nhd", x_NHA, weight_DHA.float())
        sums.add(name, (written_NHD**2).sum((0, 2)).double())

    return hook


def _watch_layer(sums: _Sums, name: str) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = inputs[0] if inputs else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine_N = torch.nn.functional.cosine_similarity(sums.real(before), sums.real(after), dim=-1)
        sums.add(name, (1 - cosine_N).sum().double())

    return hook


def norm_names(shape: ModelShape) -> list[str]:
    """Full names of all norms of width D."""
    layer_norms = family_of(shape.family).layer_norms
    return [layer_prefix(i) + norm for i in range(shape.num_layers) for norm in layer_norms] + [FINAL_NORM]


def _reading_norms(shape: ModelShape) -> list[str]:
    """Norms whose input is the residual stream itself; Gemma's others normalise what is about to be added to it."""
    post_norms = family_of(shape.family).post_norms
    added = ("post_attention_layernorm", "post_feedforward_layernorm") if post_norms else ()
    return [name for name in norm_names(shape) if not name.endswith(added)]


def _scores(model: Any, shape: ModelShape, sums: _Sums) -> Importance:
    hidden_D = torch.stack([sums.mean(f"{norm}.size").cpu() for norm in _reading_norms(shape)]).sum(0)
    ffn, heads, layers = [], [], []
    for i in range(shape.num_layers):
        prefix = layer_prefix(i)
        down_DF = linear_weight(model.get_submodule(f"{prefix}mlp.down_proj")).double().cpu()
        ffn.append(sums.mean(f"{prefix}ffn").sqrt().cpu() * down_DF.norm(dim=0))
        heads.append(sums.mean(f"{prefix}heads").sqrt().cpu())
        layers.append(sums.mean(f"{prefix}layer").cpu())
    energy = {name: sums.mean(f"{name}.energy").cpu() for name in norm_names(shape)}
    return Importance(hidden_D, torch.stack(ffn), torch.stack(heads), torch.stack(layers), energy)
