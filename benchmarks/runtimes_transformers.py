"""transformers' own executorch integration on an int4 folder, and its .pte behind what `export.bench_worker` measures.

`TorchExportableModuleForDecoderOnlyLM` (transformers.integrations.executorch), torchao's 8da4w linears and 8-bit
embedding, `XnnpackPartitioner`: the steps of optimum-executorch's xnnpack recipe, whose own release needs
transformers 5.0.0rc1 and does not install beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 32
CHUNK = 128


def write_pte(int4: Path, path: Path, context: int) -> None:
    """Dequantise the folder, quantize it as optimum-executorch would, export, lower."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.generation import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    config = AutoConfig.from_pretrained(int4)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # speed does not see the values
    linear = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP))
    table = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    if config.tie_word_embeddings:  # torchao quantizes a module's own parameter
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_input_embeddings().padding_idx = None
    quantize_(model, table, lambda module, _name: isinstance(module, torch.nn.Embedding))
    quantize_(model, linear)
    cache = {"batch_size": 1, "max_cache_len": context}
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=context, cache_config=cache
    )
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=context)
    length = torch.export.Dim("length", min=1, max=CHUNK)
    with torch.no_grad():
        program = exportable.export(
            input_ids=torch.zeros(1, 3, dtype=torch.long),
            cache_position=torch.arange(3),
            dynamic_shapes={"input_ids": {1: length}, "cache_position": {0: length}},
            strict=True,
        )
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods={"get_vocab_size": config.vocab_size},
        )
        made = edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                do_quant_fusion_and_const_prop=True,
            )
        )
    with path.open("wb") as file:
        made.write_to_file(file)


class ReferenceModel:
    """Its program, called with ids and their positions."""

    def __init__(self, program: Any) -> None:
        self._program, self._forward, self._position = program, program.load_method("forward"), 0

    def prefill(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits after a prompt, taken in chunks."""
        self._position = 0
        for start in range(0, len(ids), CHUNK):
            row = self._step(list(ids[start : start + CHUNK]))
        return row

    def decode(self, token: int) -> np.ndarray[Any, Any]:
        """Logits after one more token."""
        return self._step([token])

    def _step(self, ids: list[int]) -> np.ndarray[Any, Any]:
        import torch

        places = torch.arange(self._position, self._position + len(ids))
        self._position += len(ids)
        row: np.ndarray[Any, Any] = self._forward((torch.tensor([ids]), places))[0][0, -1].numpy()
        return row


def prepare(folder: Path, threads: int) -> Callable[[], ReferenceModel]:
    """Load the runtime as our bundles have it; a function that loads the model."""
    from export.executorch_memory import unlock
    from export.executorch_runtime import load_kernels, set_threads

    runtime = load_kernels()
    set_threads(threads)

    def load() -> ReferenceModel:
        program = runtime._load_program(str(folder / "model.pte"))
        unlock(folder / "model.pte")
        return ReferenceModel(program)

    return load
