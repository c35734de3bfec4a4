"""The model families nanokit works with: one readable row each, and the tensors a shape implies.

A family is data, not code: the names of its norms, whether queries and keys are normalised, how a norm's
weight is applied, which activation gates the MLP. Everything that differs between Llama, Qwen3 and Gemma 3
anywhere in nanokit is a column here; what does not differ (seven linears a layer, their names, grouped-query
attention, RMS norms, rotary positions) is written once. Facts are from transformers' own
`modeling_llama.py`, `modeling_qwen3.py` and `modeling_gemma3.py`.

Legend: V vocabulary, D hidden width, F feed-forward width, H query heads, G key/value heads, A head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from nano.errors import UnsupportedError

if TYPE_CHECKING:
    from nano.shapes import ModelShape

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
HEAD = "lm_head"
LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Module names of a layer's linears, in the order in which data flows through them."""

QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Family:
    """What sets one model family apart.

    Attributes:
        model_type: `model_type` in config.json.
        architecture: the transformers class that `AutoModelForCausalLM` builds.
        layer_norms: module names of a layer's norms of width D: before attention, then in order.
        post_norms: whether attention's and the MLP's outputs are normalised before they are added.
        qk_norm: whether queries and keys are normalised per head before the rotation.
        norm_offset: what is added to a norm's weight before it multiplies (Gemma: 1).
        scaled_embedding: whether embeddings are multiplied by sqrt(D).
        activation: the gate's nonlinearity as transformers names it.
        tied_by_default: `tie_word_embeddings` where config.json does not say.
        head_dim_default: `head_dim` where config.json does not say; None means D / H.
    """

    model_type: str
    architecture: str
    layer_norms: tuple[str, ...]
    post_norms: bool
    qk_norm: bool
    norm_offset: float
    scaled_embedding: bool
    activation: str
    tied_by_default: bool
    head_dim_default: int | None


_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family(
                model_type="llama",
                architecture="LlamaForCausalLM",
                layer_norms=_PRE_NORMS,
                post_norms=False,
                qk_norm=False,
                norm_offset=0.0,
                scaled_embedding=False,
                activation="silu",
                tied_by_default=False,
                head_dim_default=None,
            ),
            Family(
                model_type="qwen3",
                architecture="Qwen3ForCausalLM",
                layer_norms=_PRE_NORMS,
                post_norms=False,
                qk_norm=True,
                norm_offset=0.0,
                scaled_embedding=False,
                activation="silu",
                tied_by_default=False,
                head_dim_default=128,
            ),
            Family(
                model_type="gemma3_text",
                architecture="Gemma3ForCausalLM",
                layer_norms=(*_PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
                post_norms=True,
                qk_norm=True,
                norm_offset=1.0,
                scaled_embedding=True,
                activation="gelu_pytorch_tanh",
                tied_by_default=True,
                head_dim_default=256,
            ),
        )
    }
)


def family_of(model_type: str) -> Family:
    """The family of a `model_type` as config.json spells it.

    Raises:
        UnsupportedError: it is not one of ours.
    """
    if model_type not in FAMILIES:
        raise UnsupportedError(
            "This model's family is not supported.",
            found=f"model_type '{model_type}'",
            expected="one of " + ", ".join(FAMILIES),
            todo="use a Llama, Qwen3 or Gemma 3 text model",
        )
    return FAMILIES[model_type]


def layer_prefix(layer: int) -> str:
    """Name under which layer `layer`'s modules stand, with the dot."""
    return f"model.layers.{layer}."


def linear_shapes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's seven linears, by module name within the layer."""
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    d, f = shape.hidden_size, shape.intermediate_size
    sizes = ((q_width, d), (kv_width, d), (kv_width, d), (d, q_width), (f, d), (f, d), (d, f))
    return dict(zip(LAYER_LINEARS, sizes, strict=True))


def linear_names(shape: ModelShape) -> list[str]:
    """Full module names of all decoder linears, layer by layer."""
    return [layer_prefix(i) + name for i in range(shape.num_layers) for name in LAYER_LINEARS]


def weight_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a float checkpoint of this shape: name to dimensions. A tied head is not listed."""
    family = family_of(shape.family)
    table: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (shape.vocab_size, shape.hidden_size)}
    for i in range(shape.num_layers):
        prefix = layer_prefix(i)
        for name, size in linear_shapes(shape).items():
            table[f"{prefix}{name}.weight"] = size
        for name in family.layer_norms:
            table[f"{prefix}{name}.weight"] = (shape.hidden_size,)
        if family.qk_norm:
            for name in QK_NORMS:
                table[f"{prefix}{name}.weight"] = (shape.head_dim,)
    table[f"{FINAL_NORM}.weight"] = (shape.hidden_size,)
    if not shape.tied:
        table[f"{HEAD}.weight"] = (shape.vocab_size, shape.hidden_size)
    return table
