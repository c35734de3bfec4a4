"""The network one decoder layer at a time, run by transformers' own code.

A layer is run as a transformers model of one layer: masks, rotary angles and layer kinds (Gemma's and Qwen's
sliding windows) are then the library's own, for every family, and only one layer's weights are in memory.

Legend: S windows, T positions, D hidden width, K input channels of a linear, M valid positions of a batch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from nano.families import EMBEDDING, layer_prefix, weight_shapes
from nano.shapes import ModelShape
from quantize.grid import QuantizedTensor
from quantize.student import Student

BATCH_TOKENS = 4096
"""Positions run at once: enough to keep the cores busy, small beside the weights of a layer."""


@dataclass
class LayerResult:
    """One layer on the grid.

    Attributes:
        weights: by full module name.
        error: relative squared output error of each on the calibration text (of its weights, for rtn).
        rounding_error: the same if its target were just rounded to nearest.
        floats: tensors of the layer that stay float but were changed (folded norms), by full tensor name.
        layer_error: where the layer was tuned as a whole, its outputs' relative squared error before and after.
    """

    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    rounding_error: dict[str, float] = field(default_factory=dict)
    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    layer_error: tuple[float, float] | None = None


Finished = Callable[[int], LayerResult | None]
"""What an earlier, interrupted run left of a layer."""


@dataclass
class Hidden:
    """Hidden states of the calibration windows between two layers.

    Attributes:
        x_STD: float32; windows are padded on the right, which causal attention never looks at.
        length_S: how many positions of a window are real.
    """

    x_STD: torch.Tensor
    length_S: list[int]

    def batches(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of S of about `BATCH_TOKENS` positions, and which of their positions (b, T) are real."""
        windows, positions, _ = self.x_STD.shape
        per_batch = max(1, BATCH_TOKENS // positions)
        for start in range(0, windows, per_batch):
            part = slice(start, min(start + per_batch, windows))
            length_b1 = torch.tensor(self.length_S[part])[:, None]
            yield part, torch.arange(positions)[None] < length_b1


def embed(student: Student, windows: list[torch.Tensor]) -> Hidden:
    """What the first layer sees of some windows of token ids."""
    lengths = [len(window) for window in windows]
    ids_ST = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=0)
    model = _skeleton(student.config, student.shape, 0)
    used_U, place_ST = torch.unique(ids_ST, return_inverse=True)  # a large vocabulary in float32 would be gigabytes
    weight_UD = student.tensor(EMBEDDING + ".weight")[used_U].float()
    model.embed_tokens.weight = torch.nn.Parameter(weight_UD, requires_grad=False)
    model.embed_tokens.padding_idx = None
    if hasattr(model.embed_tokens, "embed_scale"):  # Gemma: sqrt(D), as transformers computes it
        model.embed_tokens.embed_scale = torch.tensor(model.embed_tokens.scalar_embed_scale)
    with torch.no_grad():
        return Hidden(model.embed_tokens(place_ST).float(), lengths)


def load_layer(student: Student, layer: int, device: torch.device | None = None) -> Any:
    """Decoder layer `layer` as a one-layer transformers model without final norm, float32."""
    model = _skeleton(student.config, student.shape, layer)
    model.embed_tokens = torch.nn.Identity()
    prefix = layer_prefix(layer)
    names = [name for name in weight_shapes(student.shape) if name.startswith(prefix)]
    state = {name.removeprefix(prefix): student.tensor(name).float() for name in names}
    model.layers[0].load_state_dict(state, assign=True)
    return model.to(device or "cpu").eval().requires_grad_(False)


def transformers_config(config: dict[str, Any], family: str) -> Any:
    """config.json as transformers' object of a family, without the type that the weights are stored in."""
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    return AutoConfig.for_model(family, **copy.deepcopy(plain))


def _skeleton(config: dict[str, Any], shape: ModelShape, layer: int) -> Any:
    """A one-layer model whose weights are not there yet; buffers (rotary frequencies) are."""
    from transformers import AutoModel

    one = transformers_config(config, shape.family)
    one.num_hidden_layers = 1
    if getattr(one, "layer_types", None) is not None:
        one.layer_types = [shape.layer_types[layer]]
    with torch.device("meta"):
        model = AutoModel.from_config(one, dtype=torch.float32)
    model.rotary_emb = type(model.rotary_emb)(config=one)
    model.norm = torch.nn.Identity()
    return model


def run_layer(model: Any, x_bTD: torch.Tensor) -> torch.Tensor:
    """Output of the layer for a batch of hidden states."""
    out: torch.Tensor = model(inputs_embeds=x_bTD, use_cache=False).last_hidden_state
    return out


@torch.no_grad()
def advance(model: Any, hidden: Hidden, device: torch.device) -> None:
    """Replace the hidden states by the layer's outputs."""
    for part, _valid in hidden.batches():
        hidden.x_STD[part] = run_layer(model, hidden.x_STD[part].to(device)).to(hidden.x_STD.device)


@dataclass(frozen=True)
class Seen:
    """What one linear of a layer sees in one batch.

    Attributes:
        x_bTK: its inputs.
        residual_bTD: the residual stream that its block's output is added to.
        valid_bT: which positions are real.
    """

    x_bTK: torch.Tensor
    residual_bTD: torch.Tensor
    valid_bT: torch.Tensor


class _Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass once the linear of interest has its input."""


@torch.no_grad()
def linear_inputs(model: Any, linear: str, hidden: Hidden, device: torch.device) -> Iterator[Seen]:
    """What one linear of the layer sees, batch by batch; the layer is run no further than to it."""
    inputs: list[torch.Tensor] = []
    residuals: list[torch.Tensor] = []

    def stop(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.append(arguments[0])
        raise _Stop

    block = model.layers[0]
    norm = block.input_layernorm if linear.startswith("self_attn.") else _second_norm(block)
    handles = [
        block.get_submodule(linear).register_forward_pre_hook(stop),
        norm.register_forward_pre_hook(lambda _module, arguments: residuals.append(arguments[0])),
    ]
    try:
        for part, valid_bT in hidden.batches():
            with contextlib.suppress(_Stop):
                run_layer(model, hidden.x_STD[part].to(device))
            yield Seen(inputs.pop(), residuals.pop(), valid_bT)
    finally:
        for handle in handles:
            handle.remove()


def _second_norm(block: Any) -> Any:
    """The norm before the MLP, whose input is the residual stream (Gemma calls it otherwise)."""
    gemma = hasattr(block, "pre_feedforward_layernorm")
    return block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm


class _HeadsHaveRun(torch.nn.Module):
    """An attention block of which only the output projection is left to run, on inputs that are known."""

    def __init__(self, o_proj: Any, x_bTK: torch.Tensor) -> None:
        super().__init__()
        self.o_proj, self.x_bTK = o_proj, x_bTK

    def forward(self, *_arguments: Any, **_named: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(self.x_bTK), None


class _NoAttention(torch.nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *_arguments: Any, **_named: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


@torch.no_grad()
def pass_attention(model: Any, hidden: Hidden, attended: list[torch.Tensor], device: torch.device) -> None:
    """Move hidden states behind the layer's attention block, which is then gone from the layer.

    Attention is the dear part of a small layer and an MLP's inputs are asked for three times; this way the heads
    run once.

    Args:
        model: the layer, its output projection as it shall be.
        hidden: replaced by the residual stream between attention and MLP.
        attended: the output projection's inputs, one (b, T, K) a batch of `hidden`; emptied.
        device: where the layer runs.
    """
    block = model.layers[0]
    o_proj = block.self_attn.o_proj
    attended.reverse()
    for part, _valid in hidden.batches():
        block.self_attn = _HeadsHaveRun(o_proj, attended.pop().to(device))
        after: list[torch.Tensor] = []

        def stop(_module: Any, arguments: tuple[torch.Tensor, ...], after: list[torch.Tensor] = after) -> None:
            after.append(arguments[0])
            raise _Stop

        handle = _second_norm(block).register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(_Stop):
                run_layer(model, hidden.x_STD[part].to(device))
        finally:
            handle.remove()
        hidden.x_STD[part] = after.pop().to(hidden.x_STD.device)
    block.self_attn = _NoAttention()
