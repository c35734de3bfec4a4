"""stories260K on real text: the ONNX bundle against torch, with float and with int8 activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from export.onnx import write_onnx  # noqa: E402
from export.onnx_runtime import genai_continuation, open_onnx, run_genai  # noqa: E402
from export.options import ExportOptions  # noqa: E402
from nano.corpus import Windows, cut_windows, read_documents  # noqa: E402
from nano.evaluate import score  # noqa: E402
from nano.lm import generate  # noqa: E402
from nano.tokens import copy_tokenizer, load_tokenizer  # noqa: E402
from quantize.activations import int8_per_block  # noqa: E402
from quantize.grid import QuantizedTensor  # noqa: E402
from quantize.lm import open_int4_model  # noqa: E402
from quantize.packed import Int4Checkpoint, pack_codes  # noqa: E402

TOKENS = 2048
PROMPT = "Once upon a time, there was a little girl named Lily."


@pytest.fixture(scope="module", params=[False, True], ids=["linears", "everything"])
def embedding(request: pytest.FixtureRequest) -> bool:
    """Whether the embedding, and the head tied to it, are on the grid too."""
    return bool(request.param)


@pytest.fixture(scope="module")
def int4(stories: Path, int4_folder: Callable[..., Path], embedding: bool) -> Path:
    return int4_folder(stories, embedding=embedding)


@pytest.fixture(scope="module")
def bundle(int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = str(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("onnx")
            with Int4Checkpoint(int4) as checkpoint:
                write_onnx(checkpoint, made[key], ExportOptions(**options), load_tokenizer(int4))
            copy_tokenizer(int4, made[key])
        return made[key]

    return make


@pytest.fixture(scope="module")
def windows(int4: Path, tinystories: Path) -> Windows:
    return cut_windows(read_documents([tinystories]), load_tokenizer(int4), 256, TOKENS)


def test_float_activations_are_torchs(int4: Path, bundle: Callable[..., Path], windows: Windows) -> None:
    found = score(open_onnx(bundle(logits="all", activations="float")), windows, open_int4_model(int4)).as_dict()
    assert found["tokens"] == TOKENS
    assert found["top1"] == 1.0
    assert found["logit_error"] < 1e-5


def test_int8_activations_are_the_simulated_ones(
    int4: Path, embedding: bool, bundle: Callable[..., Path], windows: Windows
) -> None:
    """Rounding to int8 is chaotic, so the floor is measured too: the simulation against itself, the embedding
    changed by 1e-7 of itself, the precision of float32."""
    model = open_onnx(bundle(logits="all"))
    assert model.activations == "int8-ort"
    simulation, nudged = open_int4_model(int4, "int8-ort"), open_int4_model(int4, "int8-ort")
    weight_VD = nudged.model.model.embed_tokens.weight
    noise_VD = torch.randn(weight_VD.shape, generator=torch.Generator().manual_seed(0))
    nudged.model.model.embed_tokens.weight = torch.nn.Parameter(weight_VD * (1 + 1e-7 * noise_VD), requires_grad=False)
    found, floor = (score(m, windows, simulation).as_dict() for m in (model, nudged))
    against_float = score(model, windows, open_int4_model(int4)).as_dict()
    assert found["logit_error"] <= 0.01
    assert found["logit_error"] < 1.3 * floor["logit_error"] < against_float["logit_error"]
    assert found["kl"] < 1e-3
    assert found["top1"] >= floor["top1"] - 0.01
    assert found["top1"] >= 0.99 or embedding  # with the head's input rounded too, the floor itself lies below


def test_genai_and_the_plain_session_tell_the_same_story(int4: Path, bundle: Callable[..., Path]) -> None:
    model = open_onnx(bundle(chunk=4))
    ours = generate(model, PROMPT, 32)
    assert len(ours) == 32
    assert genai_continuation(bundle(chunk=4), PROMPT, 32)[1] == ours
    assert run_genai(bundle(chunk=4), PROMPT, 32).strip() == model.tokenizer.decode(ours).strip()
    assert generate(open_int4_model(int4, "int8-ort"), PROMPT, 32)[:16] == ours[:16]


@pytest.mark.parametrize("group", [16, 32, 128])
def test_one_linear_with_int8_activations_is_exact(group: int) -> None:
    """`int8_per_block` against the operator itself, its input a row of many magnitudes, one block all zero."""
    generator = torch.Generator().manual_seed(group)
    n, k = 48, 256
    codes_NK = torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8)
    scale_NG = torch.rand(n, k // group, generator=generator) * 0.01 + 0.01
    x_TK = torch.randn(64, k, generator=generator) * 10 ** torch.randn(64, 1, generator=generator)
    x_TK[:, :group] = 0
    weight = QuantizedTensor(codes_NK, scale_NG, group)
    found = _matmul_nbits(weight, x_TK, accuracy_level=4)
    expected_TN = int8_per_block(x_TK.double(), group) @ weight.dequantize().double().T
    assert _error(found, expected_TN) < 1e-6
    assert _error(found, x_TK.double() @ weight.dequantize().double().T) > 1e-3


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The worst row's relative error."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _matmul_nbits(weight: QuantizedTensor, x_TK: torch.Tensor, accuracy_level: int) -> torch.Tensor:
    n, k = weight.codes_NK.shape
    packed = pack_codes(weight.codes_NK, 4).view(torch.uint8).view(n, k // weight.group_size, -1).numpy()
    constants = [ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
                 for name, array in (("codes", packed), ("scales", weight.scale_NG.numpy()))]  # fmt: skip
    x = ir.Value(name="x", shape=ir.Shape(["T", k]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("MatMulNBits", [x, *constants], {"K": k, "N": n, "bits": 4, "block_size": weight.group_size,
                   "accuracy_level": accuracy_level}, domain="com.microsoft")  # fmt: skip
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["T", n])
    graph = ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports={"": 21, "com.microsoft": 1})
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x_TK.numpy()})[0])
