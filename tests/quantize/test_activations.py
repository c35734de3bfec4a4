"""Simulated int8 activations against XNNPACK's formula, written out number by number in numpy's float32."""

from __future__ import annotations

import numpy as np
import torch

from quantize.activations import Int8TokenLinear, int8_per_token, int8_token_codes


def one_row(row: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """xnn_f32_qd8_asymmetric_quantization_params, then f32-qs8-vcvt: codes less the zero point, and the scale."""
    f = np.float32
    low, high = f(min(0.0, row.min())), f(max(0.0, row.max()))
    multiplier = f(1.0) if low == high else f(255.0) / (high - low)
    from_low, from_high = low * multiplier, high * multiplier
    zero = f(-128) - from_low if (f(-128) + from_low) + (f(127) + from_high) > 0 else f(127) - from_high
    zero = f(np.rint(min(max(zero, f(-128)), f(127))))
    codes = [min(max(np.rint(x * multiplier), f(-128) - zero), f(127) - zero) for x in row]
    return np.array(codes, np.float32), f(1.0) / multiplier


def test_codes_and_scales_are_the_formulas() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 48)) * rng.random((64, 1)) * 5 + rng.standard_normal((64, 1))).astype(np.float32)
    x[0], x[1], x[2] = 0.0, np.abs(x[1]), -np.abs(x[2])  # nothing, only positive, only negative
    codes, scale = int8_token_codes(torch.from_numpy(x))
    for i, row in enumerate(x):
        expected, expected_scale = one_row(row)
        assert np.array_equal(codes[i].numpy(), expected)
        assert scale[i].item() == expected_scale
    assert torch.equal(int8_per_token(torch.from_numpy(x)), codes * scale)
    assert (int8_per_token(torch.from_numpy(x)) - torch.from_numpy(x)).abs().max() <= scale.max() / 2 * 1.0001


def test_leading_dimensions_and_zeros_change_nothing() -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    codes, scale = int8_token_codes(x)
    assert codes.shape == (2, 3, 32)
    assert scale.shape == (2, 3, 1)
    padded, padded_scale = int8_token_codes(torch.nn.functional.pad(x, (0, 20)))  # a padded feed-forward width
    assert torch.equal(padded[..., :32], codes)
    assert torch.equal(padded_scale, scale)
    assert not padded[..., 32:].any()


def test_the_linear_multiplies_codes_first() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 64, generator=generator) + 1, torch.randn(7, 64, generator=generator)
    exact = int8_per_token(x).double() @ weight.double().T
    assert torch.allclose(Int8TokenLinear(weight)(x).double(), exact, rtol=1e-5, atol=1e-6)
