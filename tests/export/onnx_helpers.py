"""An int4 folder by plain rounding, for tests of the exporters alone; the quantize stage has its own tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from nano.families import EMBEDDING, HEAD
from nano.tokens import copy_tokenizer
from nano.torch_lm import load_float
from quantize.grid import QuantizedTensor, bf16_exact, round_to_codes
from quantize.packed import quantization_config, write_int4


def rounded(weight_NK: torch.Tensor, group: int, bits: int = 4) -> QuantizedTensor:
    n = weight_NK.shape[0]
    top = (1 << (bits - 1)) - 1
    scale_NG = bf16_exact(weight_NK.view(n, -1, group).abs().amax(-1) / top)
    return QuantizedTensor(round_to_codes(weight_NK, scale_NG, group, bits), scale_NG, group, bits)


def make_int4(
    source: Path, folder: Path, *, group: int = 32, embedding: bool = False, head: bool = True, bits: int = 4,
    float_modules: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Round every linear of an HF folder to int4; a feed-forward width that is no multiple of the group is padded."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state: dict[str, torch.Tensor] = load_float(source).state_dict()
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    pad = -config["intermediate_size"] % group
    config["intermediate_size"] += pad
    tied = config["tie_word_embeddings"]
    tensors: list[tuple[str, torch.Tensor | QuantizedTensor]] = []
    ignore = []
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module.endswith(("gate_proj", "up_proj")):
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, pad))
        elif module.endswith("down_proj"):
            tensor = torch.nn.functional.pad(tensor, (0, pad))
        if tied and module == HEAD:
            continue
        linear = module.endswith("_proj") or (module == HEAD and head)
        if (linear and module not in float_modules) or (embedding and module == EMBEDDING):
            tensors.append((name, rounded(tensor.float(), group, bits)))
        else:
            ignore += [module] if tensor.dim() == 2 else []
            tensors.append((name, tensor))
    targets = ["Linear", "Embedding"] if embedding else ["Linear"]
    config["quantization_config"] = quantization_config({(bits, group): targets}, ignore)
    write_int4(folder, config, tensors)
    copy_tokenizer(source, folder)
    return folder
