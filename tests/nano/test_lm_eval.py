"""nanokit's models in lm-evaluation-harness, beside its own backend for transformers: the same numbers."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nano.errors import BadFileError, RequestError

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "until": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 24, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path, stories: Path, count: int = 6) -> Path:
    """Three tasks over one local file: which sentence goes on, how likely is the whole, and how does it go on."""
    folder.mkdir(exist_ok=True)
    with stories.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in itertools.islice(lines, 4 * count)]
    rows = []
    for number, text in enumerate(texts[:count]):
        cut = text.index(" ", 150 + 40 * number)  # the last ones do not fit a context of 256 bytes
        wrong = [other[60 + 10 * number : 90 + 10 * number].strip() for other in texts[count + 3 * number :][:3]]
        choices = [*wrong[: number % 4], text[cut + 1 : cut + 31], *wrong[number % 4 :]]
        rows.append({"question": text[:cut], "choices": choices, "gold": number % 4, "text": text[: 200 + 60 * number]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = COMMON.format(data=folder / "rows.jsonl", cache=folder / "cache")
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: nk_{name}{common}{body}")
    return folder


def evaluate(model: str, arguments: dict[str, Any], folder: Path, names: tuple[str, ...] = tuple(TASKS)) -> Any:
    """lm-eval's own results, with every answer."""
    from lm_eval.tasks import TaskManager

    if model == "nanokit":
        import nano.lm_eval_model  # noqa: F401  # registers it

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[f"nk_{name}" for name in names], task_manager=manager, device="cpu",
        bootstrap_iters=0,
    )  # fmt: skip


def answers(results: Any, task: str) -> list[Any]:
    """What the model said to each question; of likelihoods the numbers."""
    found = []
    for sample in sorted(results["samples"][f"nk_{task}"], key=lambda sample: sample["doc_id"]):
        said = [answer[0] for answer in sample["resps"]]
        found.append([one[0] if isinstance(one, (tuple, list)) else one for one in said])
    return found


@pytest.fixture(scope="module")
def tasks(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("lm_eval"), tinystories)


@pytest.mark.parametrize("family", ["stories", "gemma3_text", "qwen3"])
def test_a_float_folder_gives_the_numbers_of_lm_evals_own_backend(
    family: str, stories: Path, tiny_model: Callable[..., Path], tasks: Path
) -> None:
    folder = stories if family == "stories" else tiny_model(family)
    theirs = evaluate("hf", {"pretrained": str(folder), "dtype": "float32"}, tasks)
    ours = evaluate("nanokit", {"path": str(folder)}, tasks)
    for task in ("choice", "rolling"):
        for one, other in zip(answers(ours, task), answers(theirs, task), strict=True):
            np.testing.assert_allclose(np.array(one, float), np.array(other, float), rtol=1e-5, atol=1e-4)
    assert answers(ours, "until") == answers(theirs, "until")
    for task, figures in theirs["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
    if family == "stories":
        assert 0.3 < ours["results"]["nk_choice"]["acc,none"] <= 1, "a model that knows English"


def test_sampling_is_refused_and_lengths_are_understood() -> None:
    from nano.lm_eval_model import MAX_GEN_TOKS, _greedy_settings

    assert _greedy_settings({"until": "\n"}) == (MAX_GEN_TOKS, ("\n",))
    assert _greedy_settings({"until": ["a", ""], "max_tokens": 7, "do_sample": False, "temperature": 0.7}) == (
        7,
        ("a",),
    )
    for asked in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(RequestError, match="greedily"):
            _greedy_settings(asked)


@pytest.mark.slow  # lm-eval's command line reads all its task files first
def test_the_command_runs_lm_evals_command_line(nanokit: Callable[..., Any], stories: Path, tasks: Path) -> None:
    ran = nanokit(
        "lm-eval", "run", "--model", "nanokit", "--model_args", f"path={stories}", "--tasks", "nk_until",
        "--include_path", tasks, "--limit", 2,
    )  # fmt: skip
    assert ran.status == 0, ran.stderr
    assert "nk_until" in ran.stdout


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    from nano.lm_eval_model import NanokitLM

    with pytest.raises(BadFileError, match="no such model folder"):
        NanokitLM(path=str(tmp_path / "nowhere"))


def test_lm_evals_own_models_stay_known() -> None:
    """In a fresh process, where nothing has filled lm-eval's list before."""
    code = (
        "import nano.lm_eval_model; from lm_eval.api.registry import get_model; "
        "print(get_model('dummy').__name__, get_model('nanokit').__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["DummyLM", "NanokitLM"]
