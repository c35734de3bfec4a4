"""How a phone runtime sees an int4 linear's input: quantized to int8 as it runs. Simulated here in torch.

XNNPACK (`qd8`): one scale and zero point a token, asymmetric. ONNX Runtime (MatMulNBits at accuracy_level 4):
one scale for every block of K, symmetric. Both dot int8 activations with the int4 codes in integers.

Legend: ... any leading dimensions, K input channels, b block size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def int8_token_codes(x_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """XNNPACK's dynamic quantization of (..., K): asymmetric int8, one grid a token.

    Follows xnn_f32_qd8_asymmetric_quantization_params (src/xnnpack/quantization.h) and the f32-qs8-vcvt kernels
    rounding for rounding: against XNNPACK's own kernel no code differs, on values chosen at the borders.

    Args:
        x_K: real numbers.

    Returns:
        Codes less their zero point (..., K), whole numbers as float32, and the scale (..., 1).
    """
    x = x_K.float()
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    width = high - low
    # tensor by tensor: torch computes 255.0 / width as 255 * (1 / width), which rounds twice
    multiplier = torch.where(width > 0, torch.full_like(width, 255.0) / width, torch.ones_like(width))
    from_low, from_high = low * multiplier, high * multiplier
    zero = torch.where((-128.0 + from_low) + (127.0 + from_high) > 0, -128.0 - from_low, 127.0 - from_high)
    zero = zero.clamp(-128, 127).round()
    codes_K = torch.minimum(torch.maximum((x * multiplier).round(), -128.0 - zero), 127.0 - zero)
    return codes_K, 1.0 / multiplier


def int8_per_token(x_K: torch.Tensor) -> torch.Tensor:
    """XNNPACK's dynamic quantization of (..., K), and back to float."""
    codes_K, scale = int8_token_codes(x_K)
    return (codes_K * scale).to(x_K.dtype)


def int8_per_block(x_K: torch.Tensor, block: int) -> torch.Tensor:
    """ONNX Runtime's dynamic quantization of (..., K), and back to float: symmetric int8, one grid a block.

    As MLAS does it on x86-64 (QuantizeARow_CompInt8 in onnxruntime/core/mlas/lib/sqnbitgemm_kernel_avx2.cpp, AVX-512
    alike): scale max|x| / 127, codes x * (127 / max|x|) rounded half to even, the weight's block size.

    On an ARM core with dot products MLAS hands blocks of 32 and more to KleidiAI instead (qai8dxp,
    https://github.com/microsoft/onnxruntime/pull/23627): asymmetric, one grid a token, scales of the weights in
    bfloat16. What a phone's ONNX Runtime sees is therefore `int8_per_token`, as XNNPACK's.
    """
    x_Gb = x_K.float().reshape(*x_K.shape[:-1], -1, block)
    largest = x_Gb.abs().amax(-1, keepdim=True)
    scale = largest / 127.0
    inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros_like(largest))
    codes = (x_Gb * inverse).round().clamp(-128, 127)
    dequantised: torch.Tensor = (codes * scale).flatten(-2).to(x_K.dtype)
    return dequantised


class Int8ActivationLinear(torch.nn.Module):
    """A linear with a dequantised weight whose input goes through `quantize` first."""

    def __init__(self, weight_NK: torch.Tensor, quantize: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight_NK, requires_grad=False)
        self.quantize = quantize

    def forward(self, x_K: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.quantize(x_K), self.weight)


class Int8TokenLinear(torch.nn.Module):
    """A linear as XNNPACK's qd8 kernels compute it: codes times weight first, the token's scale last.

    With whole numbers on the left, float32 loses nothing but in adding groups up: five times closer to the kernel
    than a linear of the dequantised input, and every difference may flip a rounding further on.
    """

    def __init__(self, weight_NK: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight_NK, requires_grad=False)

    def forward(self, x_K: torch.Tensor) -> torch.Tensor:
        codes_K, scale = int8_token_codes(x_K)
        return (torch.nn.functional.linear(codes_K, self.weight.float()) * scale).to(x_K.dtype)
