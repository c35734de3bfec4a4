"""A rotated student is the same function; its pieces against matrices multiplied out one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import relative
from checks import student_logits as logits
from safetensors.torch import load_file, save_file

from nano.families import weight_shapes
from nano.torch_lm import load_float
from quantize.hadamard import hadamard, random_orthogonal, randomised_hadamard
from quantize.rotate import fold_norms, hadamard_rotation, rotated, say_cost
from quantize.student import Student


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 28, 36, 44, 60, 64, 96, 576, 640, 896, 960, 1152, 1536, 3072])
def test_hadamard_matrices_of_real_widths(order: int) -> None:
    matrix_nn = hadamard(order)
    assert matrix_nn is not None
    assert bool((matrix_nn.abs() == 1).all())
    some = torch.randperm(order)[:64]
    assert torch.equal(matrix_nn[some] @ matrix_nn.T, order * torch.eye(order)[some])


@pytest.mark.parametrize("order", [3, 6, 52, 70])
def test_other_widths_get_a_random_orthogonal_matrix(order: int) -> None:
    assert hadamard(order) is None
    turn_nn = randomised_hadamard(order, torch.Generator().manual_seed(0)).double()
    assert torch.allclose(turn_nn @ turn_nn.T, torch.eye(order, dtype=torch.float64), atol=1e-6)
    assert turn_nn.abs().max() < 0.999
    again_nn = random_orthogonal(order, torch.Generator().manual_seed(0)).double()
    assert torch.equal(turn_nn, again_nn)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("hidden", [64, 96])
def test_the_rotated_model_is_the_same_function(
    family: str, tied: bool, hidden: int, tiny_model: Callable[..., Path]
) -> None:
    folder = tiny_model(family, tie_word_embeddings=tied, hidden_size=hidden, intermediate_size=88)
    ids_BT = torch.randint(3, 300, (2, 40))
    with Student(folder, 32) as student, torch.no_grad():
        view = rotated(student, hadamard_rotation(student, 0))
        assert relative(logits(view, ids_BT), load_float(folder)(ids_BT).logits) < 1e-5
        assert view.shape.tied == (tied and family == "gemma3_text")
        assert view.config["tie_word_embeddings"] == view.shape.tied
        assert view.padding == student.padding
        for name, size in weight_shapes(view.shape).items():
            assert tuple(view.tensor(name).shape) == size
        changed = [n for n in weight_shapes(student.shape) if not torch.equal(view.tensor(n), student.tensor(n))]
        gemma_changes = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "vo"}
        if family == "gemma3_text":
            assert set(changed) == gemma_changes
        else:
            assert gemma_changes < set(changed)
            assert view.tensor("model.norm.weight").eq(1).all()


def test_a_turned_tensor_is_the_product_written_out(tiny_model: Callable[..., Path]) -> None:
    """8 query heads over 2 key/value heads: each query head's columns take its own key/value head's matrix."""
    folder = tiny_model("qwen3", num_attention_heads=8)
    with Student(folder, 32) as student:
        rotation = hadamard_rotation(student, 3)
        assert rotation.residual_DD is not None
        view, r1_DD = rotated(student, rotation), rotation.residual_DD.double()
        prefix = "model.layers.1.self_attn."
        out_DK = student.tensor(prefix + "o_proj.weight").double()
        expected_DK = torch.empty_like(out_DK)
        for head in range(8):
            columns = slice(head * 32, head * 32 + 32)
            expected_DK[:, columns] = r1_DD.T @ out_DK[:, columns] @ rotation.heads_LGAA[1, head // 4].double()
        assert torch.allclose(view.tensor(prefix + "o_proj.weight").double(), expected_DK, atol=1e-6)
        gain_D = student.tensor("model.layers.1.input_layernorm.weight").double()
        value_ND = student.tensor(prefix + "v_proj.weight").double() @ torch.diag(gain_D) @ r1_DD
        for head in range(2):
            rows = slice(head * 32, head * 32 + 32)
            expected = rotation.heads_LGAA[1, head].double().T @ value_ND[rows]
            assert torch.allclose(view.tensor(prefix + "v_proj.weight")[rows].double(), expected, atol=1e-6)


def test_a_constant_final_norm_leaves_the_head_tied(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_model("llama")
    folder = tmp_path / "constant"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], 1.7)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ids_BT = torch.randint(3, 300, (1, 30))
    with Student(folder, 32) as student:
        view = rotated(student, hadamard_rotation(student, 0))
        assert view.shape.tied
        assert relative(logits(view, ids_BT), logits(student, ids_BT)) < 1e-5
        say_cost(student)
        assert capsys.readouterr().err == ""
    with Student(source, 32) as student:
        say_cost(student)
        assert "the model grows by 80.0 KiB" in " ".join(capsys.readouterr().err.split())


def test_what_gemma_cannot_have_is_said(tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with Student(tiny_model("gemma3_text"), 32) as student:
        say_cost(student)
        assert hadamard_rotation(student, 0).residual_DD is None
    assert "only the attention heads" in " ".join(capsys.readouterr().err.split())


def test_half_precision_embeddings_stay_half(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("qwen3")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    state = {name: t.bfloat16() for name, t in load_file(source / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids_BT = torch.randint(3, 300, (1, 30))
    with Student(tmp_path, 32) as student:
        view = rotated(student, hadamard_rotation(student, 0))
        assert view.tensor("lm_head.weight").dtype == view.tensor("model.embed_tokens.weight").dtype == torch.bfloat16
        assert relative(logits(view, ids_BT), logits(student, ids_BT)) < 0.01
        assert relative(logits(fold_norms(student), ids_BT), logits(student, ids_BT)) < 0.004
