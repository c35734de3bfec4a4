"""What training needs of a transformers model: hidden states of a packed batch, its head, and a student built anew.

Logits are never asked of the model: the loss makes them from hidden states, a few tokens at a time.

Legend: B rows, T positions, N positions that carry a token, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distill.data import Batch
from distill.packing import PAD
from nano.shapes import FULL, SLIDING, ModelShape


def attention_masks(batch: Batch, shape: ModelShape, dtype: torch.dtype) -> Any:
    """What the model takes as attention_mask: none for whole rows, else who may see whom, by kind of layer.

    Args:
        batch: packed rows.
        shape: of the model.
        dtype: of its queries; a mask of that type is added as it is, a bool one is converted anew by every layer.

    Returns:
        None; (B, 1, T, T) of 0 and -inf; or, for families whose layers differ in kind, one for each kind.
    """
    if batch.whole:
        return None
    T = batch.segment_BT.shape[1]
    at_T = torch.arange(T, device=batch.segment_BT.device)
    same_BTT = batch.segment_BT[:, :, None] == batch.segment_BT[:, None, :]
    full_B1TT = (same_BTT & (at_T[:, None] >= at_T[None, :])).unsqueeze(1)
    if shape.family == "llama":
        return _additive(full_B1TT, dtype)
    if shape.sliding_window is None:
        return {FULL: _additive(full_B1TT, dtype)}
    near_TT = at_T[:, None] - at_T[None, :] < shape.sliding_window
    return {FULL: _additive(full_B1TT, dtype), SLIDING: _additive(full_B1TT & near_TT, dtype)}


def _additive(may_see: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros_like(may_see, dtype=dtype).masked_fill_(~may_see, float("-inf"))


def hidden_states(model: Any, shape: ModelShape, batch: Batch) -> torch.Tensor:
    """What the head sees at the positions that carry a token: (N, D)."""
    device = batch.ids_BT.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    out = model.model(input_ids=batch.ids_BT, attention_mask=attention_masks(batch, shape, dtype), use_cache=False)
    flat: torch.Tensor = out.last_hidden_state.flatten(0, 1)
    padded = batch.real_N.numel() != flat.shape[0]
    return flat[batch.real_N] if padded else flat


def head_weight(model: Any) -> torch.Tensor:
    """The output head's weight, (V, D); of a tied model the embedding."""
    weight: torch.Tensor = model.lm_head.weight
    return weight


def linear_weight(linear: Any) -> torch.Tensor:
    """A linear's weight, (N, K), as numbers: what bitsandbytes keeps in 4 or 8 bits is worked out."""
    weight = linear.weight.detach()
    if getattr(linear.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        whole: torch.Tensor = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        return whole
    scale_N = getattr(linear.weight, "SCB", None)
    if scale_N is None:  # bitsandbytes moves it there at the first product
        scale_N = getattr(getattr(linear, "state", None), "SCB", None)
    numbers: torch.Tensor = weight if scale_N is None else weight.float() * scale_N.float().view(-1, 1) / 127
    return numbers


def new_model(config: Mapping[str, Any], seed: int = 0) -> Any:
    """A float32 model of a config.json, initialised as transformers does from `seed`; the global seed is kept."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model(config["model_type"], **settings)
        return AutoModelForCausalLM.from_config(
            made, dtype=torch.float32
        ).eval()  # no dropout, whatever the config says


def blank_model(config: Any, dtype: torch.dtype) -> Any:
    """A model of transformers' config object that has no memory yet (on torch's "meta" device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def load_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put every named tensor into a model; a tied head follows its embedding."""
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    missing = [name for name in missing if not (name == "lm_head.weight" and model.config.tie_word_embeddings)]
    assert not missing, missing  # weight_shapes and transformers disagree about the family
    assert not unexpected, unexpected


@contextmanager
def skipped(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """Run a model as if it had not some of its layers: while the block runs they pass their input through."""

    def passing(_module: Any, inputs: tuple[torch.Tensor, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before = inputs[0] if inputs else kwargs["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    handles = [model.model.layers[i].register_forward_hook(passing, with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions_of(batch: Batch) -> torch.Tensor:
    """bool (B, T): where a token is."""
    return batch.segment_BT != PAD
