"""What a decoder computes beyond its dimensions: epsilon, attention's scale, rotation tables.

Read from transformers' own configuration and rotary modules, so that every rope variant means here what it means
there; what no writer carries is refused by name.

Legend: C positions of the context, A head width.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from nano.errors import UnsupportedError
from nano.exportable import obstacle
from nano.families import family_of
from nano.shapes import ModelShape
from quantize.packed import Int4Checkpoint

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class Arithmetic:
    """Numbers that a graph carries.

    Attributes:
        eps: of every RMS norm.
        attention_scale: what scores are multiplied by before the softmax.
        rotation: for each kind of layer cos and sin, float32 (C, A / 2).
    """

    eps: float
    attention_scale: float
    rotation: dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_arithmetic(checkpoint: Int4Checkpoint, context: int) -> Arithmetic:
    """The arithmetic of a checkpoint for `context` positions.

    Raises:
        UnsupportedError: soft-capped or bidirectional attention, or a rotation that depends on the text's length.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    check_config(config, checkpoint.shape)
    width = getattr(config, "query_pre_attn_scalar", None) or checkpoint.shape.head_dim
    return Arithmetic(
        eps=float(config.rms_norm_eps),
        attention_scale=float(width) ** -0.5,
        rotation=rotation_tables(checkpoint.shape, config, context),
    )


def check_config(config: Any, shape: ModelShape) -> None:
    """Refuse settings of a transformers configuration that no writer carries."""
    found = obstacle(config.to_dict(), family_of(shape.family))
    if found:
        raise UnsupportedError(found.problem, found=found.found, expected=found.expected)


def rotation_tables(shape: ModelShape, config: Any, context: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin, float32 (C, A / 2), for each kind of layer, by transformers' own rotary module."""
    import transformers

    architecture = family_of(shape.family).architecture
    modeling = sys.modules[getattr(transformers, architecture).__module__]
    rotary = getattr(modeling, architecture.replace("ForCausalLM", "RotaryEmbedding"))(config=config)
    positions_1C, x = torch.arange(context)[None], torch.zeros(1)
    half = shape.head_dim // 2
    tables: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for kind in sorted(set(shape.layer_types)):
        # Gemma 3 has a rotation for each kind of layer, the others one for all
        arguments = (kind,) if hasattr(rotary, f"{kind}_inv_freq") else ()
        with torch.no_grad():
            cos_1CA, sin_1CA = rotary(x, positions_1C, *arguments)
        assert cos_1CA.shape == (1, context, shape.head_dim), cos_1CA.shape
        tables[kind] = (cos_1CA[0, :, :half].contiguous(), sin_1CA[0, :, :half].contiguous())
    return tables


def resolve_context(shape: ModelShape, requested: int) -> int:
    """The context that an export holds: as requested, or the model's own limit, at most 2,048, for 0.

    Raises:
        UnsupportedError: more positions than the model was trained for.
    """
    context = requested or min(shape.max_positions, DEFAULT_CONTEXT)
    if not 1 <= context <= shape.max_positions:
        raise UnsupportedError(
            "The context does not fit the model.",
            found=f"--context {requested}",
            expected=f"at most the {shape.max_positions} positions that it was trained for",
        )
    return context
