"""A decoder as an ONNX graph: the operators that onnxruntime-genai's model builder uses, built with onnx-ir.

One code path for all families; what differs is read from `nano.families`. The graph to equal is the builder's
(onnxruntime_genai/models/builders/base.py, version 0.18): MatMulNBits, GroupQueryAttention with the rotation inside,
SimplifiedLayerNormalization, a shared GatherBlockQuantized embedding. Where it differs, on purpose:

- a tied head and the embedding are two initializers over the same bytes of the data file (one copy in the file and
  in the page cache; the builder reshapes or transposes the weight at run time, which costs a second copy);
- float weights keep PyTorch's (N, K) layout and are multiplied by FusedMatMul(transB=1), so they too can be shared;
- with pruned logits the last position is cut out after the last attention, so that layer's MLP sees one row.

Legend: B batch, T positions of a call, P positions in the cache, V vocabulary, D hidden width, F feed-forward width,
H query heads, G key/value heads, A head width, N output and K input channels of a linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from export.grids import onnx_layout
from export.onnx_data import DataFile, floats, packed_codes, scales, zero_bytes, zero_points
from nano.errors import require_module
from nano.families import EMBEDDING, FINAL_NORM, HEAD, QK_NORMS, Family, family_of, layer_prefix, linear_shapes
from nano.shapes import SLIDING, ModelShape
from quantize.packed import Int4Checkpoint, Layout

MICROSOFT = "com.microsoft"
END = np.iinfo(np.int64).max
ROTARY_MULTIPLE = 16
"""GroupQueryAttention rotates only heads whose width is a multiple of this; others are rotated before it."""


@dataclass(frozen=True)
class GraphOptions:
    """What a graph is built for.

    Attributes:
        accuracy_level: of MatMulNBits: 4 takes int8 activations, 1 keeps them float32.
        last_only: logits of a call's last position only.
        windowed: whether sliding layers keep a window-sized cache that the operator evicts from itself.
        attention_scale: factor of the attention scores.
        eps: of every RMS norm.
        rope: per kind of layer ("full_attention", "sliding_attention") cos and sin, float32 (context, A / 2).
    """

    accuracy_level: int
    last_only: bool
    windowed: bool
    attention_scale: float
    eps: float
    rope: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Shared:
    """Values that every layer reads: lengths for the attention, and each kind of layer's rotation.

    `positions` (B, T) is there only where the rotation stands outside the attention.
    """

    seqlens_k: Any
    total_length: Any
    rope: dict[str, tuple[Any, Any]]
    positions: Any


class DecoderGraph:
    """The graph of one checkpoint, under construction; `build` makes the whole."""

    def __init__(self, checkpoint: Int4Checkpoint, options: GraphOptions, data: DataFile) -> None:
        self.ir = require_module("onnx_ir", "onnx")
        self.checkpoint, self.options, self.data = checkpoint, options, data
        self.shape: ModelShape = checkpoint.shape
        self.family: Family = family_of(checkpoint.shape.family)
        self.modules: dict[str, dict[str, Any]] = {}
        self.graph = self.ir.Graph([], [], nodes=[], name="decoder")

    # ---- pieces

    def op(self, op_type: str, inputs: list[Any], name: str, *, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:  # noqa: E501  # fmt: skip
        """Append a node; its output value, or the list of them where there are several."""
        values = [self.ir.Value(name=f"{name}/output_{i}") for i in range(outputs)]
        node = self.ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)
        self.graph.append(node)
        return values[0] if outputs == 1 else values

    def initializer(self, name: str, dtype: str, shape: tuple[int, ...], region: str | None = None) -> Any:
        """A weight by name; made once."""
        if name not in self.graph.initializers:
            self.graph.register_initializer(self.data.value(name, dtype, shape, region))
        return self.graph.initializers[name]

    def constant(self, name: str, array: Any) -> Any:
        """A small tensor that lies in model.onnx itself; made once."""
        if name not in self.graph.initializers:
            tensor = self.ir.tensor(np.asarray(array), name=name)
            value = self.ir.Value(name=name, shape=tensor.shape, type=self.ir.TensorType(tensor.dtype), const_value=tensor)  # noqa: E501  # fmt: skip
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _grid_weights(self, module: str) -> Layout:
        """Lay out codes, scales and zero points of a quantized module; its layout by the operator's blocks."""
        grid = onnx_layout(self.checkpoint, module)
        if module not in self.modules:
            names = {"codes": f"{module}.codes", "scales": f"{module}.scales"}
            row = grid.columns * grid.bits // 8
            self.data.place(names["codes"], grid.rows * row, packed_codes(self.checkpoint, module))
            self.data.place(names["scales"], 4 * grid.rows * grid.groups, scales(self.checkpoint, module, grid.groups))
            if not grid.symmetric:
                names["zero_points"] = f"{module}.zero_points"
                size = grid.rows * zero_bytes(grid.groups, grid.bits)
                self.data.place(names["zero_points"], size, zero_points(self.checkpoint, module, grid.groups))
            self.modules[module] = {**names, "bits": grid.bits, "group_size": grid.group_size}
        return grid

    def _float_weight(self, module: str, size: tuple[int, ...], offset: float = 0.0) -> Any:
        name = f"{module}.weight"
        if name not in self.data.regions:
            self.data.place(name, 4 * int(np.prod(size)), floats(self.checkpoint, name, offset))
        return self.initializer(name, "FLOAT", size)

    def linear(self, x: Any, module: str, size: tuple[int, int], weight: str | None = None) -> Any:
        """x (B, T, K) times the transpose of a weight (N, K); `weight` names another module's, where shared."""
        source = weight or module
        if source not in self.checkpoint:
            w_NK = self._float_weight(source, size)
            return self.op("FusedMatMul", [x, w_NK], module, domain=MICROSOFT, transB=1)
        grid = self._grid_weights(source)
        names = self.modules[source]
        blob = grid.group_size * grid.bits // 8
        # a shared weight is a second initializer over the same bytes: the two operators want other ranks
        codes_name = names["codes"] if source == module else f"{module}.codes"
        codes = self.initializer(codes_name, "UINT8", (grid.rows, grid.groups, blob), names["codes"])
        weights = [codes, self.initializer(names["scales"], "FLOAT", (grid.rows, grid.groups))]
        if not grid.symmetric:
            length = grid.rows * zero_bytes(grid.groups, grid.bits)
            weights.append(self.initializer(names["zero_points"], "UINT8", (length,)))
        return self.op(
            "MatMulNBits", [x, *weights], module, domain=MICROSOFT, K=grid.columns, N=grid.rows,
            bits=grid.bits, block_size=grid.group_size, accuracy_level=self.options.accuracy_level,
        )  # fmt: skip

    def norm(self, x: Any, module: str, width: int) -> Any:
        """RMS norm over the last axis; the family's offset is added to the weight when it is written."""
        weight = self._float_weight(module, (width,), self.family.norm_offset)
        return self.op(
            "SimplifiedLayerNormalization", [x, weight], module, axis=-1, epsilon=self.options.eps, stash_type=1
        )

    def add_norm(self, residual: Any, x: Any, module: str) -> tuple[Any, Any]:
        """(RMS norm of residual + x, residual + x)."""
        weight = self._float_weight(module, (self.shape.hidden_size,), self.family.norm_offset)
        out = self.op(
            "SkipSimplifiedLayerNormalization", [residual, x, weight], module, domain=MICROSOFT, outputs=4,
            epsilon=self.options.eps,
        )  # fmt: skip
        for unused in out[1:3]:
            unused.name = ""  # mean and variance: an empty name leaves an optional output out
        return out[0], out[3]

    # ---- the model

    def build(self) -> Any:
        """The whole graph, with its inputs and outputs."""
        ids = self._input("input_ids", "INT64", ["batch_size", "sequence_length"])
        mask = self._input("attention_mask", "INT64", ["batch_size", "total_sequence_length"])
        shared = self._shared(ids, mask)
        residual = self._embed(ids)
        normed = self.norm(residual, f"{layer_prefix(0)}{self.family.layer_norms[0]}", self.shape.hidden_size)
        caches = []
        for layer in range(self.shape.num_layers):
            out, present = self._attention(layer, normed, shared)
            caches += present
            if layer == self.shape.num_layers - 1 and self.options.last_only:
                out, residual = self._last_row(out, "attention"), self._last_row(residual, "residual")
            normed, residual = self._feed_forward(layer, out, residual)
        logits = self._head(normed)
        logits.name = "logits"
        self._output(logits, ["batch_size", 1 if self.options.last_only else "sequence_length", self.shape.vocab_size])
        self.graph.outputs.extend(caches)
        return self.graph

    def _input(self, name: str, dtype: str, shape: list[Any]) -> Any:
        value = self.ir.Value(name=name, shape=self.ir.Shape(shape), type=self.ir.TensorType(self.ir.DataType[dtype]))
        self.graph.inputs.append(value)
        return value

    def _output(self, value: Any, shape: list[Any]) -> None:
        value.shape, value.type = self.ir.Shape(shape), self.ir.TensorType(self.ir.DataType.FLOAT)
        self.graph.outputs.append(value)

    def _shared(self, ids: Any, mask: Any) -> Shared:
        """GroupQueryAttention counts keys, per row (their number less one) and the most of any row."""
        one, axis = self.constant("one", np.array([1], np.int64)), self.constant("scalar_1", np.array(1, np.int64))
        int32 = int(self.ir.DataType.INT32)
        count = self.op("ReduceSum", [mask, one], "mask/count", keepdims=0)
        seqlens = self.op("Cast", [self.op("Sub", [count, one], "mask/less_one")], "mask/seqlens_k", to=int32)
        width = self.op("Gather", [self.op("Shape", [mask], "mask/shape"), axis], "mask/width", axis=0)
        total = self.op("Cast", [width], "mask/total", to=int32)
        rope = {}
        for kind, tables in self.options.rope.items():
            names = [f"{part}_{kind}" for part in ("cos", "sin")]
            for name, table in zip(names, tables, strict=True):
                self.data.place(name, table.nbytes, lambda table=table: iter((table,)))  # type: ignore[misc]
            cos, sin = (self.initializer(name, "FLOAT", tables[0].shape) for name in names)
            rope[kind] = (cos, sin)
        positions = self._positions(ids, count) if self.shape.head_dim % ROTARY_MULTIPLE else None
        return Shared(seqlens, total, rope, positions)

    def _positions(self, ids: Any, count: Any) -> Any:
        """(B, T): each row's tokens stand at its last T positions."""
        axis, zero, step = (self.constant(f"scalar_{i}", np.array(i, np.int64)) for i in (1, 0, 1))
        length = self.op("Gather", [self.op("Shape", [ids], "positions/shape"), axis], "positions/length", axis=0)
        within = self.op("Range", [zero, length, step], "positions/within")
        start = self.op("Sub", [count, length], "positions/start")
        column = self.op("Unsqueeze", [start, self.constant("one", np.array([1], np.int64))], "positions/column")
        return self.op("Add", [column, within], "positions")

    def _embed(self, ids: Any) -> Any:
        v, d = self.shape.vocab_size, self.shape.hidden_size
        if EMBEDDING in self.checkpoint:
            grid = self._grid_weights(EMBEDDING)
            names = self.modules[EMBEDDING]
            codes = self.initializer(names["codes"], "UINT8", (v, d * grid.bits // 8))
            scale = self.initializer(names["scales"], "FLOAT", (v, grid.groups))
            x = self.op(
                "GatherBlockQuantized", [codes, ids, scale], EMBEDDING, domain=MICROSOFT,
                bits=grid.bits, block_size=grid.group_size, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
        else:
            x = self.op("Gather", [self._float_weight(EMBEDDING, (v, d)), ids], EMBEDDING, axis=0)
        if self.family.scaled_embedding:
            scale = self.constant("embedding_scale", np.array(np.sqrt(d), np.float32))
            x = self.op("Mul", [x, scale], f"{EMBEDDING}/scale")
        return x

    def _attention(self, layer: int, x: Any, shared: Shared) -> tuple[Any, list[Any]]:
        """Attention of one layer up to its output projection; and its two present caches."""
        prefix, sizes, kind = layer_prefix(layer), linear_shapes(self.shape), self.shape.layer_types[layer]
        q, k, v = (self.linear(x, f"{prefix}self_attn.{p}_proj", sizes[f"self_attn.{p}_proj"]) for p in "qkv")
        if self.family.qk_norm:
            q, k = (self._head_norm(y, f"{prefix}{name}") for y, name in zip((q, k), QK_NORMS, strict=True))
        rope = list(shared.rope[kind])
        if shared.positions is not None:
            q, k = (
                self.op(
                    "RotaryEmbedding", [y, shared.positions, *rope], f"{prefix}self_attn.{p}_rotary", domain=MICROSOFT
                )
                for y, p in zip((q, k), "qk", strict=True)
            )
            rope = []
        sliding = kind == SLIDING
        slots = "sliding" if sliding and self.options.windowed else "sequence"
        heads = [self.shape.num_kv_heads, f"past_{slots}_length", self.shape.head_dim]
        past = [self._input(f"past_key_values.{layer}.{part}", "FLOAT", ["batch_size", *heads]) for part in ("key", "value")]  # noqa: E501  # fmt: skip
        windowed = {"sliding_window_cache": 1} if sliding and self.options.windowed else {}
        out = self.op(
            "GroupQueryAttention", [q, k, v, *past, shared.seqlens_k, shared.total_length, *rope],
            f"{prefix}self_attn", domain=MICROSOFT, outputs=3, num_heads=self.shape.num_heads,
            kv_num_heads=self.shape.num_kv_heads, scale=self.options.attention_scale, do_rotary=int(bool(rope)),
            rotary_interleaved=0, local_window_size=self.shape.sliding_window if sliding else -1, **windowed,
        )  # fmt: skip
        for value, part in zip(out[1:], ("key", "value"), strict=True):
            value.name = f"present.{layer}.{part}"
            value.shape = self.ir.Shape(["batch_size", heads[0], f"total_{slots}_length", heads[2]])
            value.type = self.ir.TensorType(self.ir.DataType.FLOAT)
        return out[0], out[1:]

    def _head_norm(self, x: Any, module: str) -> Any:
        """RMS norm of each head of (B, T, heads x A)."""
        split = self.constant("shape/heads", np.array([0, -1, self.shape.head_dim], np.int64))
        width = self.shape.head_dim * (self.shape.num_heads if module.endswith("q_norm") else self.shape.num_kv_heads)
        join = self.constant(f"shape/{width}", np.array([0, -1, width], np.int64))
        heads = self.op("Reshape", [x, split], f"{module}/split")
        return self.op("Reshape", [self.norm(heads, module, self.shape.head_dim), join], f"{module}/join")

    def _feed_forward(self, layer: int, attention: Any, residual: Any) -> tuple[Any, Any]:
        """Output projection, MLP, and the norms around them; ends in the next layer's first norm."""
        prefix, sizes, d = layer_prefix(layer), linear_shapes(self.shape), self.shape.hidden_size
        norms = [prefix + name for name in self.family.layer_norms]
        following = layer_prefix(layer + 1) + self.family.layer_norms[0]
        if layer == self.shape.num_layers - 1:
            following = FINAL_NORM
        x = self.linear(attention, f"{prefix}self_attn.o_proj", sizes["self_attn.o_proj"])
        if self.family.post_norms:
            x = self.norm(x, norms[1], d)
        normed, residual = self.add_norm(residual, x, norms[2 if self.family.post_norms else 1])
        gate, up = (self.linear(normed, f"{prefix}mlp.{p}_proj", sizes[f"mlp.{p}_proj"]) for p in ("gate", "up"))
        gated = self.op("Mul", [self._activate(gate, f"{prefix}mlp.act"), up], f"{prefix}mlp/gated")
        x = self.linear(gated, f"{prefix}mlp.down_proj", sizes["mlp.down_proj"])
        if self.family.post_norms:
            x = self.norm(x, norms[3], d)
        return self.add_norm(residual, x, following)

    def _activate(self, x: Any, name: str) -> Any:
        if self.family.activation == "silu":
            return self.op("Mul", [x, self.op("Sigmoid", [x], f"{name}/sigmoid")], name)
        assert self.family.activation == "gelu_pytorch_tanh", self.family.activation
        return self.op("Gelu", [x], name, approximate="tanh")

    def _last_row(self, x: Any, name: str) -> Any:
        """(B, T, D) to (B, 1, D)."""
        ends = [self.constant(f"last/{key}", np.array([value], np.int64)) for key, value in (("start", -1), ("end", END), ("axis", 1))]  # noqa: E501  # fmt: skip
        return self.op("Slice", [x, *ends], f"last/{name}")

    def _head(self, x: Any) -> Any:
        return self.linear(x, HEAD, (self.shape.vocab_size, self.shape.hidden_size), EMBEDDING if self.shape.tied else None)  # noqa: E501  # fmt: skip
