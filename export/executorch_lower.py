"""From torch modules to an ExecuTorch program, with each kind of part traced once.

All layers of a decoder are the same graph over other tensors. So each part (see `export.executorch_parts`) is
traced and brought to ExecuTorch's edge dialect once; for every layer, XNNPACK's own serialiser then runs over that
graph with the layer's tensors. The decoder around the parts is traced last, with the finished delegates in it, and
takes no real weights but the embedding. Against lowering the whole model at once this gives the same delegates in a
tenth of the time (docs/log.md), and no layer's weights stay in memory but as the bytes that go to the file.

Legend: T positions of a call, D hidden width, H query heads, G key/value heads, A head width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from export.executorch_parts import Part, WithOperands
from export.silence import silenced
from nano.errors import WorkError, require_module
from nano.shapes import ModelShape

LINEARS_ONLY = "dqlinear_partitioner"
"""Compile spec under which XNNPACK's preprocessing runs its linear pass alone: the others rewrite convolutions,
upsampling and copies, of which a decoder's part has none, and cost 95% of the time."""


def load_toolchain() -> None:
    """Import ExecuTorch and register its operators, silently.

    Raises:
        MissingExtraError: it is not installed.
    """
    with silenced():
        require_module("executorch.exir", "executorch")
        require_module("executorch.kernels.quantized", "executorch")
        require_module("executorch.extension.llm.custom_ops.custom_ops", "executorch")
        require_module("torchao.quantization", "executorch")


class PartLowerer:
    """Turns a decoder's parts into XNNPACK delegates; parts that differ only in their tensors share one trace.

    Args:
        shape: the model's dimensions.
        chunk: positions of the longest call; the delegates take any shorter one too.
    """

    def __init__(self, shape: ModelShape, chunk: int) -> None:
        self.shape, self.chunk = shape, chunk
        self._edges: dict[tuple[object, ...], Any] = {}
        self._outlines: dict[str, Any] = {}

    def lower(self, part: Part, positions: int | None = None) -> WithOperands:
        """One part as a delegate, to be called with the part's activations.

        Args:
            part: a `BeforeAttention`, `AfterAttention` or `Head`.
            positions: of the example it is traced with; the chunk where None.

        Raises:
            WorkError: XNNPACK does not take every operator of it.
        """
        from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
        from executorch.exir.backend.compile_spec_schema import CompileSpec
        from executorch.exir.lowered_backend_module import LoweredBackendModule

        buffers = dict(part.named_buffers())
        kind = type(part).__name__
        signature = (kind, *((name, tensor.dtype, tensor.shape) for name, tensor in buffers.items()))
        if signature not in self._edges:
            edge = self._edge(part, positions or self.chunk)
            for name in buffers:
                del edge.state_dict[name]  # what stays are constants of the graph, such as eps
            self._edges[signature] = edge
        program = _with_tensors(self._edges[signature], buffers)
        made = XnnpackBackend.preprocess(program, [CompileSpec(LINEARS_ONLY, b"")])
        delegate: nn.Module = LoweredBackendModule(
            edge_program=self._outline(kind, part.operands),
            backend_id=XnnpackBackend.__name__,
            processed_bytes=made.processed_bytes,
            compile_specs=[],
            named_data_store_output=made.data_store_output,
        )
        return WithOperands(delegate, part.operands)

    def _edge(self, part: Part, positions: int) -> Any:
        """A part in the edge dialect, checked to be XNNPACK's as a whole, every linear with its own kernel."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge

        with torch.no_grad():
            example = (*self._example(type(part).__name__, positions), *part.operands)
            program = torch.export.export(part, example, strict=False)
            config = _edge_config(preserve_ops=[torch.ops.aten.linear.default])
            edge = to_edge(program, compile_config=config).exported_program()
        # marks the quantizers that belong to a linear's kernel, and every operator that XNNPACK takes
        tags = XnnpackPartitioner().partition(edge).partition_tags
        refused = [n for n in edge.graph.nodes if n.op == "call_function" and "delegation_tag" not in n.meta]
        if refused or len(tags) != 1:
            raise WorkError(
                f"XNNPACK does not take the whole of {type(part).__name__}.",
                found=", ".join(str(n.target) for n in refused) or f"{len(tags)} pieces",
                todo="install the executorch that nanokit was tested with: pip install 'nanokit[executorch]'",
            )
        return edge

    def _example(self, kind: str, positions: int) -> tuple[torch.Tensor, ...]:
        shape = self.shape
        x_1TD = torch.zeros(1, positions, shape.hidden_size)
        if kind == "BeforeAttention":
            angle_1T1A = torch.zeros(1, positions, 1, shape.head_dim)
            return x_1TD, angle_1T1A, angle_1T1A.clone()
        if kind == "AfterAttention":
            return torch.zeros(1, positions, shape.num_heads, shape.head_dim), x_1TD
        return (x_1TD,)

    def _outline(self, kind: str, operands: list[torch.Tensor]) -> Any:
        """A program that only knows the sizes of a part's outputs: all that tracing the decoder asks of a delegate."""
        if kind not in self._outlines:
            example = self._example(kind, self.chunk)
            module = _Outline(self.shape, kind)
            dynamic = ((*(_dynamic(self.chunk) for _ in example), *(None for _ in operands)),)
            inputs = (*example, *operands)
            self._outlines[kind] = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        return self._outlines[kind]


def _with_tensors(edge: Any, buffers: Mapping[str, torch.Tensor]) -> Any:
    """A program of its own graph, which a backend may change, over other tensors, which are not copied."""
    return torch.export.ExportedProgram(
        root=copy.deepcopy(edge.graph_module),
        graph=copy.deepcopy(edge.graph),
        graph_signature=edge.graph_signature,
        state_dict={**edge.state_dict, **buffers},
        range_constraints=edge.range_constraints,
        module_call_graph=edge.module_call_graph,
        example_inputs=edge.example_inputs,
        constants=edge.constants,
        verifiers=[edge.verifier],
    )


class _Outline(nn.Module):
    """Stands in for a part while the decoder is traced: outputs of the right sizes, without contents."""

    def __init__(self, shape: ModelShape, kind: str) -> None:
        super().__init__()
        self.shape, self.kind = shape, kind

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        shape, length = self.shape, inputs[0].shape[1]
        if self.kind == "BeforeAttention":
            heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
            return tuple(inputs[0].new_empty(1, length, count, shape.head_dim) for count in heads)
        width = shape.hidden_size if self.kind == "AfterAttention" else shape.vocab_size
        return inputs[0].new_empty(1, length, width)


def _dynamic(chunk: int) -> dict[int, Any] | None:
    """The second dimension is a length from 1 to the chunk."""
    return {1: torch.export.Dim("length", min=1, max=chunk)} if chunk > 1 else None


def _edge_config(**more: Any) -> Any:
    from executorch.exir import EdgeCompileConfig

    # torchao's and llama's operators are not in the core set that validity is checked against
    return EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, **more)


def build_program(decoder: nn.Module, chunk: int, methods: Mapping[str, Any], note: Callable[[str], None]) -> Any:
    """Trace the decoder around its delegates and plan its memory; ExecuTorch's program manager.

    Args:
        decoder: an `export.executorch_model.Decoder` whose parts are delegates.
        chunk: positions of the longest call.
        methods: metadata methods, name to constant.
        note: is told the stage.
    """
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    note("trace")
    example = (torch.zeros(1, min(chunk, 3), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with torch.no_grad():
        program = torch.export.export(decoder, example, dynamic_shapes=(_dynamic(chunk), None), strict=False)
    note("edge")
    edge = to_edge(program, constant_methods=dict(methods), compile_config=_edge_config())
    note("plan memory")
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
