"""The decoder as ExecuTorch takes it: three kinds of part that XNNPACK runs whole, and what stands between them.

    Embedding         ExecuTorch's own lookups of 4-bit and 8-bit rows
    BeforeAttention   (see `export.executorch_parts`)
    (between)         write the cache, attend: ExecuTorch's own operators llama::update_cache, llama::custom_sdpa
    AfterAttention
    Head

Legend: T positions of a call, C positions of the context, S slots of a cache, V vocabulary, D hidden width,
H query heads, G key/value heads (or groups of a grid), A head width, B bytes of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from export.arithmetic import Arithmetic
from nano.families import EMBEDDING, family_of
from nano.shapes import SLIDING, ModelShape
from quantize.grid import code_range
from quantize.packed import Int4Checkpoint, unpack_codes


class Embedding(nn.Module):
    """Token ids (1, T) to x (1, T, D): float32, or 4-bit or 8-bit rows dequantised as they are looked up.

    On the grid its table is the very bytes that XNNPACK takes for a head tied to it, so that a file holds them once
    (`export.executorch_tie`). Both store code + 8 in 4 bits, two a byte; XNNPACK's even column, which is the
    checkpoint's too, lies in the low nibble, the lookup's in the high one. So the lookup gives each pair of columns
    swapped, and they are swapped back.
    """

    table_VB: torch.Tensor
    scale_VG: torch.Tensor

    def __init__(self, checkpoint: Int4Checkpoint) -> None:
        super().__init__()
        shape = checkpoint.shape
        self.scale = math.sqrt(shape.hidden_size) if family_of(shape.family).scaled_embedding else None
        self.bits = 32
        if EMBEDDING not in checkpoint:
            self.register_buffer("table_VB", checkpoint.dense(f"{EMBEDDING}.weight").float())
            return
        self.bits = checkpoint.layout(EMBEDDING).bits
        words_VW = checkpoint.words(EMBEDDING, 0, shape.vocab_size)
        if self.bits == 4:
            table_VB = words_VW.view(torch.uint8)
        else:
            table_VB = unpack_codes(words_VW, shape.hidden_size, self.bits)
        self.register_buffer("table_VB", table_VB)
        scale_VG = checkpoint.scales(EMBEDDING)
        half_VG = scale_VG.half()
        self.register_buffer("scale_VG", half_VG if torch.equal(half_VG.float(), scale_VG) else scale_VG)

    def forward(self, ids_1T: torch.Tensor) -> torch.Tensor:
        if self.bits == 32:
            x_1TD = F.embedding(ids_1T, self.table_VB)
        else:
            # ExecuTorch's own operators (kernels/quantized/cpu/op_embedding4b.cpp, op_embedding.cpp)
            ops = torch.ops.quantized_decomposed
            lookup = ops.embedding_4bit.dtype if self.bits == 4 else ops.embedding_byte.dtype
            low, high = code_range(self.bits)
            x_1TD = lookup(self.table_VB, self.scale_VG, None, low, high, ids_1T, dtype=torch.float32)
            if self.bits == 4:
                x_1TD = x_1TD.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return x_1TD if self.scale is None else x_1TD * self.scale


@dataclass(frozen=True)
class CachePlan:
    """How the KV cache is laid out.

    Attributes:
        context: C.
        chunk: the longest call.
        window: of sliding layers, or None where none slides within this context.
        ring_slots: slots of a sliding layer's ring: the window and room for a chunk, at most the context.
        int8: whether keys and values are kept as int8, each position and head with a scale and a zero point.
    """

    context: int
    chunk: int
    window: int | None
    ring_slots: int
    int8: bool = False

    @classmethod
    def of(cls, shape: ModelShape, context: int, chunk: int, *, int8: bool = False) -> CachePlan:
        """The plan for a model: a ring wherever the window is shorter than the context."""
        window = shape.sliding_window if SLIDING in shape.layer_types else None
        if window is None or window >= context:
            return cls(context, chunk, None, context, int8)
        return cls(context, chunk, window, min(context, window + chunk - 1), int8)

    def slots(self, kind: str) -> int:
        """Slots of a layer of a kind."""
        return self.ring_slots if kind == SLIDING else self.context


class Cache(nn.Module):
    """Keys or values of one layer: slots (1, S, G, A), float32, or int8 codes with (1, S, G, 1) scales and zero points.

    Written by ExecuTorch's own operators; int8 as its quantized_decomposed operators do it, asymmetric per token and
    head.
    """

    held: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, slots: int, heads: int, width: int, *, int8: bool) -> None:
        super().__init__()
        self.int8 = int8
        dtype = torch.int8 if int8 else torch.float32
        self.register_buffer("held", torch.zeros(1, slots, heads, width, dtype=dtype), persistent=False)
        if int8:
            self.register_buffer("scale", torch.zeros(1, slots, heads, 1), persistent=False)
            self.register_buffer("zero", torch.zeros(1, slots, heads, 1, dtype=torch.int8), persistent=False)

    def write(self, new_1TGA: torch.Tensor, start: int, slots_1T: torch.Tensor | None) -> None:
        """Put new positions in, from slot `start` on, or in the given slots."""
        pairs = [(new_1TGA, self.held)]
        if self.int8:
            codes, scale, zero = int8_rows(new_1TGA)
            pairs = [(codes, self.held), (scale, self.scale), (zero, self.zero)]
        for new, held in pairs:
            if slots_1T is None:
                torch.ops.llama.update_cache(new, held, start)
            else:
                torch.ops.llama.update_cache_with_indices(new, held, start, slots_1T)


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (..., A) as int8 codes, scales (..., 1) float32 and zero points (..., 1) int8: x = (code - zero) scale."""
    ops = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    codes = ops.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
    return codes, scale.to(torch.float32), zero.to(torch.int8)


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
        sizes = [(plan.slots(kind), shape.num_kv_heads, shape.head_dim) for kind in self.kinds]
        self.keys = nn.ModuleList(Cache(*size, int8=plan.int8) for size in sizes)
        self.values = nn.ModuleList(Cache(*size, int8=plan.int8) for size in sizes)

    def forward(self, ids_1T: torch.Tensor, start_1: torch.Tensor) -> torch.Tensor:
        start = cast(int, start_1[0].item())  # a symbol while tracing
        length = ids_1T.shape[1]
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(start + length <= self.plan.context)  # type: ignore[no-untyped-call]
        positions_T = start_1 + torch.arange(length)
        rotation = {kind: self._rotation(kind, positions_T) for kind in dict.fromkeys(self.kinds)}
        ring = self._ring(positions_T) if self.plan.window else (None, None)
        x_1TD = self.embedding(ids_1T)
        for layer, (before, after) in enumerate(zip(self.before, self.after, strict=True)):
            kind = self.kinds[layer]
            q_1THA, k_1TGA, v_1TGA = before(x_1TD, *rotation[kind])
            slots_1T, mask_TS = ring if kind == SLIDING else (None, None)
            keys, values = cast(Cache, self.keys[layer]), cast(Cache, self.values[layer])
            keys.write(k_1TGA, start, slots_1T)
            values.write(v_1TGA, start, slots_1T)
            x_1TD = after(self._attend(q_1THA, (keys, values), start, mask_TS), x_1TD)
        logits: torch.Tensor = self.head(x_1TD[:, -1:] if self.last_only else x_1TD)
        return logits

    def _rotation(self, kind: str, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (1, T, 1, A) of some positions."""
        halves = (getattr(self, f"{name}_{kind}")[positions_T] for name in ("cos", "sin"))
        cos, sin = (torch.cat((half, half), -1)[None, :, None] for half in halves)
        return cos, sin

    def _attend(
        self, q_1THA: torch.Tensor, caches: tuple[Cache, Cache], start: int, mask_TS: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend causally to everything up to each position, or to what the mask of a ring lets it see."""
        keys, values = caches
        first, causal = (start, True) if mask_TS is None else (0, False)
        rule = (first, mask_TS, 0.0, causal, self.attention_scale)
        out_1THA: torch.Tensor
        if not self.plan.int8:
            if mask_TS is not None and q_1THA.shape[2] > keys.held.shape[2]:
                return self._attend_folded(q_1THA, keys.held, values.held, mask_TS)
            out_1THA = torch.ops.llama.custom_sdpa(q_1THA, keys.held, values.held, *rule)
            return out_1THA
        codes, scale, zero = int8_rows(q_1THA)
        grids = (zero, scale, keys.zero, keys.scale, values.zero, values.scale)
        out_1THA = torch.ops.llama.custom_quantized_sdpa(codes, keys.held, values.held, *rule, *grids)
        return out_1THA

    def _attend_folded(
        self, q_1THA: torch.Tensor, key_1SGA: torch.Tensor, value_1SGA: torch.Tensor, mask_TS: torch.Tensor
    ) -> torch.Tensor:
        """Attend by a mask, the R query heads that share a key head as R positions of one head.

        The operator reads all keys once for every head of a position; this way it reads them once for all R, which
        halves its time for one position (8 heads on one key head, 639 slots) and changes no number.
        """
        T, H, A = q_1THA.shape[1:]
        G = key_1SGA.shape[2]
        R = H // G
        q_1NGA = q_1THA.view(1, T, G, R, A).transpose(2, 3).reshape(1, T * R, G, A)
        mask_NS = mask_TS[:, None].expand(T, R, -1).reshape(T * R, -1)
        rule = (0, mask_NS, 0.0, False, self.attention_scale)
        out_1NGA = torch.ops.llama.custom_sdpa(q_1NGA, key_1SGA, value_1SGA, *rule)
        out_1THA: torch.Tensor = out_1NGA.view(1, T, R, G, A).transpose(2, 3).reshape(1, T, H, A)
        return out_1THA

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
