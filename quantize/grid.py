"""The int4/int8 grid: integer codes, one scale a group, and back to real numbers.

The phone's blockwise kernel keeps scales in bfloat16 (XNNPACK `qb4w`), so a scale here is always exactly
representable in bfloat16, chosen before the codes are: nothing is rounded again at export.

Legend: N output channels, K input channels, G = K / group size groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nano.errors import BadFileError


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight on the grid.

    Attributes:
        codes_NK: int8, within [-2^(bits-1), 2^(bits-1) - 1].
        scale_NG: float32, each exactly a bfloat16, positive.
        group_size: input channels that share a scale; divides K.
        bits: 4 or 8.
        zero_NG: int8 codes that mean 0.0, or None where the grid is symmetric (0 means 0.0).
    """

    codes_NK: torch.Tensor
    scale_NG: torch.Tensor
    group_size: int
    bits: int = 4
    zero_NG: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes_NK.shape
        if self.codes_NK.dtype != torch.int8 or self.scale_NG.dtype != torch.float32:
            found = f"{self.codes_NK.dtype} codes, {self.scale_NG.dtype} scales"
            raise BadFileError(
                "A quantized weight has the wrong types.", found=found, expected="int8 codes, float32 scales"
            )
        if k % self.group_size or self.scale_NG.shape != (n, k // self.group_size):
            raise BadFileError(
                "A quantized weight's scales do not fit its codes.",
                found=f"codes {n} x {k}, scales {tuple(self.scale_NG.shape)}",
                expected=f"one scale for every {self.group_size} input channels",
            )
        if self.zero_NG is not None and (self.zero_NG.dtype, self.zero_NG.shape) != (torch.int8, self.scale_NG.shape):
            raise BadFileError(
                "A quantized weight's zero points do not fit its scales.",
                found=f"{self.zero_NG.dtype} {tuple(self.zero_NG.shape)}",
                expected=f"int8 {tuple(self.scale_NG.shape)}",
            )

    def dequantize(self) -> torch.Tensor:
        """float32 (N, K): (code - zero) x scale."""
        n, k = self.codes_NK.shape
        codes_NGg = self.codes_NK.view(n, -1, self.group_size).float()
        if self.zero_NG is not None:
            codes_NGg = codes_NGg - self.zero_NG.float()[..., None]
        return (codes_NGg * self.scale_NG[..., None]).view(n, k)

    def cpu(self) -> QuantizedTensor:
        """The same in main memory."""
        zero_NG = None if self.zero_NG is None else self.zero_NG.cpu()
        return QuantizedTensor(self.codes_NK.cpu(), self.scale_NG.cpu(), self.group_size, self.bits, zero_NG)


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of a signed grid."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def bf16_exact(scale: torch.Tensor) -> torch.Tensor:
    """Positive scales rounded to the nearest bfloat16, as float32; zero and subnormal ones become 2^-24."""
    rounded = scale.float().to(torch.bfloat16).float()
    return torch.where(rounded >= 2.0**-24, rounded, torch.full_like(rounded, 2.0**-24))


def round_to_codes(
    weight_NK: torch.Tensor,
    scale_NG: torch.Tensor,
    group_size: int,
    bits: int = 4,
    zero_NG: torch.Tensor | None = None,
) -> torch.Tensor:
    """int8 codes nearest to a weight on a given grid."""
    low, high = code_range(bits)
    n, k = weight_NK.shape
    scaled_NGg = weight_NK.float().view(n, -1, group_size) / scale_NG[..., None]
    if zero_NG is not None:
        scaled_NGg = scaled_NGg.round_().add_(zero_NG[..., None])
    return scaled_NGg.round().clamp_(low, high).to(torch.int8).view(n, k)
