"""bitsandbytes' NF4 and LLM.int8(): an ordinary HF folder in its own format, for quick looks and as a baseline.

NF4 (Dettmers et al., QLoRA, arXiv 2305.14314) stores 4-bit indices into a fixed codebook of 16 normal quantiles, one
float32 scale for every block of consecutive weights; LLM.int8() (arXiv 2208.07339) one scale an output channel and
int8 activations. bitsandbytes computes both the codes and what they mean; nothing is rounded here. No text is read.
Neither can go to a phone: the phone runtimes' kernels multiply evenly spaced integers, and a codebook is none; and
bitsandbytes' int8 splits activations in a way that no phone kernel does.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.checkpoint import Checkpoint, CheckpointWriter
from nano.errors import BadFileError, UnsupportedError, require_module
from nano.families import linear_names, weight_shapes
from nano.folder import require_space, staged_folder
from nano.manifest import Manifest, input_entry, write_manifest
from nano.progress import track, warn
from nano.shapes import ModelShape, read_config
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.options import QuantizeOptions
from quantize.student import Student

if TYPE_CHECKING:
    import torch

    from nano.torch_lm import TorchModel

BLOCK = 64
"""Weights that share a scale in NF4 where --group-size names no number: bitsandbytes' own default."""

FLOAT16_MAX = 65504.0
"""LLM.int8() takes its weights through float16."""

NOT_FOR_PHONES = "a bitsandbytes folder runs on PCs only and cannot be exported to phones"

Tensors = dict[str, "torch.Tensor"]


def quantize_bnb(student: Path, out: Path, options: QuantizeOptions, force: bool = False) -> Manifest:
    """Write a float HF folder's decoder linears as bitsandbytes stores them; embedding, head and norms stay.

    Args:
        student: a float HF folder.
        out: the folder to make; checked by the caller.
        options: the method, and for bnb-nf4 the group size (any number is bitsandbytes' block size).
        force: replace `out` where it exists, once the new one is complete.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
        UnsupportedError: an option that bitsandbytes has no place for.
        RequestError: bad input of any kind; nothing was written.
    """
    _require()
    _check_options(options)
    with Student(student, 1) as model:
        load_tokenizer(student, model.shape.vocab_size)
        require_space(out, 2 * model.shape.num_parameters)
        warn(f"{NOT_FOR_PHONES}; rtn, gptq, best and recover make what can be")
        start = time.monotonic()
        errors: dict[str, float] = {}
        with staged_folder(out, force=force) as folder:
            with (
                CheckpointWriter(folder) as writer,
                track("quantize", len(weight_shapes(model.shape)), "tensors") as bar,
            ):
                for name, tensors in _tensors(model, options, errors):
                    for key, tensor in tensors.items():
                        writer.add(key, tensor)
                    bar.advance(note=name)
            config = {**model.config, "quantization_config": _config(options)}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            copy_tokenizer(student, folder)
            results = {
                "relative_error": errors,
                "mean_relative_error": sum(errors.values()) / len(errors),
                "exportable": False,
                "note": NOT_FOR_PHONES,
                "seconds": round(time.monotonic() - start, 2),
            }
            recipe = {"method": options.method, "block_size": _block(options)}
            inputs, shape = {"student": input_entry(student)}, asdict(model.shape)
            return write_manifest(folder, Manifest("bitsandbytes", inputs, recipe=recipe, results=results, shape=shape))


def _require() -> None:
    for module in ("bitsandbytes", "accelerate"):
        require_module(module, "bnb")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _check_options(options: QuantizeOptions) -> None:
    """Refuse options that would silently do nothing."""
    plain = QuantizeOptions(method=options.method)
    grids = ("symmetry", "embedding", "head", "runtime", "rules", "bits_budget", "profile", "rotation", "awq")
    ignored = [name for name in grids if getattr(options, name) != getattr(plain, name)]
    if options.method == "bnb-int8" and options.group_size != plain.group_size:
        ignored.append("group_size")
    if options.group_size == "channel":
        ignored.append("group_size")
    if ignored:
        raise UnsupportedError(
            f"--method {options.method} has no place for an option.",
            found=f"--{ignored[0].replace('_', '-')}",
            expected="--group-size 32, 64 or 128 for bnb-nf4, no options about grids for bnb-int8",
            todo="leave it out, or use one of nanokit's own methods",
        )


def _block(options: QuantizeOptions) -> int | None:
    """Weights that share a scale, or None where an output channel does."""
    if options.method == "bnb-int8":
        return None
    return options.group_size if isinstance(options.group_size, int) else BLOCK


def _config(options: QuantizeOptions) -> dict[str, Any]:
    """The quantization_config of config.json, in transformers' own words."""
    from transformers import BitsAndBytesConfig

    if options.method == "bnb-int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype="float32",
            llm_int8_skip_modules=["lm_head"],
        )
    described: dict[str, Any] = config.to_dict()
    return described


def _tensors(model: Student, options: QuantizeOptions, errors: dict[str, float]) -> Iterator[tuple[str, Tensors]]:
    """Every tensor of the folder, those of one weight together; each linear's relative error goes into `errors`."""
    linears = set(linear_names(model.shape))
    for name in weight_shapes(model.shape):
        tensor, module = model.tensor(name), name.removesuffix(".weight")
        if module not in linears:
            yield name, {name: tensor}
            continue
        block = _block(options)
        tensors, dense_NK = _int8(name, tensor) if block is None else _nf4(name, tensor, block)
        magnitude = tensor.float().norm()
        errors[module] = float((dense_NK.float() - tensor.float()).norm() / magnitude) if magnitude > 0 else 0.0
        yield name, tensors


def _nf4(name: str, weight_NK: torch.Tensor, block: int) -> tuple[Tensors, torch.Tensor]:
    """What Linear4bit saves of a weight, and the weight (N, K) that it means."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight_NK, blocksize=block, quant_type="nf4")
    # cloned: the codebook is one tensor for all weights, and safetensors refuses shared memory
    parts = {f"{name}.{key}": part.clone() for key, part in state.as_dict(packed=True).items()}
    return {name: packed, **parts}, functional.dequantize_4bit(packed, state)


def _int8(name: str, weight_NK: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """What Linear8bitLt saves of a weight, and the weight (N, K) that it means.

    Raises:
        BadFileError: weights too large for float16.
    """
    import torch
    from bitsandbytes import functional

    if bool((weight_NK.abs() > FLOAT16_MAX).any()):
        raise BadFileError(
            f"'{name}' holds weights that float16 cannot, and LLM.int8() takes weights through float16.",
            found=f"{float(weight_NK.abs().max()):g}",
            expected=f"at most {FLOAT16_MAX:g}",
            todo="use another --method",
        )
    codes_NK, scale_N, _ = functional.int8_vectorwise_quant(weight_NK.half())
    codes_NK[scale_N == 0] = 0  # 0 / 0: what a row of zeros becomes is left to the machine
    module = name.removesuffix("weight")
    tensors = {name: codes_NK, f"{module}SCB": scale_N, f"{module}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, functional.int8_vectorwise_dequant(codes_NK, scale_N)


def open_bnb(folder: Path) -> TorchModel:
    """A bitsandbytes folder behind the `LanguageModel` protocol, loaded by transformers.

    NF4's weights are dequantised once: its linears do nothing else, at every call, and on CPUs with AVX512-BF16 they
    refuse layers whose width 32 does not divide. int8 runs as bitsandbytes runs it, int8 activations included.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
        BadFileError: files are missing, truncated, or do not fit config.json.
    """
    import torch

    from nano.torch_lm import TorchModel

    shape = _check_folder(folder)
    _require()
    tokenizer = load_tokenizer(folder, shape.vocab_size)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, device_map="cpu", local_files_only=True
    )
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize(dtype=torch.float32)
    return TorchModel(model, tokenizer, shape.max_positions)


def dense_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the equivalent float model, those on a codebook or in int8 dequantised by bitsandbytes.

    Raises:
        MissingExtraError: bitsandbytes or accelerate is not installed.
        BadFileError: files are missing, truncated, or do not fit config.json.
    """
    shape = _check_folder(folder)
    _require()
    from bitsandbytes import functional

    with Checkpoint(folder) as checkpoint:
        for name in weight_shapes(shape):
            tensor, scale = checkpoint.tensor(name), name.removesuffix("weight") + "SCB"
            parts = [key for key in checkpoint.names() if key.startswith(name + ".")]
            if parts:
                stored = {key.removeprefix(name + "."): checkpoint.tensor(key) for key in parts}
                tensor = functional.dequantize_4bit(tensor, functional.QuantState.from_dict(stored, tensor.device))
            elif scale in checkpoint.names():
                tensor = functional.int8_vectorwise_dequant(tensor, checkpoint.tensor(scale))
            yield name, tensor.float()


def _check_folder(folder: Path) -> ModelShape:
    """The shape of a bitsandbytes folder whose weights all are there."""
    config = read_config(folder)
    shape = ModelShape.from_hf(config)
    with Checkpoint(folder) as checkpoint:
        names = set(checkpoint.names())
        missing = [name for name in weight_shapes(shape) if name not in names]
        if missing:
            raise BadFileError(
                "A weight is missing.", found=f"no '{missing[0]}' in {folder}", todo="quantize the model again"
            )
    return shape


def refuse_export(folder: Path) -> None:
    """Say that phones cannot run a bitsandbytes folder.

    Raises:
        UnsupportedError: it is one.
    """
    quantization = read_config(folder).get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "bitsandbytes":
        raise UnsupportedError(
            "A bitsandbytes model cannot be exported to phones.",
            found=f"{folder}: codes that are indices into a codebook (NF4), or int8 of its own kind",
            expected="an int4 folder of evenly spaced integers, as phone kernels compute with",
            todo="nanokit quantize --method gptq (or rtn, best, recover) of the float model",
        )
