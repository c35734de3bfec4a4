"""An int4 checkpoint as model.pte: XNNPACK's 4-bit kernel for every linear, ExecuTorch's cache and attention.

The file takes token ids (1, T), T from 1 to the chunk, and the position of the first of them (1,); it gives the
logits. Its metadata methods are those that ExecuTorch's LLM runner (`extension/llm/runner`) reads, so that
`LlmModule` on Android and iOS takes it as it is.

Legend: T positions of a call, V vocabulary, D hidden width, K input channels.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.executorch_backends import backend_of
from export.executorch_file import MODEL
from export.grids import check_grid
from export.options import ExportOptions
from export.silence import silenced
from nano.errors import UnsupportedError
from nano.families import linear_names
from nano.progress import Track, track
from nano.shapes import ModelShape
from nano.tokens import FILE as TOKENIZER
from nano.tokens import TextTokenizer
from quantize.packed import Int4Checkpoint, Layout
from quantize.runtimes import role_of

if TYPE_CHECKING:
    from torch import nn

    from export.executorch_model import CachePlan


def write_pte(
    checkpoint: Int4Checkpoint, folder: Path, options: ExportOptions, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Write model.pte; tokenizer files are the caller's.

    Args:
        checkpoint: the int4 folder, opened.
        folder: exists (a staged folder).
        options: see `ExportOptions`.
        tokenizer: gives the ids that begin and end a text.

    Returns:
        Plain data: "footprint" (bytes by cause, "context", "chunk"), "delegation" (linears by kernel, delegates),
        "modules" (for each quantized module its bits, group size, and where codes and scales stand in the file).

    Raises:
        UnsupportedError: something in the checkpoint that the kernels cannot take; nothing is written.
        MissingExtraError: executorch is not installed.
        WorkError: a decoder linear did not get XNNPACK's 4-bit kernel.
    """
    check_executorch(checkpoint, options)
    from export.arithmetic import resolve_context
    from export.executorch_facts import describe
    from export.executorch_lower import load_toolchain
    from export.executorch_model import CachePlan
    from export.executorch_tie import share_table

    context = resolve_context(checkpoint.shape, options.context)
    plan = CachePlan.of(checkpoint.shape, context, min(options.chunk, context), int8=options.kv_cache == "int8")
    last_only = options.logits == "last"
    methods = metadata_methods(checkpoint.shape, plan, tokenizer)
    with silenced(our_words=True):
        load_toolchain()
        with track("export", checkpoint.shape.num_layers + 6, "steps") as progress:
            _write(checkpoint, folder / MODEL, plan, methods, options, progress)
            gc.collect()  # programs hold themselves in cycles, and with them all weights
            share_table(folder)
            facts = describe(folder, checkpoint.shape, plan, last_only)
            progress.advance(note="read back")
    return facts


def _write(
    checkpoint: Int4Checkpoint,
    path: Path,
    plan: CachePlan,
    methods: dict[str, Any],
    options: ExportOptions,
    progress: Track,
) -> None:
    """Lower every part, trace the decoder around them, write the file."""
    from export.arithmetic import read_arithmetic
    from export.executorch_lower import build_program
    from export.executorch_model import Decoder
    from export.executorch_parts import AfterAttention, BeforeAttention, Head, Source, layer_source

    arithmetic = read_arithmetic(checkpoint, plan.context)
    lowerer = backend_of(options.backend).load()(checkpoint.shape, plan.chunk)
    last_only = options.logits == "last"
    layers: list[tuple[nn.Module, nn.Module]] = []
    for layer in range(checkpoint.shape.num_layers):
        source = layer_source(checkpoint, layer, arithmetic.eps)
        layers.append((lowerer.lower(BeforeAttention(source)), lowerer.lower(AfterAttention(source))))
        progress.advance(note="lower layers")
    head = lowerer.lower(Head(Source(checkpoint, "", arithmetic.eps)), 1 if last_only else plan.chunk)
    progress.advance(note="lower head")
    decoder = Decoder(checkpoint, arithmetic, plan, (layers, head), last_only)
    program = build_program(decoder, plan.chunk, methods, lambda stage: progress.advance(note=stage))
    with path.open("wb") as file:
        program.write_to_file(file)
    progress.advance(note="write")


def check_executorch(checkpoint: Int4Checkpoint, options: ExportOptions) -> None:
    """Refuse what XNNPACK's kernels cannot take, before any work.

    Raises:
        UnsupportedError: says which module or option, and what would be taken.
    """
    if options.activations == "float":
        raise UnsupportedError(
            "ExecuTorch's 4-bit kernel always takes int8 activations.",
            found="--activations float",
            todo="leave it out, or export with --format onnx",
        )
    if options.ort:
        raise UnsupportedError(
            "The ORT format is ONNX Runtime's.", found="--ort", todo="leave it out, or export with --format onnx"
        )
    backend_of(options.backend)
    if options.chunk < 1:
        raise UnsupportedError("The chunk is too small.", found=f"--chunk {options.chunk}", expected="at least 1")
    shape = checkpoint.shape
    for module in linear_names(shape):
        if module not in checkpoint:
            raise UnsupportedError(
                "Every decoder linear must be on a grid for ExecuTorch.",
                found=f"'{module}' is float",
                todo="quantize it too, or export with --format onnx",
            )
    for module in checkpoint.modules:
        _check_scales(checkpoint, module, check_grid(checkpoint, module, "executorch"))


def _check_scales(checkpoint: Int4Checkpoint, module: str, grid: Layout) -> None:
    """Scales of the blockwise int4 kernel must be bfloat16; those of int8 rows are kept as float32."""
    import torch

    if grid.bits == 8 or role_of(module, checkpoint.shape) == "table":
        return
    scale_NG = checkpoint.scales(module)
    if not torch.equal(scale_NG, scale_NG.to(torch.bfloat16).float()):
        raise UnsupportedError(
            "XNNPACK's blockwise kernel keeps scales in bfloat16, and these would be rounded.",
            found=f"scales of '{module}' that are no bfloat16",
            todo="quantize with nanokit quantize, which chooses such scales first",
        )


def metadata_methods(shape: ModelShape, plan: CachePlan, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Constants that the LLM runner asks a program for (extension/llm/runner/constants.h)."""
    methods: dict[str, Any] = {
        "get_max_seq_len": plan.chunk,
        "get_max_context_len": plan.context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_vocab_size": shape.vocab_size,
        "get_n_layers": shape.num_layers,
        "get_eos_ids": list(tokenizer.eos_ids),
    }
    if tokenizer.bos_id is not None:
        methods["get_bos_id"] = tokenizer.bos_id
    return methods


def adapt_tokenizer(folder: Path) -> bool:
    """Make a bundle's tokenizer.json decode well token by token, as ExecuTorch's C++ runner does.

    Decoders in SentencePiece's manner end with a Strip of the text's first space. The runner applies it to every
    token, so all spaces vanish ("namedLily.Shelovedtoplay"). Without that step only a whole text's first space
    is kept; ids are not touched.

    Returns:
        Whether there was such a step.
    """
    path = folder / TOKENIZER
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    decoder = tokenizer.get("decoder") or {}
    steps = decoder.get("decoders", [])
    kept = [step for step in steps if not (step.get("type") == "Strip" and step.get("start", 0) > 0)]
    if len(kept) == len(steps):
        return False
    decoder["decoders"] = kept
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
    return True
