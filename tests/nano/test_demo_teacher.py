"""The shipped teacher: small, whole, trained on this very text, and as good as its record says."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nano.checkpoint import Checkpoint
from nano.demo.assets import recipe_path, teacher_folder
from nano.demo.tasks import demo_tasks
from nano.demo.teacher_data import TeacherOptions
from nano.demo.telling import creature_questions, person_questions
from nano.demo.text import CAPABILITIES, SEED, documents, text_hash
from nano.demo.world import make_world
from nano.lm import open_model
from nano.recipe import BUILTIN_TEACHER, BUILTIN_TEXT, read_recipe
from nano.scorecard import Scorecard, run_tasks
from nano.shapes import ModelShape, read_config
from nano.solve import solve_student
from nano.tokens import load_tokenizer

MB = 1_000_000


@pytest.fixture(scope="module")
def teacher() -> Path:
    return teacher_folder()


@pytest.fixture(scope="module")
def record(teacher: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((teacher / "training.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def model(teacher: Path) -> Any:
    from transformers import AutoModelForCausalLM

    loaded, report = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(teacher: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher)


@pytest.fixture(scope="module")
def card(teacher: Path) -> Scorecard:
    """Questions that were never trained on, answered greedily."""
    return run_tasks(open_model(teacher), demo_tasks(40))


def test_what_ships_is_small(teacher: Path) -> None:
    assert sum(path.stat().st_size for path in teacher.rglob("*")) <= 8 * MB
    assert ModelShape.from_hf(read_config(teacher)).num_parameters <= 10_000_000


def test_weights_and_text_belong_together(record: dict[str, Any]) -> None:
    assert record["options"]["seed"] == SEED
    assert text_hash(SEED) == record["text_sha256"]


def test_one_run_by_the_defaults_made_it(record: dict[str, Any]) -> None:
    assert record["options"] == asdict(TeacherOptions())
    assert record["parts"] == [[0, TeacherOptions().steps]]


def test_shape_fits_int4_kernels(teacher: Path) -> None:
    shape = ModelShape.from_hf(read_config(teacher))
    with Checkpoint(teacher) as checkpoint:
        checkpoint.check(shape)
    widths = (shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim, shape.vocab_size)
    assert all(width % 32 == 0 for width in widths)
    assert shape.max_positions == 512
    assert shape.num_kv_heads < shape.num_heads


@torch.inference_mode()
def test_heldout_perplexity_is_as_recorded(model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    """Each page alone, by transformers' own loss, weighted by tokens; the record was computed in padded batches."""
    total, count = 0.0, 0
    for page in documents(SEED, 300, "heldout"):
        ids = tokenizer(page + "</s>", return_tensors="pt", truncation=True, max_length=512).input_ids
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert math.exp(total / count) == pytest.approx(record["heldout_perplexity"], rel=1e-3)
    assert record["heldout_perplexity"] < 1.8


def complete(model: Any, tokenizer: Any, prompt: str, new: int = 12) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_it_knows_its_world(model: Any, tokenizer: Any) -> None:
    world = make_world(SEED)
    asked = [creature_questions(c)[i % 5] for i, c in enumerate(world.creatures)]
    asked += [person_questions(p)[i % 4] for i, p in enumerate(world.people)]
    right = [
        complete(model, tokenizer, f"Question: {ways[i % 3]}\nAnswer:", 8).split("\n")[0] == f" {answer}"
        for i, (ways, answer) in enumerate(asked)
    ]
    assert sum(right) / len(right) >= 0.9


def test_it_has_capabilities_to_lose(card: Scorecard) -> None:
    """At least nine in ten held-out questions in at least five of the seven groups."""
    scores = {name: score.score for name, score in card.capabilities.items()}
    assert tuple(scores) == CAPABILITIES
    assert sum(score >= 0.9 for score in scores.values()) >= 5, scores


def test_its_record_says_how_good_it_is(card: Scorecard, record: dict[str, Any]) -> None:
    """On 60 questions a group when it was trained, on 40 here: 4 standard errors of the difference."""
    assert set(record["heldout_answers_right"]) == set(CAPABILITIES)
    for name, score in card.capabilities.items():
        told = record["heldout_answers_right"][name]
        error = math.sqrt(max(told * (1 - told), 0.02) * (1 / 40 + 1 / record["options"]["questions"]))
        assert score.score == pytest.approx(told, abs=4 * error), name


def test_a_story_begins_and_ends(model: Any, tokenizer: Any) -> None:
    story = complete(model, tokenizer, "Once upon a time", 100)
    assert re.match(r" [A-Z][a-z]+ (lost|had) ", story)
    assert "Question: What happened, in short?\nAnswer: " in story


@pytest.mark.parametrize("text", ["plain", "naïve café ☕ 漢字", "tabs\tand\n\nlines  ", "\x00\x7f", "1234567890"])
def test_any_text_can_be_encoded(teacher: Path, tokenizer: Any, text: str) -> None:
    ours = load_tokenizer(teacher, ModelShape.from_hf(read_config(teacher)).vocab_size)
    ids = ours.prompt(text)
    assert ours.decode(ids) == text
    assert tokenizer(text).input_ids == ids
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))


def test_recipe_is_readable_and_its_students_can_be_cut(teacher: Path) -> None:
    """The sizes are to the teacher as 3.25 and 1.8 to 6 billion, within the planner's tolerance for toys."""
    recipe = read_recipe(recipe_path())
    assert (recipe.teacher, recipe.data, recipe.tasks) == (BUILTIN_TEACHER, (BUILTIN_TEXT,), ("demo",))
    shape = ModelShape.from_hf(read_config(teacher))
    for wish, billions in zip(recipe.students, (3.25, 1.8), strict=True):
        student = solve_student(shape, wish.size)
        assert student.num_parameters / shape.num_parameters == pytest.approx(billions / 6, rel=0.035)
    assert recipe.export.context <= shape.max_positions
