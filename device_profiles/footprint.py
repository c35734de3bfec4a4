"""`Footprint`: the memory a model takes on a phone, by cause, predicted without loading anything.

One set of facts (`BundleFacts`) comes from a shape and a recipe before anything is trained, or from a bundle's
manifest.json; one formula a runtime turns it into bytes. With constants c of the runtime:

    packed   = c.packed_per_byte x bytes of codes and scales that the runtime re-lays for its kernels
               + c.head_per_byte x bytes of a head that stays float                                      (dirty)
    kv       = sum over layers of 2 x slots x G x A x bytes a value (4, or 1 and a scale and zero point for each head);
               sliding layers hold window + slack                                                        (dirty)
    arena    = c.arena_per_byte x 4 T max(2D + 3F, 2D + 2HA + 2GA + c.scores x H x slots)                (dirty)
    logits   = 4 V for each row that a call returns                                                      (dirty)
    tokens   = c.tokenizer_per_byte x bytes of tokenizer.json                                            (dirty)
    runtime  = c.base_bytes: threads, graph, allocator                                                   (dirty)
    mapped   = float weights and the embedding, read in place from the file                              (clean)

ExecuTorch's XNNPACK and ONNX Runtime's MatMulNBits both keep a packed copy of every int4 linear for good (anonymous
memory, which a phone cannot evict), after which the file's own pages of those linears are never read again and do not
count. The constants are measured, not chosen: `benchmarks/footprint.py` runs real bundles and writes them to
`_constants.toml` beside this file, with the date, the machine and the versions.

Legend: V vocabulary, D hidden width, F feed-forward width, H query heads, G key/value heads, A head width, T positions
of a prefill chunk.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from nano.errors import BadFileError, RequestError, UnsupportedError
from nano.families import family_of, linear_shapes
from nano.shapes import FULL, SLIDING, ModelShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Runtime = Literal["executorch", "onnx"]
RUNTIMES: tuple[Runtime, ...] = ("executorch", "onnx")
EmbeddingBits = Literal["float", "8", "4"]
CacheType = Literal["float", "int8"]

if TYPE_CHECKING:
    from nano.manifest import Manifest

CONSTANTS = Path(__file__).resolve().parent / "_constants.toml"
FLOAT_BYTES = 4
"""Both runtimes compute in float32: caches, activations, norms and float embeddings are written so."""

INT8_CACHE_EXTRA = 5
"""Bytes beside the int8 values of one head at one position: a float32 scale and an int8 zero point."""

ROW_BLOCKS = (128, 64, 32, 16)
"""Blocks that a row with one scale is cut into for ONNX Runtime, the first that divides it: larger ones repeat the
scale less often, but activations are quantized by the same blocks, and those of 256 are the coarser."""


@dataclass(frozen=True)
class PlannedRecipe:
    """What decides about memory before there is a bundle.

    Attributes:
        runtime: which runtime it is for.
        group_size: input channels that share a scale.
        embedding: bits of the embedding (and of a tied head).
        context: positions the cache holds.
        chunk: positions of one prefill call.
        tokenizer_bytes: size of tokenizer.json; 0 where it is not known.
        kv: what the cache holds: float32, or int8 with a scale for each head and position.
    """

    runtime: Runtime = "executorch"
    group_size: int = 32
    embedding: EmbeddingBits = "4"
    context: int = 4096
    chunk: int = 128
    tokenizer_bytes: int = 0
    kv: CacheType = "float"


@dataclass(frozen=True)
class BundleFacts:
    """Bytes of a bundle's parts, as an exporter wrote them in the manifest or as a recipe implies them.

    Attributes:
        runtime: which runtime reads it.
        shape: the model's dimensions.
        file_bytes: model file and its data.
        packed_source_bytes: codes and scales that the runtime re-lays at load (linears, and the head).
        float_head_bytes: of an output head that is not on the grid; 0 where it is.
        mapped_bytes: what it reads in place: embedding, norms and other float weights.
        kv_cache_bytes: of the cache at `context`.
        logits_bytes: of one call's answer.
        context: positions the cache holds.
        chunk: positions of the longest prefill call.
        tokenizer_bytes: size of tokenizer.json.
        kv: what the cache holds.
    """

    runtime: Runtime
    shape: ModelShape
    file_bytes: int
    packed_source_bytes: int
    float_head_bytes: int
    mapped_bytes: int
    kv_cache_bytes: int
    logits_bytes: int
    context: int
    chunk: int
    tokenizer_bytes: int
    kv: CacheType = "float"


@dataclass(frozen=True)
class RuntimeConstants:
    """What was measured of one runtime; see the formulas in the module's docstring.

    Attributes:
        packed_per_byte: bytes of the packed copy for each byte of codes and scales.
        head_per_byte: bytes of the packed copy for each byte of a float head.
        arena_per_byte: activation memory over what one layer's live tensors take.
        scores: whether attention keeps a row of scores for every head and position (1) or works in tiles (0).
        tokenizer_per_byte: bytes of a loaded tokenizer for each byte of tokenizer.json.
        base_bytes: what the runtime takes besides.
        error: the largest relative error of the predicted peak over the measured bundles.
        measured: date, machine and versions.
    """

    packed_per_byte: float
    head_per_byte: float
    arena_per_byte: float
    scores: float
    tokenizer_per_byte: float
    base_bytes: float
    error: float
    measured: str


@dataclass(frozen=True)
class Footprint:
    """Bytes by cause. All but `mapped_weights` are dirty: written by the process, not to be evicted.

    Attributes:
        packed_weights: the kernels' own copy of the int4 weights.
        kv_cache: keys and values at the context.
        arena: activations of a prefill chunk.
        logits: one call's answer.
        tokenizer: vocabulary and merges in memory.
        runtime: the runtime itself.
        mapped_weights: embedding and float weights, read in place from the file (clean).
    """

    packed_weights: int
    kv_cache: int
    arena: int
    logits: int
    tokenizer: int
    runtime: int
    mapped_weights: int

    @property
    def dirty(self) -> int:
        """What iOS counts against an app, and what Android cannot take back without killing it."""
        return self.resident - self.mapped_weights

    @property
    def resident(self) -> int:
        """Everything that must stay in memory for decoding not to read from flash."""
        return sum(self.by_cause().values())

    def by_cause(self) -> dict[str, int]:
        """Bytes by the names of the causes."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def predict(facts: BundleFacts, context: int | None = None) -> Footprint:
    """The footprint of a bundle at its context, or at another one.

    Args:
        facts: from `planned_facts` or `manifest_facts`.
        context: positions of the cache; the bundle's own where None.
    """
    if context is not None and context != facts.context:
        facts = at_context(facts, context)
    constants = runtime_constants(facts.runtime)
    live = live_bytes(facts.shape, facts.chunk, facts.context, constants.scores)
    return Footprint(
        packed_weights=round(
            constants.packed_per_byte * facts.packed_source_bytes + constants.head_per_byte * facts.float_head_bytes
        ),
        kv_cache=facts.kv_cache_bytes,
        arena=round(constants.arena_per_byte * live),
        logits=facts.logits_bytes,
        tokenizer=round(constants.tokenizer_per_byte * facts.tokenizer_bytes),
        runtime=round(constants.base_bytes),
        mapped_weights=facts.mapped_bytes,
    )


def planned_facts(shape: ModelShape, recipe: PlannedRecipe) -> BundleFacts:
    """What a bundle of this shape and recipe will hold, before anything is trained or written.

    Raises:
        RequestError: the context is not positive or beyond the model's.
        UnsupportedError: an int8 cache for ONNX Runtime.
    """
    check_context(shape, recipe.context)
    if recipe.kv == "int8" and recipe.runtime == "onnx":
        raise UnsupportedError(
            "ONNX Runtime's attention keeps a float cache on CPUs.",
            found="--kv-cache int8 --runtime onnx",
            todo="--kv-cache float",
        )
    parts = planned_parts(shape, recipe)
    on_grid = recipe.embedding != "float"
    head = _tables(shape, recipe)[1]
    chunk = min(recipe.chunk, recipe.context)
    return BundleFacts(
        runtime=recipe.runtime,
        shape=shape,
        file_bytes=sum(parts.values()),
        packed_source_bytes=parts["linears"] + (head if on_grid else 0),
        float_head_bytes=0 if on_grid else head,
        mapped_bytes=parts["embedding"] + parts["norms"],
        kv_cache_bytes=cache_bytes(shape, recipe.runtime, recipe.context, chunk, recipe.kv),
        logits_bytes=FLOAT_BYTES * shape.vocab_size,
        context=recipe.context,
        chunk=chunk,
        tokenizer_bytes=recipe.tokenizer_bytes,
        kv=recipe.kv,
    )


def planned_parts(shape: ModelShape, recipe: PlannedRecipe) -> dict[str, int]:
    """Bytes of a bundle's file by part: linears, embedding, head (where it is stored apart), norms.

    Scales of int4 take two bytes in a .pte, and four in ONNX; an int8 embedding has one scale a row (in ONNX for each
    block of it). The codes of a tied embedding stand once in either; in a .pte the head has scales of its own.
    """
    scale_bytes = 2 if recipe.runtime == "executorch" else FLOAT_BYTES
    linears = shape.num_layers * sum(
        _grid_bytes(*size, 4, recipe.group_size, scale_bytes) for size in linear_shapes(shape).values()
    )
    table, head = _tables(shape, recipe)
    if shape.tied and recipe.embedding != "float":
        head -= shape.vocab_size * shape.hidden_size * int(recipe.embedding) // 8
    norms = FLOAT_BYTES * (shape.num_parameters - shape.embedding_parameters - shape.linear_parameters)
    own_head = recipe.runtime == "executorch" or not shape.tied
    return {"linears": linears, "embedding": table, "head": head if own_head else 0, "norms": norms}


def _tables(shape: ModelShape, recipe: PlannedRecipe) -> tuple[int, int]:
    """Bytes of the embedding as it is looked up, and of a head made of it."""
    v, d, executorch = shape.vocab_size, shape.hidden_size, recipe.runtime == "executorch"
    if recipe.embedding == "float":
        return FLOAT_BYTES * v * d, FLOAT_BYTES * v * d
    if recipe.embedding == "4":
        size = _grid_bytes(v, d, 4, recipe.group_size, 2 if executorch else FLOAT_BYTES)
        return size, size
    group = d if executorch else row_block(d) or d
    return _grid_bytes(v, d, 8, group, 2 if executorch else FLOAT_BYTES), _grid_bytes(v, d, 8, group, FLOAT_BYTES)


def row_block(columns: int) -> int | None:
    """The blocks that ONNX Runtime gets a row with one scale in; None where none divides it."""
    return next((block for block in ROW_BLOCKS if columns % block == 0), None)


def manifest_facts(manifest: Manifest, tokenizer_bytes: int, where: str) -> BundleFacts:
    """The facts that an exporter wrote into a bundle's manifest.

    Args:
        manifest: of kind "executorch" or "onnx".
        tokenizer_bytes: size of the bundle's tokenizer.json.
        where: the manifest's path, for messages.

    Raises:
        BadFileError: a fact is missing or no byte count.
    """
    written = manifest.footprint

    def count(name: str) -> int:
        value = written.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise BadFileError(
                "The bundle's manifest lacks a fact that memory prediction needs.",
                found=f"{where}: footprint.{name} = {value!r}",
                expected="a number of bytes, as nanokit export writes it",
                todo="export the bundle again",
            )
        return value

    try:
        shape = ModelShape(**{**manifest.shape, "layer_types": tuple(manifest.shape["layer_types"])})
    except (TypeError, KeyError) as error:
        raise BadFileError(
            "The bundle's manifest does not describe the model.",
            found=f"{where}: shape: {error}",
            todo="export it again",
        ) from None
    linears, packed = count("linear_bytes"), count("packed_copy_bytes")
    head_on_grid = packed > linears
    return BundleFacts(
        runtime=cast(Runtime, manifest.kind),
        shape=shape,
        file_bytes=count("file_bytes"),
        packed_source_bytes=packed,
        float_head_bytes=0 if head_on_grid else FLOAT_BYTES * shape.vocab_size * shape.hidden_size,
        mapped_bytes=count("float_weight_bytes") + count("embedding_bytes"),
        kv_cache_bytes=count("kv_cache_bytes"),
        logits_bytes=count("logits_bytes"),
        context=count("context"),
        chunk=count("chunk"),
        tokenizer_bytes=tokenizer_bytes,
        kv="int8" if written.get("kv_cache_dtype") == "int8" else "float",
    )


def check_context(shape: ModelShape, context: int) -> None:
    """Raise RequestError for a context that is not positive or longer than the model was trained for."""
    if not 1 <= context <= shape.max_positions:
        raise RequestError(
            "The context does not fit the model.",
            found=f"--context {context}",
            expected=f"1 to {shape.max_positions:,}, the positions this model knows",
        )


def cache_bytes(shape: ModelShape, runtime: Runtime, context: int, chunk: int, kv: CacheType = "float") -> int:
    """Bytes of the KV cache as the exporters allocate it.

    A sliding layer keeps its window and room for a chunk, or the context where that is shorter: window + chunk - 1
    slots in ExecuTorch's ring, window + chunk in ONNX.
    """
    slack = chunk - 1 if runtime == "executorch" else chunk
    slots = [
        min(context, (shape.sliding_window or context) + slack) if kind == SLIDING else context
        for kind in shape.layer_types
    ]
    each = FLOAT_BYTES * shape.head_dim if kv == "float" else shape.head_dim + INT8_CACHE_EXTRA
    return sum(slots) * 2 * shape.num_kv_heads * each


def at_context(facts: BundleFacts, context: int) -> BundleFacts:
    """The same model with a cache of another length."""
    check_context(facts.shape, context)
    own = cache_bytes(facts.shape, facts.runtime, facts.context, facts.chunk, facts.kv)
    other = cache_bytes(facts.shape, facts.runtime, context, facts.chunk, facts.kv)
    kv = facts.kv_cache_bytes * other // own  # the bundle's own bytes lead: an exporter may keep more than the formula
    return replace(facts, context=context, kv_cache_bytes=kv, chunk=min(facts.chunk, context))


def _grid_bytes(rows: int, columns: int, bits: int, group: int, scale_bytes: int) -> int:
    """Codes and scales of one weight; columns are padded to whole groups."""
    groups = math.ceil(columns / group)
    return rows * groups * (group * bits // 8 + scale_bytes)


def live_bytes(shape: ModelShape, chunk: int, context: int, scores: float) -> float:
    """float32 tensors alive at once in the widest place of one layer, for a chunk."""
    d, f = shape.hidden_size, shape.intermediate_size
    q_width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    full = FULL in shape.layer_types
    slots = context if full else min(context, (shape.sliding_window or context) + chunk)
    attention = 2 * d + 2 * q_width + 2 * kv_width + scores * shape.num_heads * slots
    mlp = 2 * d + 3 * f + (d if family_of(shape.family).post_norms else 0)
    return FLOAT_BYTES * chunk * max(mlp, attention)


@cache
def runtime_constants(runtime: Runtime) -> RuntimeConstants:
    """The measured constants of one runtime."""
    table = tomllib.loads(CONSTANTS.read_text(encoding="utf-8"))
    return RuntimeConstants(**table[runtime])
