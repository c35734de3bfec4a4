"""The decoder as ExecuTorch takes it: three parts that XNNPACK runs whole, and what stands between them.

    BeforeAttention   norm → q, k, v on the grid → (norms per head) → rotation
    (between)         write the cache, attend: ExecuTorch's own operators llama::update_cache, llama::custom_sdpa
    AfterAttention    o → add → norm → gate, up, down → add
    Head              norm → output head

Written once for all families; what differs is a column of `nano.families`. Two expressions look odd because
XNNPACK's delegate takes neither a mean nor a slice of a tensor whose length is dynamic:

- the mean of squares is a linear with the row 1/D, and rotate_half one with a matrix of 0, 1 and -1 (exact);
- tanh-GELU is spelled out, because the delegate lowers any `gelu` to the erf form (1e-3 off for Gemma).

Legend: T positions of a call, C positions of the context, S slots of a cache, V vocabulary, D hidden width,
F feed-forward width, H query heads, G key/value heads, A head width, N output channels, K input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from export.arithmetic import Arithmetic
from nano.families import EMBEDDING, FINAL_NORM, HEAD, Family, family_of, layer_prefix
from nano.shapes import SLIDING, ModelShape
from quantize.grid import QuantizedTensor, code_range
from quantize.packed import Int4Checkpoint, unpack_codes


class GridLinear(nn.Module):
    """A linear on the grid whose input is quantized to int8 per token as it runs (XNNPACK qd8 x qb4w or qc8w).

    The codes and scales are handed over as they are: torchao's tensor only says what they mean.
    """

    codes_NK: torch.Tensor
    scale_NG: torch.Tensor
    zero_NG: torch.Tensor

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        self.register_buffer("codes_NK", weight.codes_NK)
        self.register_buffer("scale_NG", weight.scale_NG)
        self.register_buffer("zero_NG", torch.zeros_like(weight.scale_NG, dtype=torch.int8))

    def forward(self, x_K: torch.Tensor) -> torch.Tensor:
        from torchao.quantization import IntxUnpackedToInt8Tensor

        weight_NK = IntxUnpackedToInt8Tensor(
            qdata=self.codes_NK,
            scale=self.scale_NG,
            zero_point=self.zero_NG,
            target_dtype=getattr(torch, f"int{self.bits}"),
            block_size=(1, self.group_size),
            dtype=torch.float32,
            activation_quantization="int8_asym_per_token",
        )
        return F.linear(x_K, weight_NK)


class FloatLinear(nn.Module):
    """A linear that stays float32: an output head that is not on the grid."""

    weight_NK: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight_NK", weight_NK)

    def forward(self, x_K: torch.Tensor) -> torch.Tensor:
        return F.linear(x_K, self.weight_NK)


class Norm(nn.Module):
    """RMS norm over the last dimension, in operators that XNNPACK's delegate takes."""

    weight_D: torch.Tensor
    mean_1D: torch.Tensor

    def __init__(self, weight_D: torch.Tensor, family: Family, eps: float) -> None:
        super().__init__()
        width = weight_D.shape[0]
        self.eps = eps
        self.register_buffer("weight_D", weight_D.float() + family.norm_offset)
        self.register_buffer("mean_1D", torch.full((1, width), 1.0 / width))

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        return x_D * torch.rsqrt(F.linear(x_D * x_D, self.mean_1D) + self.eps) * self.weight_D


class Rotation(nn.Module):
    """Rotary positions in the half-split form: x cos + rotate_half(x) sin."""

    turn_AA: torch.Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        half = head_dim // 2
        turn_AA = torch.zeros(head_dim, head_dim)
        rows = torch.arange(half)
        turn_AA[rows, rows + half], turn_AA[rows + half, rows] = -1.0, 1.0
        self.register_buffer("turn_AA", turn_AA)

    def forward(self, x_1THA: torch.Tensor, cos_1T1A: torch.Tensor, sin_1T1A: torch.Tensor) -> torch.Tensor:
        return x_1THA * cos_1T1A + F.linear(x_1THA, self.turn_AA) * sin_1T1A


@dataclass(frozen=True)
class Source:
    """Where a part takes its weights from.

    Attributes:
        checkpoint: the int4 folder.
        prefix: of the layer's names; empty for the head.
        eps: of every norm.
    """

    checkpoint: Int4Checkpoint
    prefix: str
    eps: float

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.checkpoint.shape.family)

    def linear(self, name: str) -> nn.Module:
        """A linear by its name within the layer: on the grid where the checkpoint has it so, else float32."""
        module = self.prefix + name
        if module in self.checkpoint:
            return GridLinear(self.checkpoint.quantized(module))
        return FloatLinear(self.checkpoint.dense(f"{module}.weight").float())

    def norm(self, name: str) -> Norm:
        """A norm by its name within the layer."""
        return Norm(self.checkpoint.dense(f"{self.prefix}{name}.weight"), self.family, self.eps)


class BeforeAttention(nn.Module):
    """x (1, T, D), cos and sin (1, T, 1, A) to rotated queries (1, T, H, A), rotated keys and values (1, T, G, A)."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        shape = source.checkpoint.shape
        self.heads, self.kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.norm = source.norm(source.family.layer_norms[0])
        self.q_proj = source.linear("self_attn.q_proj")
        self.k_proj = source.linear("self_attn.k_proj")
        self.v_proj = source.linear("self_attn.v_proj")
        self.q_norm = source.norm("self_attn.q_norm") if source.family.qk_norm else nn.Identity()
        self.k_norm = source.norm("self_attn.k_norm") if source.family.qk_norm else nn.Identity()
        self.rotate = Rotation(shape.head_dim)

    def forward(
        self, x_1TD: torch.Tensor, cos_1T1A: torch.Tensor, sin_1T1A: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        h_1TD = self.norm(x_1TD)
        q_1THA = self.q_proj(h_1TD).view(1, -1, self.heads, self.head_dim)
        k_1TGA = self.k_proj(h_1TD).view(1, -1, self.kv_heads, self.head_dim)
        v_1TGA = self.v_proj(h_1TD).view(1, -1, self.kv_heads, self.head_dim)
        q_1THA = self.rotate(self.q_norm(q_1THA), cos_1T1A, sin_1T1A)
        k_1TGA = self.rotate(self.k_norm(k_1TGA), cos_1T1A, sin_1T1A)
        return q_1THA, k_1TGA, v_1TGA


class AfterAttention(nn.Module):
    """Attention's output (1, T, H, A) and the residual x (1, T, D) to the next layer's x (1, T, D)."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        shape, family = source.checkpoint.shape, source.family
        self.width = shape.num_heads * shape.head_dim
        self.activation = _ACTIVATIONS[family.activation]
        names = family.layer_norms
        self.post_attention_norm = source.norm(names[1]) if family.post_norms else nn.Identity()
        self.norm = source.norm(names[2] if family.post_norms else names[1])
        self.post_mlp_norm = source.norm(names[3]) if family.post_norms else nn.Identity()
        self.o_proj = source.linear("self_attn.o_proj")
        self.gate_proj = source.linear("mlp.gate_proj")
        self.up_proj = source.linear("mlp.up_proj")
        self.down_proj = source.linear("mlp.down_proj")

    def forward(self, attention_1THA: torch.Tensor, x_1TD: torch.Tensor) -> torch.Tensor:
        x_1TD = x_1TD + self.post_attention_norm(self.o_proj(attention_1THA.view(1, -1, self.width)))
        h_1TD = self.norm(x_1TD)
        h_1TF = self.activation(self.gate_proj(h_1TD)) * self.up_proj(h_1TD)
        out_1TD: torch.Tensor = x_1TD + self.post_mlp_norm(self.down_proj(h_1TF))
        return out_1TD


class Head(nn.Module):
    """x (1, T, D) to logits (1, T, V)."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.norm = source.norm(FINAL_NORM)
        self.head = source.linear(EMBEDDING if source.checkpoint.shape.tied else HEAD)

    def forward(self, x_1TD: torch.Tensor) -> torch.Tensor:
        logits_1TV: torch.Tensor = self.head(self.norm(x_1TD))
        return logits_1TV


def silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return x * torch.sigmoid(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): Hendrycks and Gimpel, arXiv:1606.08415."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": silu, "gelu_pytorch_tanh": gelu_tanh}


class Embedding(nn.Module):
    """Token ids (1, T) to x (1, T, D): float32, or 4-bit or 8-bit rows dequantised as they are looked up."""

    table_VD: torch.Tensor
    scale_VG: torch.Tensor

    def __init__(self, checkpoint: Int4Checkpoint) -> None:
        super().__init__()
        shape = checkpoint.shape
        self.scale = math.sqrt(shape.hidden_size) if family_of(shape.family).scaled_embedding else None
        self.bits = 32
        if EMBEDDING not in checkpoint:
            self.register_buffer("table_VD", checkpoint.dense(f"{EMBEDDING}.weight").float())
            return
        self.bits = checkpoint.layout(EMBEDDING).bits
        words_VW = checkpoint.words(EMBEDDING, 0, shape.vocab_size)
        table_VD = swapped_nibbles(words_VW) if self.bits == 4 else unpack_codes(words_VW, shape.hidden_size, self.bits)
        self.register_buffer("table_VD", table_VD)
        self.register_buffer("scale_VG", checkpoint.scales(EMBEDDING))

    def forward(self, ids_1T: torch.Tensor) -> torch.Tensor:
        if self.bits == 32:
            x_1TD = F.embedding(ids_1T, self.table_VD)
        else:
            # ExecuTorch's own operators (kernels/quantized/cpu/op_embedding4b.cpp, op_embedding.cpp)
            ops = torch.ops.quantized_decomposed
            lookup = ops.embedding_4bit.dtype if self.bits == 4 else ops.embedding_byte.dtype
            low, high = code_range(self.bits)
            x_1TD = lookup(self.table_VD, self.scale_VG, None, low, high, ids_1T, dtype=torch.float32)
        return x_1TD if self.scale is None else x_1TD * self.scale


def swapped_nibbles(words_VW: torch.Tensor) -> torch.Tensor:
    """The checkpoint's words (V, W) as embedding_4bit's uint8 (V, D / 2).

    Both hold code + 8, two a byte; the checkpoint's even column lies in the low nibble, the operator's in the high.
    """
    bytes_VB = words_VW.view(torch.uint8)
    return (bytes_VB << 4).bitwise_or_(bytes_VB >> 4)


@dataclass(frozen=True)
class CachePlan:
    """How the KV cache is laid out.

    Attributes:
        context: C.
        chunk: the longest call.
        window: of sliding layers, or None where none slides within this context.
        ring_slots: slots of a sliding layer's ring: the window and room for a chunk, at most the context.
    """

    context: int
    chunk: int
    window: int | None
    ring_slots: int

    @classmethod
    def of(cls, shape: ModelShape, context: int, chunk: int) -> CachePlan:
        """The plan for a model: a ring wherever the window is shorter than the context."""
        window = shape.sliding_window if SLIDING in shape.layer_types else None
        if window is None or window >= context:
            return cls(context, chunk, None, context)
        return cls(context, chunk, window, min(context, window + chunk - 1))

    def slots(self, kind: str) -> int:
        """Slots of a layer of a kind."""
        return self.ring_slots if kind == SLIDING else self.context


class Decoder(nn.Module):
    """The whole model: ids (1, T) and the position of the first of them (1,) to logits.

    Args:
        checkpoint: gives the embedding; all other weights are in the parts.
        arithmetic: attention scale and rotation tables.
        plan: the caches.
        parts: (before, after) for each layer, and the head: lowered delegates, or the torch modules themselves.
        last_only: logits of the last position (1, 1, V), else of all (1, T, V).
    """

    def __init__(
        self,
        checkpoint: Int4Checkpoint,
        arithmetic: Arithmetic,
        plan: CachePlan,
        parts: tuple[list[tuple[nn.Module, nn.Module]], nn.Module],
        last_only: bool,
    ) -> None:
        super().__init__()
        shape = checkpoint.shape
        self.plan, self.last_only, self.kinds = plan, last_only, shape.layer_types
        self.attention_scale = arithmetic.attention_scale
        self.embedding = Embedding(checkpoint)
        self.before = nn.ModuleList(before for before, _after in parts[0])
        self.after = nn.ModuleList(after for _before, after in parts[0])
        self.head = parts[1]
        for kind, (cos_CA, sin_CA) in arithmetic.rotation.items():
            self.register_buffer(f"cos_{kind}", cos_CA)
            self.register_buffer(f"sin_{kind}", sin_CA)
        for layer, kind in enumerate(self.kinds):
            for name in ("keys", "values"):
                cache_1SGA = torch.zeros(1, plan.slots(kind), shape.num_kv_heads, shape.head_dim)
                self.register_buffer(f"{name}_{layer}", cache_1SGA, persistent=False)

    def forward(self, ids_1T: torch.Tensor, start_1: torch.Tensor) -> torch.Tensor:
        start = cast(int, start_1[0].item())  # a symbol while tracing
        length = ids_1T.shape[1]
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(start + length <= self.plan.context)  # type: ignore[no-untyped-call]
        positions_T = start_1 + torch.arange(length)
        rotation = {kind: self._rotation(kind, positions_T) for kind in dict.fromkeys(self.kinds)}
        ring = self._ring(positions_T) if self.plan.window else None
        x_1TD = self.embedding(ids_1T)
        for layer, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            kind = self.kinds[layer]
            q_1THA, k_1TGA, v_1TGA = before(x_1TD, *rotation[kind])
            keys_1SGA, values_1SGA = getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")
            attend = self._attend_ring if ring is not None and kind == SLIDING else self._attend
            x_1TD = after(attend(q_1THA, (k_1TGA, keys_1SGA), (v_1TGA, values_1SGA), start, ring), x_1TD)
        logits: torch.Tensor = self.head(x_1TD[:, -1:] if self.last_only else x_1TD)
        return logits

    def _rotation(self, kind: str, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (1, T, 1, A) of some positions."""
        halves = (getattr(self, f"{name}_{kind}")[positions_T] for name in ("cos", "sin"))
        cos, sin = (torch.cat((half, half), -1)[None, :, None] for half in halves)
        return cos, sin

    def _attend(
        self,
        q_1THA: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        values: tuple[torch.Tensor, torch.Tensor],
        start: int,
        _ring: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Write new keys and values at `start`, attend causally to everything up to each position."""
        for new, cache in (keys, values):
            torch.ops.llama.update_cache(new, cache, start)
        out: torch.Tensor = torch.ops.llama.custom_sdpa(
            q_1THA, keys[1], values[1], start, None, 0.0, True, self.attention_scale
        )
        return out

    def _attend_ring(
        self,
        q_1THA: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        values: tuple[torch.Tensor, torch.Tensor],
        start: int,
        ring: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """The same within a window: slots are reused, and a mask says which position each slot holds."""
        assert ring is not None
        slots_1T, mask_TS = ring
        for new, cache in (keys, values):
            torch.ops.llama.update_cache_with_indices(new, cache, start, slots_1T)
        out: torch.Tensor = torch.ops.llama.custom_sdpa(
            q_1THA, keys[1], values[1], 0, mask_TS, 0.0, False, self.attention_scale
        )
        return out

    def _ring(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots that the new positions go to (1, T), and the additive mask (T, S).

        Slot s holds the latest position p <= end with p = s (mod S); it is negative where nothing was written yet.
        """
        count, window = self.plan.ring_slots, self.plan.window
        assert window is not None
        end = positions_T[-1]
        held_1S = (end - torch.remainder(end - torch.arange(count), count))[None]
        query_T1 = positions_T[:, None]
        seen_TS = (held_1S <= query_T1) & (held_1S > query_T1 - window) & (held_1S >= 0)
        mask_TS = torch.where(seen_TS, 0.0, float("-inf"))
        return torch.remainder(positions_T, count)[None], mask_TS


def layer_source(checkpoint: Int4Checkpoint, layer: int, eps: float) -> Source:
    """Where layer `layer` takes its weights from."""
    return Source(checkpoint, layer_prefix(layer), eps)
