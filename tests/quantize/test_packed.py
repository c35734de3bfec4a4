"""The packed form against compressed-tensors' own packer, and grids against brute force."""

from __future__ import annotations

import pytest
import torch

from quantize.grid import QuantizedTensor, bf16_exact, round_to_codes
from quantize.packed import pack_codes, unpack_codes
from quantize.scales import LADDER, absmax_scales, search_scales


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 43])
def test_packing_is_compressed_tensors_packing(bits: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    low = -(1 << (bits - 1))
    codes_NK = torch.randint(low, -low, (5, columns), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    words_NW = pack_codes(codes_NK, bits)
    assert torch.equal(words_NW, pack_to_int32(codes_NK, bits))
    assert torch.equal(unpack_codes(words_NW, columns, bits), codes_NK)
    assert torch.equal(unpack_from_int32(words_NW, bits, codes_NK.shape), codes_NK)


def test_scale_search_equals_brute_force() -> None:
    weight_NK = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    importance_K = torch.rand(96, generator=torch.Generator().manual_seed(2)) + 0.1
    found_NG = search_scales(weight_NK, 32, 4, importance_K)
    for n in range(6):
        for g in range(3):
            group, weights = weight_NK[n, 32 * g : 32 * g + 32], importance_K[32 * g : 32 * g + 32]
            candidates = [float(bf16_exact(group.abs().max() / 7 * f)) for f in torch.linspace(*LADDER).tolist()]
            losses = [float((((group / s).round().clamp(-8, 7) * s - group) ** 2 * weights).sum()) for s in candidates]
            assert float(found_NG[n, g]) == candidates[losses.index(min(losses))]


def test_searched_scales_beat_covering_ones_and_are_bfloat16() -> None:
    weight_NK = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))

    def loss(scale_NG: torch.Tensor) -> float:
        tensor = QuantizedTensor(round_to_codes(weight_NK, scale_NG, 32), scale_NG, 32)
        return float((tensor.dequantize() - weight_NK).square().mean())

    searched_NG = search_scales(weight_NK, 32)
    assert torch.equal(searched_NG.to(torch.bfloat16).float(), searched_NG)
    assert loss(searched_NG) < 0.9 * loss(absmax_scales(weight_NK, 32))


def test_a_group_of_zeros_gets_codes_of_zero() -> None:
    weight_NK = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    weight_NK[:, 32:] = 0
    scale_NG = search_scales(weight_NK, 32)
    assert bool((scale_NG > 0).all())
    assert not round_to_codes(weight_NK, scale_NG, 32)[:, 32:].any()
