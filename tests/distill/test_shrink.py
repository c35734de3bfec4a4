"""What is cut: exactly nothing where nothing should be, the right parts where something is, and sensible norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data import Batch, batches, pack
from distill.depth import layers_to_drop
from distill.importance import Importance, measure, norm_names
from distill.models import hidden_states, load_weights, new_model
from distill.refit import RIDGE, Refit, solve
from distill.shrink import Cut, choose, cut_tensors, least_influence, select
from distill.wanted import check_shapes
from nano.checkpoint import Checkpoint
from nano.corpus import cut_windows, read_documents
from nano.errors import RequestError, UnsupportedError
from nano.families import weight_shapes
from nano.shapes import FULL, SLIDING, ModelShape, read_config
from nano.tokens import load_tokenizer
from nano.torch_lm import load_float

FAMILIES = ["llama", "qwen3", "gemma3_text"]


class Teacher:
    """A teacher with some text and its importance, as the stage has them."""

    def __init__(self, folder: Path, texts: list[str], rows: int = 8) -> None:
        self.folder, self.config = folder, read_config(folder)
        self.shape, self.model = ModelShape.from_hf(self.config), load_float(folder)
        tokenizer = load_tokenizer(folder)
        self.batches: list[Batch] = list(batches(pack(cut_windows(texts, tokenizer, 64), 64), rows))[:3]
        self.importance: Importance = measure(self.model, self.shape, self.batches)

    def student(self, shape: ModelShape, dropped: list[int], refit: bool = False) -> tuple[Any, Cut]:
        cut = choose(self.shape, shape, dropped, self.importance)
        narrow = Refit(self.model, self.shape, self.batches, dropped) if refit else select
        model = new_model(cut.shape.to_hf(self.config)).eval()
        with Checkpoint(self.folder) as checkpoint:
            tensors = dict(cut_tensors(self.shape, cut, self.importance, checkpoint.tensor, narrow))
        assert {name: tuple(t.shape) for name, t in tensors.items()} == weight_shapes(cut.shape)
        load_weights(model, tensors)
        return model, cut

    def logits(self, model: Any) -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = model(input_ids=self.batches[0].ids_BT, use_cache=False).logits
        return out


TEXTS = ["The quick brown fox jumps over the lazy dog. " * 9, "Pack my box with five dozen liquor jugs! " * 9]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Teacher:
    return Teacher(tiny_model(request.param), TEXTS)


@pytest.fixture(scope="module")
def real(stories: Path, tinystories: Path) -> Teacher:
    return Teacher(stories, read_documents([tinystories])[:60], rows=32)


@pytest.mark.parametrize("refit", [False, True])
def test_a_cut_that_cuts_nothing_gives_the_teacher_exactly(tiny: Teacher, refit: bool) -> None:
    student, _ = tiny.student(tiny.shape, [], refit)
    assert torch.equal(tiny.logits(student), tiny.logits(tiny.model))


def test_the_real_teacher_survives_an_empty_cut(real: Teacher) -> None:
    student, _ = real.student(real.shape, [])
    assert torch.equal(real.logits(student), real.logits(real.model))


@pytest.mark.parametrize(
    ("dead", "dims"),
    [
        ("neurons", {"intermediate_size": 64}),
        ("group", {"num_heads": 2, "num_kv_heads": 1}),
        ("channels", {"hidden_size": 32}),
    ],
)
def test_cutting_what_does_nothing_changes_nothing(
    dead: str, dims: dict[str, int], family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Parts are silenced in the teacher; the cut must find and remove exactly those, norms and scales included."""
    source = tiny_model(family, rms_norm_eps=1e-12)  # else eps weighs more where fewer channels are
    model = load_float(source)
    silence(model, dead)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    teacher = Teacher(tmp_path, TEXTS)
    student, _ = teacher.student(teacher.shape.resized(**dims), [])
    torch.testing.assert_close(teacher.logits(student), teacher.logits(teacher.model), rtol=1e-3, atol=1e-4)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def silence(model: Any, dead: str) -> None:
    """Every third neuron, the first attention group, or every other hidden channel of all that writes them."""
    with torch.no_grad():
        for layer in model.model.layers:
            if dead == "neurons":
                layer.mlp.down_proj.weight[:, ::3] = 0
            elif dead == "group":
                layer.self_attn.o_proj.weight[:, : layer.self_attn.o_proj.weight.shape[1] // 2] = 0
            else:
                layer.self_attn.o_proj.weight[::2] = 0
                layer.mlp.down_proj.weight[::2] = 0
        if dead == "channels":
            model.model.embed_tokens.weight[:, ::2] = 0


def test_every_family_is_cut_in_all_dimensions_at_once(tiny: Teacher) -> None:
    kept = FULL if tiny.shape.family == "gemma3_text" else tiny.shape.layer_types[0]
    shape = tiny.shape.resized(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1,
                               layer_types=(kept,))  # fmt: skip
    dropped = [layer for layer, _ in layers_to_drop(tiny.model, tiny.shape, shape, tiny.batches)]
    student, cut = tiny.student(shape, dropped, refit=True)
    assert cut.shape.layer_types == (kept,)
    assert len(dropped) == 1
    logits = tiny.logits(student)
    assert torch.isfinite(logits).all()
    scale = logits.std() / tiny.logits(tiny.model).std()
    assert 0.3 < scale < 3  # norms rescaled: no explosion, no collapse


def test_gemma_keeps_the_kinds_of_its_layers(tiny_model: Callable[..., Path]) -> None:
    kinds = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
    teacher = Teacher(tiny_model("gemma3_text", num_hidden_layers=6, layer_types=kinds), TEXTS)
    shape = teacher.shape.resized(num_layers=3, layer_types=(SLIDING, SLIDING, FULL))
    for dropped in (
        [layer for layer, _ in layers_to_drop(teacher.model, teacher.shape, shape, teacher.batches)],
        least_influence(teacher.shape, shape, teacher.importance),
    ):
        student, cut = teacher.student(shape, dropped)
        kept = [layer.source for layer in cut.layers]
        assert list(cut.shape.layer_types) == [kinds[i] for i in kept] == student.config.layer_types
        assert sorted(cut.shape.layer_types) == sorted(shape.layer_types)
        reference = load_float(teacher.folder)  # the same, by taking transformers' own layers out
        reference.model.layers = torch.nn.ModuleList([reference.model.layers[i] for i in kept])
        reference.config.num_hidden_layers, reference.config.layer_types = 3, [kinds[i] for i in kept]
        assert torch.equal(teacher.logits(student), teacher.logits(reference))


def test_layers_leave_in_the_order_of_measured_damage(real: Teacher) -> None:
    """Against removing layers from the model itself, and better than what block influence picks."""
    shape = real.shape.resized(num_layers=3, layer_types=(FULL,) * 3)
    found = layers_to_drop(real.model, real.shape, shape, real.batches)
    target = real.batches
    base = [torch.log_softmax(hidden_states(real.model, real.shape, b).detach() @ real.model.lm_head.weight.T, -1) for b in target]  # noqa: E501  # fmt: skip

    def damage(gone: list[int]) -> float:
        reference = load_float(real.folder)
        reference.model.layers = torch.nn.ModuleList(
            [la for i, la in enumerate(reference.model.layers) if i not in gone]
        )
        reference.config.num_hidden_layers = 5 - len(gone)
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for batch, p in zip(target, base, strict=True):
                q = torch.log_softmax(hidden_states(reference, real.shape, batch) @ reference.lm_head.weight.T, -1)
                keep = batch.target_N >= 0
                total += float((p.exp() * (p - q)).sum(-1)[keep].sum())
                tokens += int(keep.sum())
        return total / tokens

    singles = {i: damage([i]) for i in range(5)}
    first = min(singles, key=lambda i: singles[i])
    assert found[0][0] == first
    assert found[0][1] == pytest.approx(singles[first], rel=1e-3)
    pairs = {i: damage([first, i]) for i in range(5) if i != first}
    assert found[1] == (min(pairs, key=lambda i: pairs[i]), pytest.approx(min(pairs.values()), rel=1e-3))
    assert found[1][1] < damage(least_influence(real.shape, shape, real.importance))


def test_norm_statistics_stay_sensible(real: Teacher) -> None:
    """With half of the channels gone, kept channels come out of each norm at their old size, on average."""
    shape = real.shape.resized(hidden_size=32)
    cut = choose(real.shape, shape, [], real.importance)
    kept = list(cut.hidden)
    with Checkpoint(real.folder) as checkpoint:
        tensors = dict(cut_tensors(real.shape, cut, real.importance, checkpoint.tensor))
    seen: dict[str, torch.Tensor] = {}
    handles = [real.model.get_submodule(n).register_forward_pre_hook(lambda _m, x, n=n: seen.update({n: x[0]})) for n in norm_names(real.shape)]  # noqa: E501  # fmt: skip
    with torch.inference_mode():
        hidden_states(real.model, real.shape, real.batches[0])
    for handle in handles:
        handle.remove()
    for name, x_BTD in seen.items():
        norm = real.model.get_submodule(name)
        before = norm(x_BTD)[..., kept].square().mean().sqrt()
        x = x_BTD[..., kept]
        after = (x / x.square().mean(-1, keepdim=True).sqrt() * tensors[f"{name}.weight"]).square().mean().sqrt()
        assert 0.93 < float((after / before).detach()) < 1.07, name


def test_merged_groups_average_keys_and_values(tiny_model: Callable[..., Path]) -> None:
    teacher = Teacher(tiny_model("llama"), TEXTS)  # 4 query heads, 2 key/value heads
    student, cut = teacher.student(teacher.shape.resized(num_kv_heads=1), [])
    assert cut.layers[0].kv_groups == ((0, 1),)
    assert cut.layers[0].query_heads == (0, 1, 2, 3)
    with Checkpoint(teacher.folder) as checkpoint:
        k = checkpoint.tensor("model.layers.0.self_attn.k_proj.weight").view(2, 16, 64)
    torch.testing.assert_close(student.model.layers[0].self_attn.k_proj.weight, k.mean(0))


def test_refit_is_the_ridge_regression() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=g, dtype=torch.float64) @ torch.randn(12, 12, generator=g, dtype=torch.float64)
    weight, kept = torch.randn(5, 12, generator=g, dtype=torch.float64), torch.tensor([0, 3, 4, 7, 11])
    gram = x.T @ x
    ours = solve(weight, kept, gram)
    ridge = math.sqrt(RIDGE * float(gram.diagonal().mean()))
    stacked = torch.cat([x[:, kept], ridge * torch.eye(5, dtype=torch.float64)])
    wanted = torch.cat([x @ weight.T, torch.zeros(5, 5, dtype=torch.float64)])
    # ridge regression of W x itself pulls towards 0; the same system, solved as one long least-squares problem
    slow = torch.linalg.lstsq(stacked, wanted).solution.T
    torch.testing.assert_close(ours, slow, rtol=1e-8, atol=1e-8)
    plain_error = (x @ weight.T - x[:, kept] @ weight[:, kept].T).norm()
    assert (x @ weight.T - x[:, kept] @ ours.T).norm() < 0.9 * plain_error


def test_second_moments_are_those_of_the_inputs_that_count(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding left out, a layer skipped, one layer at a time: against activations recomputed by hand."""
    teacher = Teacher(tiny_model("llama", tie_word_embeddings=False, num_hidden_layers=3), [*TEXTS, "short one"])
    assert any(not batch.whole for batch in teacher.batches)
    monkeypatch.setattr("distill.refit.GRAM_BYTES", 1)
    refit, seen = Refit(teacher.model, teacher.shape, teacher.batches, [1]), []
    reference = load_float(teacher.folder)
    reference.model.layers = torch.nn.ModuleList([reference.model.layers[0], reference.model.layers[2]])
    reference.config.num_hidden_layers = 2
    last = reference.model.layers[1].mlp.down_proj
    last.register_forward_pre_hook(lambda _m, x: seen.append(x[0].flatten(0, 1)))
    with torch.inference_mode():
        finals = [hidden_states(reference, teacher.shape, batch) for batch in teacher.batches]
    inputs = [x[batch.real_N] for x, batch in zip(seen, teacher.batches, strict=True)]
    for module, expected in (("model.layers.2.mlp.down_proj", inputs), ("lm_head", finals)):
        x = torch.cat(expected)
        weight, kept = torch.randn(7, x.shape[1]), torch.arange(0, x.shape[1], 2)
        torch.testing.assert_close(refit(module, weight, kept), solve(weight, kept, x.T @ x), rtol=1e-3, atol=1e-4)


def test_refit_brings_the_cut_nearer_to_the_teacher(real: Teacher) -> None:
    shape = real.shape.resized(intermediate_size=96, num_heads=4, num_kv_heads=2)
    teacher = torch.log_softmax(real.logits(real.model), -1)
    kl = []
    for refit in (False, True):
        student, _ = real.student(shape, [], refit)
        kl.append(float((teacher.exp() * (teacher - torch.log_softmax(real.logits(student), -1))).sum(-1).mean()))
    assert kl[1] < 0.8 * kl[0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"intermediate_size": 192}, RequestError, "intermediate_size = 192"),
        ({"hidden_size": 96}, RequestError, "at most the teacher's 64"),
        ({"head_dim": 16}, UnsupportedError, "head_dim"),
        ({"tied": False}, UnsupportedError, "tied"),
        ({"layer_types": (SLIDING,) * 5, "sliding_window": 8}, RequestError, "sliding"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    change: dict[str, Any], error: type[Exception], words: str, stories: Path
) -> None:
    shape = ModelShape.from_hf(read_config(stories))
    with pytest.raises(error, match=words):
        check_shapes(shape, shape.resized(**change))
