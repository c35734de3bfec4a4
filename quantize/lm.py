"""An int4 folder run in torch: dequantised, with float or simulated int8 activations."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from nano.families import EMBEDDING, HEAD
from nano.lm import Activations
from nano.tokens import load_tokenizer
from nano.torch_lm import TorchModel, check_finite
from quantize.activations import Int8ActivationLinear, Int8TokenLinear, int8_per_block
from quantize.packed import Int4Checkpoint
from quantize.runtimes import onnx_block


def load_dequantised(checkpoint: Int4Checkpoint) -> Any:
    """The transformers model with every weight dequantised to float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in checkpoint.dense_tensors()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not (checkpoint.shape.tied and name == "lm_head.weight")]
    assert not missing, missing  # weight_shapes and transformers disagree about the family
    assert not unexpected, unexpected
    check_finite(model, checkpoint.folder)
    return model.eval().requires_grad_(False)


def simulate_int8(model: Any, checkpoint: Int4Checkpoint, activations: Activations) -> None:
    """Replace the model's int4 linears by ones that quantize their input as the runtime named does."""
    for name in checkpoint.modules:
        # an embedding on the grid is only looked up, but where it is tied the runtime's head computes with it
        target = HEAD if name == EMBEDDING and checkpoint.shape.tied else name
        parent_name, _, leaf = target.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, leaf)
        if not isinstance(linear, torch.nn.Linear):
            continue
        weight_NK = linear.weight.detach()
        if activations == "int8-xnnpack":
            setattr(parent, leaf, Int8TokenLinear(weight_NK))
        else:
            grid = checkpoint.layout(name)
            block = onnx_block(grid.columns, grid.group_size) or grid.group_size
            quantize = partial(int8_per_block, block=block)
            setattr(parent, leaf, Int8ActivationLinear(weight_NK, quantize))


def open_int4_model(folder: Path, activations: Activations = "float") -> TorchModel:
    """An int4 folder behind the `LanguageModel` protocol.

    Raises:
        BadFileError: see `Int4Checkpoint`.
    """
    with Int4Checkpoint(folder) as checkpoint:
        tokenizer = load_tokenizer(folder, checkpoint.shape.vocab_size)
        model = load_dequantised(checkpoint)
        if activations != "float":
            simulate_int8(model, checkpoint, activations)
        return TorchModel(model, tokenizer, checkpoint.shape.max_positions, activations)


def jitter_embedding(model: TorchModel, relative: float, seed: int = 0) -> None:
    """Multiply each embedding weight by 1 + relative x a normal number, in place.

    At float32's own precision (1e-7) this is no change of the model but of the order in which a runtime might
    have added up; what it does to the logits is the noise floor of int8 activations, whose codes flip at
    rounding borders.
    """
    weight_VD = model.model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    weight_VD.data = weight_VD.data * (1 + relative * torch.randn(weight_VD.shape, generator=generator))
