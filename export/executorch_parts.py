"""The three parts of a decoder layer and head that XNNPACK runs whole, in operators that its delegate takes.

    BeforeAttention   norm → q, k, v on the grid → (norms per head) → rotation
    AfterAttention    o → add → norm → gate, up, down → add
    Head              norm → output head

Written once for all families; what differs is a column of `nano.families`. Some expressions look odd because
XNNPACK's delegate takes neither a mean nor a slice of a tensor whose length is dynamic:

- the mean of squares plus epsilon is a linear with the row 1/D and the bias epsilon, and rotate_half one with a matrix
  of 0, 1 and -1 (exact);
- tanh-GELU is spelled out, because the delegate lowers any `gelu` to the erf form (1e-3 off for Gemma).

A delegate's own tensors are those that XNNPACK packs: weights and biases of linears. Tensors that are only multiplied
(norms' weights) are *operands*, inputs of the delegate that the decoder holds: XNNPACK's weight cache lets go of all
the data that a delegate owns once it is packed, and a program that multiplies by such a tensor crashes with it.

Legend: T positions of a call, V vocabulary, D hidden width, F feed-forward width, H query heads, G key/value heads
(or groups of a grid), A head width, N output channels, K input channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from nano.families import EMBEDDING, FINAL_NORM, HEAD, Family, family_of, layer_prefix
from quantize.grid import QuantizedTensor
from quantize.packed import Int4Checkpoint


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
    """RMS norm over the last dimension, in operators that XNNPACK's delegate takes; its weight is an operand."""

    mean_1D: torch.Tensor
    eps_1: torch.Tensor

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.register_buffer("mean_1D", torch.full((1, width), 1.0 / width))
        self.register_buffer("eps_1", torch.full((1,), eps))

    def forward(self, x_D: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return x_D * torch.rsqrt(F.linear(x_D * x_D, self.mean_1D, self.eps_1)) * weight_D


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

    def norm(self, name: str) -> tuple[Norm, torch.Tensor]:
        """A norm by its name within the layer, and what it multiplies by (D,)."""
        weight_D = self.checkpoint.dense(f"{self.prefix}{name}.weight").float() + self.family.norm_offset
        return Norm(weight_D.shape[0], self.eps), weight_D


class Part(nn.Module):
    """What XNNPACK runs as one delegate.

    Attributes:
        operands: tensors that `forward` takes, in this order, after its activations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[torch.Tensor] = []

    def norm(self, source: Source, name: str) -> Norm:
        """A norm whose weight is the next operand."""
        norm, weight_D = source.norm(name)
        self.operands.append(weight_D)
        return norm


class WithOperands(nn.Module):
    """A part or its delegate, called with activations alone: the operands are held here."""

    def __init__(self, part: nn.Module, operands: list[torch.Tensor]) -> None:
        super().__init__()
        self.part, self.count = part, len(operands)
        for i, operand in enumerate(operands):
            self.register_buffer(f"operand_{i}", operand)

    def forward(self, *activations: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        out: torch.Tensor | tuple[torch.Tensor, ...]
        out = self.part(*activations, *(getattr(self, f"operand_{i}") for i in range(self.count)))
        return out


class BeforeAttention(Part):
    """x (1, T, D), cos and sin (1, T, 1, A) to rotated queries (1, T, H, A), rotated keys and values (1, T, G, A).

    Operands: the norm's weight, then those of the norms per head.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        shape = source.checkpoint.shape
        self.heads, self.kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.norm_1 = self.norm(source, source.family.layer_norms[0])
        self.q_proj = source.linear("self_attn.q_proj")
        self.k_proj = source.linear("self_attn.k_proj")
        self.v_proj = source.linear("self_attn.v_proj")
        self.q_norm = self.norm(source, "self_attn.q_norm") if source.family.qk_norm else None
        self.k_norm = self.norm(source, "self_attn.k_norm") if source.family.qk_norm else None
        self.rotate = Rotation(shape.head_dim)

    def forward(
        self, x_1TD: torch.Tensor, cos_1T1A: torch.Tensor, sin_1T1A: torch.Tensor, *operands: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weights = iter(operands)
        h_1TD = self.norm_1(x_1TD, next(weights))
        q_1THA = self.q_proj(h_1TD).view(1, -1, self.heads, self.head_dim)
        k_1TGA = self.k_proj(h_1TD).view(1, -1, self.kv_heads, self.head_dim)
        v_1TGA = self.v_proj(h_1TD).view(1, -1, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_1THA, k_1TGA = self.q_norm(q_1THA, next(weights)), self.k_norm(k_1TGA, next(weights))
        return self.rotate(q_1THA, cos_1T1A, sin_1T1A), self.rotate(k_1TGA, cos_1T1A, sin_1T1A), v_1TGA


class AfterAttention(Part):
    """Attention's output (1, T, H, A) and the residual x (1, T, D) to the next layer's x (1, T, D).

    Operands: weights of the norms in order, then the activation's constants.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        shape, family = source.checkpoint.shape, source.family
        self.width = shape.num_heads * shape.head_dim
        names = family.layer_norms
        self.post_attention_norm = self.norm(source, names[1]) if family.post_norms else None
        self.norm_2 = self.norm(source, names[2] if family.post_norms else names[1])
        self.post_mlp_norm = self.norm(source, names[3]) if family.post_norms else None
        self.tanh_gelu = family.activation == "gelu_pytorch_tanh"
        self.operands += [torch.tensor([value]) for value in GELU if self.tanh_gelu]
        self.o_proj = source.linear("self_attn.o_proj")
        self.gate_proj = source.linear("mlp.gate_proj")
        self.up_proj = source.linear("mlp.up_proj")
        self.down_proj = source.linear("mlp.down_proj")

    def forward(self, attention_1THA: torch.Tensor, x_1TD: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        constants = operands[len(operands) - len(GELU) :] if self.tanh_gelu else ()
        weights = iter(operands)
        out_1TD = self.o_proj(attention_1THA.view(1, -1, self.width))
        if self.post_attention_norm is not None:
            out_1TD = self.post_attention_norm(out_1TD, next(weights))
        x_1TD = x_1TD + out_1TD
        h_1TD = self.norm_2(x_1TD, next(weights))
        gate_1TF = self.gate_proj(h_1TD)
        gate_1TF = gelu_tanh(gate_1TF, *constants) if self.tanh_gelu else silu(gate_1TF)
        out_1TD = self.down_proj(gate_1TF * self.up_proj(h_1TD))
        if self.post_mlp_norm is not None:
            out_1TD = self.post_mlp_norm(out_1TD, next(weights))
        next_1TD: torch.Tensor = x_1TD + out_1TD
        return next_1TD


class Head(Part):
    """x (1, T, D) to logits (1, T, V). Operand: the norm's weight."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.final_norm = self.norm(source, FINAL_NORM)
        self.head = source.linear(EMBEDDING if source.checkpoint.shape.tied else HEAD)

    def forward(self, x_1TD: torch.Tensor, *operands: torch.Tensor) -> torch.Tensor:
        logits_1TV: torch.Tensor = self.head(self.final_norm(x_1TD, operands[0]))
        return logits_1TV


def silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return x * torch.sigmoid(x)


GELU = (2.0 * math.sqrt(2.0 / math.pi), 2.0 * math.sqrt(2.0 / math.pi) * 0.044715)
"""GELU's tanh form is x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel, arXiv:1606.08415), and
(1 + tanh u) / 2 = sigmoid(2u): so it is x sigmoid(x (a + b x^2)) with these two."""


def gelu_tanh(x: torch.Tensor, a_1: torch.Tensor, b_1: torch.Tensor) -> torch.Tensor:
    """GELU's tanh form, its constants given as tensors."""
    return x * torch.sigmoid(x * (a_1 + b_1 * (x * x)))


def layer_source(checkpoint: Int4Checkpoint, layer: int, eps: float) -> Source:
    """Where layer `layer` takes its weights from."""
    return Source(checkpoint, layer_prefix(layer), eps)
