"""Distillation through the grid: its gradients, its grid, and that it brings the model nearer to the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import load_by_transformers, some_sentences

from nano.families import EMBEDDING, HEAD, linear_names
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float
from quantize.journal import Journal
from quantize.lm import load_dequantised
from quantize.options import QuantizeOptions
from quantize.packed import Int4Checkpoint
from quantize.recipe import Grid
from quantize.recover import _decay, loss_sums, recover
from quantize.rtn import round_to_nearest
from quantize.run import run_quantize
from quantize.sorting import sorted_channels
from quantize.student import Student
from quantize.trainable import TrainableLinear


def test_forward_is_the_dequantised_weight_and_gradients_are_straight_through() -> None:
    weight_NK = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    start = round_to_nearest(weight_NK, Grid(4, 32))
    linear = TrainableLinear(start, weight_NK)
    x_MK = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(linear(x_MK), x_MK @ start.dequantize().T)
    assert torch.equal(linear.solved().codes_NK, start.codes_NK)
    assert torch.equal(linear.solved().scale_NG, start.scale_NG)
    linear.u_NGg.data[0, 0, 0] = 9.0  # beyond the grid: its gradient is cut
    grad_MN = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    linear(x_MK).backward(grad_MN)
    grad_NGg = (grad_MN.T @ x_MK).view(3, 2, 32)  # of the dequantised weight
    expected_NGg = grad_NGg * start.scale_NG[..., None]
    expected_NGg[0, 0, 0] = 0
    assert torch.allclose(linear.u_NGg.grad, expected_NGg, atol=1e-5)
    codes_NGg = linear.u_NGg.detach().round().clamp(-8, 7)
    expected_NG = (grad_NGg * codes_NGg).sum(-1) * start.scale_NG
    assert torch.allclose(linear.log_scale_NG.grad, expected_NG, atol=1e-4)


def test_losses_are_counted_over_real_positions_only(tiny_model: Callable[..., Path]) -> None:
    one, other = (
        load_float(tiny_model("llama", initializer_range=0.1)),
        load_float(tiny_model("llama", rms_norm_eps=0.5, initializer_range=0.1)),
    )
    windows = [torch.arange(5, 25), torch.arange(40, 49)]
    slow, text = 0.0, list[float]()
    for window in windows:
        with torch.no_grad():
            p, q = (model(window[None]).logits.double().softmax(-1)[0] for model in (one, other))
        slow += float((p * (p / q).log()).sum())
        text.append(float(-q[:-1].gather(1, window[1:, None]).log().sum()))
    with torch.no_grad():
        kl, first = map(float, loss_sums(one, other, windows, 1))
        both = float(loss_sums(one, other, windows, 2)[1])
    assert kl == pytest.approx(slow, rel=1e-3)
    assert slow > 0.01
    assert (first, both) == (pytest.approx(text[0], rel=1e-4), pytest.approx(sum(text), rel=1e-4))


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_training_lowers_the_divergence_and_stays_on_the_grid(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(family, intermediate_size=88, initializer_range=0.2)
    random = torch.Generator().manual_seed(3)
    # Random weights have nothing to generalise: what is held back is text that was trained on.
    windows = [torch.randint(3, 300, (32,), generator=random) for _ in range(4)] * 10
    with Student(folder, 32) as student:
        names = [f"model.layers.{i}.mlp.{leaf}_proj" for i in range(2) for leaf in ("gate", "up", "down")]
        start = {name: round_to_nearest(student.tensor(name + ".weight"), Grid(4, 32)) for name in names}
        options = QuantizeOptions(batch=8, learning_rate=0.05, noise=0, cross_entropy=0)
        found = recover(student, start, windows, 40, options, Journal(tmp_path / "a", {}))
        again = recover(student, start, windows, 40, options, Journal(tmp_path / "b", {}))
    assert found.kl_before > 0.001
    assert found.kl_after < 0.8 * found.kl_before
    for name, tensor in found.weights.items():
        assert int(tensor.codes_NK.min()) >= -8
        assert int(tensor.codes_NK.max()) <= 7
        assert torch.equal(tensor.scale_NG.bfloat16().float(), tensor.scale_NG)
        assert torch.equal(tensor.codes_NK, again.weights[name].codes_NK)
    down = found.weights["model.layers.0.mlp.down_proj"]
    assert not down.codes_NK[:, 88:].any()  # the padding stays zero


def test_part_of_the_loss_of_rounding_is_recovered_on_held_out_stories(
    stories: Path, tinystories: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(stories)
    lines = tinystories.read_text(encoding="utf-8").splitlines()
    windows = [torch.tensor(tokenizer.prompt(json.loads(line)["text"])[:96]) for line in lines[:340]]
    with Student(stories, 32) as student:
        start = {
            name: round_to_nearest(student.tensor(name + ".weight").float(), Grid(4, 32))
            for name in linear_names(student.shape)
        }
        found = recover(
            student, start, windows, 40, QuantizeOptions(batch=8, learning_rate=0.05), Journal(tmp_path / "a", {})
        )
    assert 0.08 < found.kl_before < 0.14
    assert found.kl_after < 0.8 * found.kl_before


def test_a_result_that_is_no_better_is_not_kept(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = [torch.arange(3, 40) for _ in range(4)]
    with Student(tiny_model("llama"), 32) as student:
        name = "model.layers.0.mlp.down_proj"
        start = {name: round_to_nearest(student.tensor(name + ".weight"), Grid(4, 32))}
        found = recover(
            student, start, windows, 3, QuantizeOptions(batch=2, learning_rate=50.0), Journal(tmp_path / "a", {})
        )
    assert "not bring the model nearer" in capsys.readouterr().err
    assert torch.equal(found.weights[name].codes_NK, start[name].codes_NK)


def test_what_training_found_is_what_transformers_loads(stories: Path, tinystories: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(tinystories.read_text(encoding="utf-8").splitlines()[:150]))
    options = QuantizeOptions("best", samples=32, length=128, steps=12, batch=8, window=64)
    manifest = run_quantize(stories, [text], tmp_path / "best", options)
    assert manifest.results["kl_after_training"] < manifest.results["kl_before_training"] < 0.07
    assert manifest.data["training"]["steps"] == 12
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 500, (1, 60))
    with Int4Checkpoint(tmp_path / "best") as checkpoint, torch.no_grad():
        assert len(checkpoint.modules) == 35
        norm, before = checkpoint.dense("model.norm.weight"), load_float(stories).model.norm.weight
        # the stream's dimensions are sorted
        assert 0 < float((norm.sort().values - before.sort().values).abs().max()) < 0.1
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "best")(ids).logits
        assert torch.equal(load_dequantised(checkpoint)(ids).logits, theirs)


def test_float_tables_train_in_their_stored_type_and_stay_tied(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    text = some_sentences(tmp_path)
    folder = tiny_model("llama", tie_word_embeddings=True, initializer_range=0.2)
    with Student(folder, 32) as student:
        weight_VD = sorted_channels(student).tensor(EMBEDDING + ".weight")
    options = QuantizeOptions(
        "recover", steps=30, batch=4, window=32, samples=4, length=32, learning_rate=0.02, noise=0, cross_entropy=0
    )
    run_quantize(folder, [text], tmp_path / "float", options)
    run_quantize(folder, [text], tmp_path / "int4", replace(options, embedding="int4"))
    with Int4Checkpoint(tmp_path / "float") as kept, Int4Checkpoint(tmp_path / "int4") as gridded:
        trained_VD = kept.store.tensor(EMBEDDING + ".weight")
        assert HEAD + ".weight" not in kept.store.names()
        assert gridded.quantized(EMBEDDING).bits == 4
    assert trained_VD.dtype == weight_VD.dtype
    moved = float((trained_VD.float() - weight_VD.float()).std() / weight_VD.float().std())
    assert 0.01 < moved < 30 * 0.4 * 0.02  # at most so many steps of TABLE_RATE x learning rate
    loaded = load_by_transformers(tmp_path / "float")
    assert torch.equal(loaded.get_output_embeddings().weight, trained_VD.float())


def test_the_weights_rates_end_before_the_others() -> None:
    assert [round(_decay(x, codes=True), 3) for x in (0, 0.425, 0.85, 1)] == [1, 0.5, 0, 0]
    assert [round(_decay(x, codes=False), 3) for x in (0, 0.85, 0.925, 1)] == [1, 1, 0.5, 0]
