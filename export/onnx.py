"""An int4 checkpoint as an onnxruntime-genai folder: model.onnx, model.onnx.data, genai_config.json.

Our own graph writer (`export.onnx_graph`), because the model builder of onnxruntime-genai 0.18 requantizes,
or needs repairs with transformers 5, and loads the whole model. Weights go straight from the checkpoint's file
to model.onnx.data, codes and scales unchanged.

Opset 21 and IR version 10 are onnx 1.16's (https://github.com/onnx/onnx/blob/main/docs/Versioning.md); Gelu needs
opset 20. ONNX Runtime's releases from 1.20 on load them (tried), and its mobile packages (onnxruntime-android,
onnxruntime-c) are builds of the same releases with all operators
(https://mvnrepository.com/artifact/com.microsoft.onnxruntime/onnxruntime-android). What binds harder than the opset
is the contrib operators: see `minimum_runtime`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export import onnx_ort
from export.arithmetic import read_arithmetic, resolve_context
from export.genai_config import genai_config
from export.grids import check_grid
from export.onnx_data import DataFile
from export.onnx_files import CONFIG, DATA, MODEL, ORT_MODEL
from export.onnx_graph import DecoderGraph, GraphOptions
from export.options import ExportOptions
from nano.errors import UnsupportedError, require_module
from nano.families import EMBEDDING, HEAD
from nano.shapes import SLIDING, ModelShape
from nano.tokens import TextTokenizer
from quantize.packed import Int4Checkpoint

OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
ACCURACY_LEVEL = {"int8": 4, "float": 1}
"""MatMulNBits' accuracy_level: 4 quantizes its input to int8 by blocks, 1 computes in float32."""
PARTS = ("codes", "scales", "zero_points")
TOKENIZER_CONFIG = "tokenizer_config.json"


def write_onnx(
    checkpoint: Int4Checkpoint, folder: Path, options: ExportOptions, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Write an onnxruntime-genai folder; tokenizer files are the caller's.

    Args:
        checkpoint: the int4 folder, opened.
        folder: exists and is empty (a staged folder).
        options: see `ExportOptions`.
        tokenizer: gives the ids that begin and end a text.

    Returns:
        Plain data: "footprint" (bytes by cause, "context", "chunk"), "modules" (for each quantized module the
        names of its initializers, its bits and group size), "graph" (opset, IR version, operators and their number).

    Raises:
        UnsupportedError: something in the checkpoint that the operators cannot take; nothing is written.
        MissingExtraError: onnx is not installed.
    """
    ir = require_module("onnx_ir", "onnx")
    require_module("onnx", "onnx")
    context = check_onnx(checkpoint, options)
    slack = window_slack(checkpoint.shape, context, options.chunk)
    data = DataFile()
    decoder = DecoderGraph(checkpoint, _graph_options(checkpoint, options, context, slack), data)
    graph = decoder.build()
    graph.opset_imports.update({"": OPSET, "com.microsoft": CONTRIB_OPSET})
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="nanokit")
    model.metadata_props.update(_metadata(checkpoint.shape, options, context, slack))
    if options.ort:
        onnx_ort.check_size(graph)
    ir.save(model, folder / MODEL)
    data.write(folder)
    if options.ort:
        onnx_ort.convert(folder)
    config = genai_config(
        checkpoint.shape, checkpoint.config, tokenizer, context=context, chunk=options.chunk, slack=slack,
        model=ORT_MODEL if options.ort else MODEL,
    )  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not (checkpoint.folder / TOKENIZER_CONFIG).is_file():
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(_tokenizer_config(tokenizer)) + "\n", encoding="utf-8")
    operators = [node.op_type for node in graph]
    footprint = _footprint(checkpoint.shape, options, decoder, context, slack)
    return {
        "footprint": {"file_bytes": _file_bytes(folder), **footprint},
        "modules": decoder.modules,
        "graph": {
            "opset": OPSET,
            "ir_version": IR_VERSION,
            "minimum_onnxruntime": minimum_runtime(checkpoint, slack),
            "operators": {name: operators.count(name) for name in sorted(set(operators))},
        },
    }


def _file_bytes(folder: Path) -> int:
    paths = (folder / name for name in (MODEL, DATA, ORT_MODEL))
    return sum(path.stat().st_size for path in paths if path.is_file())


def _tokenizer_config(tokenizer: TextTokenizer) -> dict[str, Any]:
    """The least that onnxruntime-genai's tokenizer needs beside tokenizer.json."""
    special = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    tokens = {key: None if i is None else tokenizer.backend.id_to_token(i) for key, i in special.items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}


def check_onnx(checkpoint: Int4Checkpoint, options: ExportOptions) -> int:
    """Refuse what the operators cannot take, before any work; the context, resolved.

    Raises:
        UnsupportedError: says which module or setting, and what would be taken.
    """
    for module in checkpoint.modules:
        check_grid(checkpoint, module, "onnx")
    shape = checkpoint.shape
    context = resolve_context(shape, options.context)
    if options.chunk < 1:
        raise UnsupportedError("The chunk is too small.", found=f"--chunk {options.chunk}", expected="at least 1")
    if options.kv_cache != "float":
        raise UnsupportedError(
            "An int8 cache in ONNX needs calibrated scales: GroupQueryAttention takes constants, not one a position.",
            found=f"--kv-cache {options.kv_cache}",
            todo="leave it out, or export with --format executorch, whose cache is scaled by position and head",
        )
    if options.backend != ExportOptions.backend:
        raise UnsupportedError(
            "Backends are ExecuTorch's.",
            found=f"--backend {options.backend}",
            todo="leave it out: ONNX runs on the CPU",
        )
    return context


def window_slack(shape: ModelShape, context: int, chunk: int) -> int | None:
    """Positions that sliding layers keep beyond their window, or None where their caches are full-length.

    The operator evicts slack + 1 positions at once, so a slack of a chunk makes that copy rare. Where window and
    slack reach the context, a full-length cache is the smaller one.
    """
    if SLIDING not in shape.layer_types or shape.sliding_window is None:
        return None
    return chunk if shape.sliding_window + chunk < context else None


def minimum_runtime(checkpoint: Int4Checkpoint, slack: int | None) -> str:
    """The oldest ONNX Runtime that runs such a graph rightly, found by running one of each kind in the releases
    1.20 to 1.32: GatherBlockQuantized takes packed uint8 since 1.23, a sliding window is as long as transformers'
    since 1.24 (1.23 is one position off), and window-sized caches came with 1.29. 8-bit weights have kernels for ARM
    since 1.23 (https://github.com/microsoft/onnxruntime/pull/25110)."""
    if slack is not None:
        return "1.29"
    if SLIDING in checkpoint.shape.layer_types:
        return "1.24"
    eight = any(checkpoint.layout(module).bits == 8 for module in checkpoint.modules)
    return "1.23" if EMBEDDING in checkpoint or eight else "1.20"


def _graph_options(checkpoint: Int4Checkpoint, options: ExportOptions, context: int, slack: int | None) -> GraphOptions:
    arithmetic = read_arithmetic(checkpoint, context)
    return GraphOptions(
        accuracy_level=ACCURACY_LEVEL[options.activations],
        last_only=options.logits == "last",
        windowed=slack is not None,
        attention_scale=arithmetic.attention_scale,
        eps=arithmetic.eps,
        rope={kind: (cos.numpy(), sin.numpy()) for kind, (cos, sin) in arithmetic.rotation.items()},
    )


def _metadata(shape: ModelShape, options: ExportOptions, context: int, slack: int | None) -> dict[str, str]:
    """What our own runner must know, kept in the model file itself."""
    facts: dict[str, Any] = {"context": context, "chunk": options.chunk, "logits": options.logits, "activations": options.activations}  # noqa: E501  # fmt: skip
    if slack is not None:
        facts["cache_slots"] = (shape.sliding_window or 0) + slack
    return {f"nanokit.{key}": str(value) for key, value in facts.items()}


def _footprint(
    shape: ModelShape, options: ExportOptions, decoder: DecoderGraph, context: int, slack: int | None
) -> dict[str, Any]:
    """Bytes by cause; `file_bytes` is added once the files are written."""
    lengths = {name: region.length for name, region in decoder.data.regions.items()}
    linear = embedding = 0
    for name, length in lengths.items():
        module = name.rpartition(".")[0]
        if module in (EMBEDDING, HEAD):
            embedding += length
        elif module in decoder.modules:
            linear += length
    window = (shape.sliding_window or context) + (slack or 0)
    slots = [window if slack is not None and kind == SLIDING else context for kind in shape.layer_types]
    rows = 1 if options.logits == "last" else options.chunk
    return {
        "linear_bytes": linear,
        "embedding_bytes": embedding,
        "float_weight_bytes": sum(lengths.values()) - linear - embedding,
        "packed_copy_bytes": _packed_copy(shape, decoder),
        "kv_cache_bytes": sum(2 * 4 * n * shape.num_kv_heads * shape.head_dim for n in slots),
        "kv_cache_dtype": "float32",
        "logits_bytes": 4 * rows * shape.vocab_size,
        "context": context,
        "chunk": options.chunk,
    }


def _packed_copy(shape: ModelShape, decoder: DecoderGraph) -> int:
    """Bytes of codes and scales that MatMulNBits lays out anew at load and keeps beside the mapped file.

    The copy itself is a little larger (MLAS adds scale x zero point x sum of codes for every block, float32:
    onnxruntime/core/mlas/lib/qnbitgemm.h, PackedQuantBDataStruct): 0.75 bytes a weight at 32 in a group.
    """
    packed = [names for module, names in decoder.modules.items() if module != EMBEDDING or shape.tied]
    return sum(decoder.data.regions[names[key]].length for names in packed for key in PARTS if key in names)
