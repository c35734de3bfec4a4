"""stories260K on real text: the .pte against torch, with simulated int8 and with float activations, and its kernel
against the simulation bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("executorch")

from export.executorch import adapt_tokenizer, write_pte
from export.executorch_lower import load_toolchain
from export.executorch_parts import GridLinear
from export.executorch_runtime import open_executorch, run_llm_runner
from export.options import ExportOptions
from export.silence import silenced
from nano.corpus import Windows, cut_windows, read_documents
from nano.evaluate import score
from nano.lm import generate
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.activations import Int8TokenLinear, int8_token_codes
from quantize.grid import QuantizedTensor, bf16_exact, round_to_codes
from quantize.lm import jitter_embedding, open_int4_model
from quantize.packed import Int4Checkpoint

TOKENS = 2048
PROMPT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module", params=[False, True], ids=["linears", "everything"])
def int4(request: pytest.FixtureRequest, stories: Path, int4_folder: Callable[..., Path]) -> Path:
    """Without and with the embedding, and the head tied to it, on the grid."""
    return int4_folder(stories, embedding=request.param)


@pytest.fixture(scope="module")
def bundle(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pte")
    with Int4Checkpoint(int4) as checkpoint:
        write_pte(checkpoint, out, ExportOptions(logits="all", chunk=64), load_tokenizer(int4))
    copy_tokenizer(int4, out)
    adapt_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def windows(int4: Path, tinystories: Path) -> Windows:
    return cut_windows(read_documents([tinystories]), load_tokenizer(int4), 256, TOKENS)


def test_the_bundle_agrees_with_the_simulation(int4: Path, bundle: Path, windows: Windows) -> None:
    """The bars, and that what is left is the chaos of rounding borders: the simulation against itself, its embedding
    changed by 1e-7 (in one place, not in every operator), differs by the same order."""
    model = open_executorch(bundle)
    simulation, nudged = open_int4_model(int4, "int8-xnnpack"), open_int4_model(int4, "int8-xnnpack")
    jitter_embedding(nudged, 1e-7)
    found = score(model, windows, simulation).as_dict()
    floor = score(nudged, windows, simulation).as_dict()
    assert found["tokens"] == TOKENS
    assert found["top1"] >= 0.99
    assert found["logit_error"] <= 0.01
    assert found["logit_error"] <= 3 * floor["logit_error"]
    errors = [
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in zip(model.logits(windows.ids), simulation.logits(windows.ids), strict=True)
    ]
    assert min(errors) < 1e-5, "a window without a flipped code is exact to float32"
    against_float = score(model, windows, open_int4_model(int4)).as_dict()
    assert against_float["logit_error"] > 1.3 * found["logit_error"], "the simulation explains the difference"
    assert against_float["logit_error"] < 0.03


def test_stories_come_out_of_both_runtimes(int4: Path, bundle: Path) -> None:
    model = open_executorch(bundle)
    ours = generate(model, PROMPT, 32)
    assert ours == generate(open_int4_model(int4, "int8-xnnpack"), PROMPT, 32)
    text = model.tokenizer.decode(ours)
    assert run_llm_runner(bundle, PROMPT, 32) == text
    assert len(text.split()) > 8


def test_no_code_of_the_kernels_differs_from_the_simulations() -> None:
    """XNNPACK's own quantizer, seen through an identity weight, on inputs placed within 1e-7 of rounding borders."""
    rows, width = 256, 256
    generator = torch.Generator().manual_seed(7)

    def random(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    low, high = -4 * random(rows, 1) * (random(rows, 1) < 0.9), 4 * random(rows, 1) * (random(rows, 1) < 0.9)
    codes, scale = int8_token_codes(low + (high - low) * random(rows, width))
    x = (codes + 0.5) * scale * (1 + 1e-7 * torch.randn(rows, width, generator=generator))
    x = torch.minimum(torch.maximum(x, low), high)
    x[:, :1], x[:, 1:2], x[5] = low, high, 0.0
    identity = QuantizedTensor(torch.eye(width, dtype=torch.int8), torch.ones(width, width // 32), 32)
    codes, scale = int8_token_codes(x)
    assert codes.abs().max() > 100
    found = (run_linear(identity, x) / scale).round()
    assert int((found != codes).sum()) == 0


def test_the_simulated_linear_is_the_kernel_to_float32() -> None:
    generator = torch.Generator().manual_seed(3)
    weight_NK = torch.randn(96, 192, generator=generator)
    scale = bf16_exact(weight_NK.view(96, -1, 32).abs().amax(-1) / 7)
    weight = QuantizedTensor(round_to_codes(weight_NK, scale, 32), scale, 32)
    x = torch.randn(64, 192, generator=generator) + 1
    found, simulated = run_linear(weight, x), Int8TokenLinear(weight.dequantize())(x)
    assert (found - simulated).norm() / found.norm() < 2e-7
    float_error = (found - x @ weight.dequantize().T).norm() / found.norm()
    assert float_error > 1e-3


def run_linear(weight: QuantizedTensor, x: torch.Tensor) -> torch.Tensor:
    """One linear in ExecuTorch's runtime, lowered in the usual way."""
    load_toolchain()
    with silenced(), torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        exported = torch.export.export(GridLinear(weight).eval(), (x,), strict=False)
        program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
        result: torch.Tensor = Runtime.get().load_program(program.buffer).load_method("forward").execute([x])[0]
    return result
