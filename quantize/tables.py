"""An embedding on the grid, kept in the int4 folder as a dense tensor whose every value is code x scale exactly.

Why dense: transformers 5.23 with compressed-tensors 0.20 cannot load a packed embedding. Its meta-device skeleton
loses `weight` ("'Embedding' object has no attribute 'weight'"), a tied head is then reported missing, and
`dequantize: true` unpacks every module by the first config group's bits and group size, so int8 beside int4 comes
out wrong without an error. A dense tensor loads in transformers and vLLM of any version, tied or not.

Why float16: a product of a 4-bit code (at most 3 significant bits: 7) and a bfloat16 scale (8) has 11 significant
bits, which is what float16 holds, exactly, down to multiples of 2^-24; bfloat16 would hold 8. Two bytes a weight,
as the bfloat16 embedding that it replaces. An 8-bit code takes 7, so its scale is chosen with 4 significant bits
(`half_exact`; with one scale a row 8% more squared error, of an error that is a hundredth of 4 bits'): float16
again, where float32 would double the file. The scales lie beside, in `grid/model.safetensors` (a folder of its own:
loaders that read every *.safetensors must not find them), and a value divided by its scale is its code.

Legend: V vocabulary, D hidden width, G groups, g group size.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nano.checkpoint import Checkpoint, CheckpointWriter
from nano.errors import BadFileError
from quantize.grid import QuantizedTensor, code_range

FOLDER = "grid"
SCALE, BITS = ".weight_scale", ".weight_bits"
SLAB = 1 << 24
"""Values made at once."""
SMALLEST = 2.0**-24
"""float16's smallest number, and the step between its numbers below 2^-14."""


def half_exact(scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales rounded to ones whose product with every code is a float16 (and which are bfloat16), as float32.

    Args:
        scale: positive.
        bits: of the codes; 4 leaves a scale all 8 significant bits of a bfloat16, 8 leaves it 4.
    """
    if bits == 4:
        rounded = scale.float().to(torch.bfloat16)
    else:
        mantissa, exponent = torch.frexp(scale.float())
        rounded = torch.ldexp((mantissa * 16).round(), exponent - 4).to(torch.bfloat16)
    return rounded.to(torch.float16).float().clamp_min(SMALLEST)


def dense_of(tensor: QuantizedTensor) -> torch.Tensor:
    """The weight in the smallest float type that holds every value exactly: float16, or else float32."""
    half_VD = torch.empty_like(tensor.codes_NK, dtype=torch.float16)
    rows = max(1, SLAB // tensor.codes_NK.shape[1])
    for start in range(0, len(half_VD), rows):
        part = slice(start, start + rows)
        slab = QuantizedTensor(tensor.codes_NK[part], tensor.scale_NG[part], tensor.group_size, tensor.bits)
        dense_RD = slab.dequantize()
        half_VD[part] = dense_RD.to(torch.float16)
        if not torch.equal(half_VD[part].float(), dense_RD):
            return tensor.dequantize()
    return half_VD


def codes_of(dense_VD: torch.Tensor, scale_VG: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    """int8 codes of dense values that lie on the grid of these scales.

    Raises:
        BadFileError: they do not.
    """
    low, high = code_range(bits)
    dense_VGg = dense_VD.float().view(dense_VD.shape[0], scale_VG.shape[1], -1)
    codes_VGg = (dense_VGg / scale_VG[..., None]).round_().clamp_(low, high)
    if not torch.equal(codes_VGg * scale_VG[..., None], dense_VGg):
        raise BadFileError(
            f"'{name}' does not lie on the grid that its scales say.",
            found=f"values that are no multiples of their scale within {bits} bits",
            todo="quantize again; something rewrote the embedding",
        )
    return codes_VGg.to(torch.int8).flatten(1)


def write_tables(folder: Path, tables: dict[str, QuantizedTensor]) -> None:
    """Write the scales of dense embeddings beside the weights of an int4 folder; nothing where there are none."""
    if not tables:
        return
    (folder / FOLDER).mkdir()
    with CheckpointWriter(folder / FOLDER) as writer:
        for module, tensor in tables.items():
            short_VG = tensor.scale_NG.to(torch.bfloat16)
            exact = torch.equal(short_VG.float(), tensor.scale_NG)
            writer.add(module + SCALE, short_VG if exact else tensor.scale_NG)
            writer.add(module + BITS, torch.tensor(tensor.bits))


def open_tables(folder: Path) -> dict[str, tuple[int, torch.Tensor]]:
    """Bits and scales (V, G) of the dense embeddings of an int4 folder.

    Raises:
        BadFileError: the side file is damaged.
    """
    if not (folder / FOLDER).is_dir():
        return {}
    with Checkpoint(folder / FOLDER) as store:
        names = [name.removesuffix(SCALE) for name in store.names() if name.endswith(SCALE)]
        return {name: (int(store.tensor(name + BITS)), store.tensor(name + SCALE).float()) for name in names}
