"""An int4 checkpoint as model.pte: XNNPACK's 4-bit kernel for every linear, ExecuTorch's cache and attention.

The file takes token ids (1, T), T from 1 to the chunk, and the position of the first of them (1,); it gives the
logits. Its metadata methods are those that ExecuTorch's LLM runner (`extension/llm/runner`) reads, so that
`LlmModule` on Android and iOS takes it as it is.

Legend: T positions of a call, V vocabulary, N output channels, K input channels, G = K / group size groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.options import ExportOptions
from nano.errors import UnsupportedError, WorkError
from nano.families import EMBEDDING, HEAD, linear_names
from nano.folder import human_bytes
from nano.progress import say, track
from nano.shapes import ModelShape
from nano.tokens import TextTokenizer
from quantize.packed import PACKED, SCALE, SHAPE, Int4Checkpoint

MODEL = "model.pte"
GROUP_MULTIPLE = 32
"""XNNPACK's blockwise kernel takes groups of a multiple of 32 (backends/xnnpack/operators/node_visitor.py)."""


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
        "modules" (for each quantized module where its codes stand in the file).

    Raises:
        UnsupportedError: something in the checkpoint that the kernels cannot take; nothing is written.
        MissingExtraError: executorch is not installed.
        WorkError: a linear did not get XNNPACK's 4-bit kernel.
    """
    check_grids(checkpoint, options)
    from export.arithmetic import read_arithmetic, resolve_context
    from export.executorch_lower import PartLowerer, build_program, load_toolchain, silenced
    from export.executorch_model import AfterAttention, BeforeAttention, CachePlan, Decoder, Head, Source, layer_source

    shape = checkpoint.shape
    context = resolve_context(shape, options.context)
    chunk = min(options.chunk, context)
    load_toolchain()
    arithmetic = read_arithmetic(checkpoint, context)
    plan = CachePlan.of(shape, context, chunk)
    last_only = options.logits == "last"
    lowerer = PartLowerer(shape, chunk)
    layers = []
    with track("export", shape.num_layers + 4, "steps") as progress, silenced():
        for layer in range(shape.num_layers):
            source = layer_source(checkpoint, layer, arithmetic.eps)
            before, after = (lowerer.lower(part(source)) for part in (BeforeAttention, AfterAttention))
            layers.append((before, after))
            progress.advance(note="lower")
        head = lowerer.lower(Head(Source(checkpoint, "", arithmetic.eps)), 1 if last_only else None)
        decoder = Decoder(checkpoint, arithmetic, plan, (layers, head), last_only)
        methods = metadata_methods(shape, context, chunk, tokenizer)
        program = build_program(decoder, chunk, methods, lambda stage: progress.advance(note=stage))
        with (folder / MODEL).open("wb") as file:
            program.write_to_file(file)
        progress.advance(note="write")
    return {"n": program.executorch_program.execution_plan[0].non_const_buffer_sizes}


def metadata_methods(shape: ModelShape, context: int, chunk: int, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Constants that the LLM runner asks a program for (extension/llm/runner/constants.h)."""
    methods: dict[str, Any] = {
        "get_max_seq_len": chunk,
        "get_max_context_len": context,
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


def check_grids(checkpoint, options) -> None:
    pass
