"""Commands that work on any stage's output: evaluate, compare, generate, build, demo."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from nano.errors import BadFileError, RequestError
from nano.hub import resolve_model

Negative = Parameter(negative="")


def evaluate(
    model: str,
    /,
    *,
    data: Annotated[list[Path] | None, Negative] = None,
    tasks: Annotated[list[str] | None, Negative] = None,
    task_data: Path | None = None,
    task_limit: int | None = None,
    reference: str | None = None,
    tokens: int = 8192,
    sequence_length: int = 256,
    activations: Literal["float", "int8", "int8-xnnpack", "int8-ort"] = "float",
    save: Path | None = None,
    save_reference: Path | None = None,
    record: Annotated[bool, Negative] = False,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Measure any stage's output: on text (perplexity, divergence from a reference), or on tasks (a scorecard).

    Parameters
    ----------
    model
        An HF folder, an int4 folder, or a bundle (ExecuTorch or ONNX); each is run by its own runtime.
    data
        Text or JSONL file, held out from training; may be repeated.
    tasks
        Tasks instead of text: "demo", packaged ones (arc-easy, piqa, winogrande, nq-open, gsm8k, mgsm, mbpp, qmsum,
        xcopa, bbh; xcopa/de for a part), or TOML files; several with commas. docs/tasks.md tells more.
    task_data
        Folder of the tasks' files; for a TOML file of yours its own folder where not given.
    task_limit
        Questions of each task, at most; drawn by the task's seed.
    reference
        Another model of the same vocabulary, or what --save-reference kept of one; adds the divergence from it: KL and
        its tail, the change of the right token's probability, the same most likely token, and of a model that is run
        the relative logit error. With --tasks the teacher, a model or a saved scorecard: scores are shown as shares of
        its scores too.
    tokens
        How many tokens to predict, at most.
    sequence_length
        Longest window; cut down to the model's context.
    activations
        How an int4 folder's linears see their input in torch: float, or int8 as the phone kernels quantize it
        ("int8" follows the bundle it is compared with).
    save
        Keep the figures of each document or question in this JSON file: the baseline that `nanokit compare` judges
        others by. An older file is replaced.
    save_reference
        Keep what the model says of the text in this file, 124 bytes a token: --reference FILE then stands for the
        model, on the same text. An older file is replaced.
    record
        Put the scorecard into the model's manifest.json, where stores and reports find it.
    json
        Print one JSON object: perplexity, tokens, accuracy, calibration_error, and with a reference kl, top1,
        logit_error and divergence, whose names are llama.cpp's; of tasks capabilities, tasks and answers.
    """
    if tasks:
        if save_reference is not None:
            raise RequestError("--save-reference belongs to text.", found="--tasks", todo="leave one of them out")
        return _evaluate_tasks(
            model, tasks, data, (task_data, task_limit), reference, activations, save, record=record, json=json
        )
    _text_only(data, task_data, task_limit, record=record)
    assert data is not None
    from nano.baseline import write_baseline
    from nano.ci import check_report
    from nano.evaluate import EvaluateOptions, evaluate_by_document, measure_folders
    from nano.progress import emit_json, say, show
    from nano.scores_table import scores_table

    _positive(tokens=tokens, sequence_length=sequence_length)
    for path in (save, save_reference):
        if path is not None:
            check_report(path)
    folder = resolve_model(model)
    against = None if reference is None else _reference(reference)
    options = EvaluateOptions(tokens, sequence_length, activations)
    if save is None:
        scores = measure_folders(folder, data, against, options, save_reference).scores
    else:
        scores, baseline = evaluate_by_document(folder, data, against, options, save_reference)
        write_baseline(save, baseline)
        say(f"saved {save}: {len(baseline.units)} documents or windows")
    if save_reference is not None:
        say(f"saved {save_reference}: {save_reference.stat().st_size / scores.tokens:.1f} bytes a token")
    if json:
        emit_json({"model": model, "reference": reference, "activations": activations, **scores.full_dict()})
    else:
        show(scores_table({"model": model, "reference": reference}, scores))
    return 0


def _reference(name: str) -> Path:
    """A model's folder, or a file that --save-reference wrote."""
    from nano.reference_file import is_stored

    path = Path(name).expanduser()
    if path.is_file() and not is_stored(path):
        raise BadFileError(
            "This is neither a model nor a stored reference.", found=name,
            todo="make one with: nanokit evaluate REFERENCE --data TEXT --save-reference FILE",
        )  # fmt: skip
    return path if path.is_file() else resolve_model(name)


def _text_only(data: list[Path] | None, task_data: Path | None, task_limit: int | None, *, record: bool) -> None:
    """Refuse what belongs to tasks where there are none."""
    if not data:
        raise RequestError("There is nothing to measure on.", expected="--data TEXT, or --tasks NAMES")
    if task_data is not None or task_limit is not None or record:
        raise RequestError("--task-data, --task-limit and --record belong to --tasks.", todo="name the tasks, or leave them out")  # noqa: E501  # fmt: skip


def _evaluate_tasks(
    model: str, names: list[str], data: list[Path] | None, source: tuple[Path | None, int | None],
    reference: str | None, activations: str, save: Path | None, *, record: bool, json: bool,
) -> int:  # fmt: skip
    from nano.scorecard_command import evaluate_tasks, split_names
    from nano.scorecard_file import Asked

    if data:
        raise RequestError("One call measures on text or on tasks.", found="--data and --tasks", todo="call it twice")
    _positive(**({} if source[1] is None else {"task_limit": source[1]}))
    return evaluate_tasks(
        resolve_model(model),
        Asked(split_names(names), *source),
        reference=None if reference is None else _file_or_model(reference),
        activations=activations,
        save=save,
        record=record,
        json=json,
    )


def compare(
    baseline: str,
    candidate: str,
    /,
    *,
    data: Annotated[list[Path] | None, Negative] = None,
    tasks: Annotated[list[str] | None, Negative] = None,
    task_data: Path | None = None,
    task_limit: int | None = None,
    reference: str | None = None,
    gate: Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    junit: Path | None = None,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Judge whether a model lost more accuracy than is allowed against a baseline, and how sure that is.

    The exit status is 0 where it passed, 1 where it lost too much, 2 where the two cannot be compared. In a step of
    GitHub Actions the verdict is added to the step's summary.

    Parameters
    ----------
    baseline
        What is good enough: a file that `nanokit evaluate --save` wrote, or a model.
    candidate
        What is judged: a model (HF folder, int4 folder or bundle), or a saved file.
    data
        Text or JSONL file to measure a model on, the same as the baseline's; may be repeated.
    tasks
        Instead of text, tasks to ask a model, as for `nanokit evaluate`; a saved scorecard's own where not given.
    task_data
        Folder of the tasks' files.
    task_limit
        Questions of each task, at most; as the saved scorecard where not given.
    reference
        Model that KL and agreement are measured from, or what evaluate --save-reference kept of it; the same as the
        baseline's; where both sides are models and
        it is not given, the baseline itself.
    gate
        TOML file of limits; docs/gate.md lists its keys and their defaults.
    tokens
        How many tokens to predict, at most; as the saved side, else 8192.
    sequence_length
        Longest window; as the saved side, else 256.
    junit
        Write the verdicts as JUnit XML, for build servers.
    json
        Print one JSON object.
    """
    from nano.ci import check_report
    from nano.gate.compare import report, require_passed, run_compare, table_of
    from nano.progress import emit_json, show
    from nano.scorecard_command import split_names

    numbers = {"tokens": tokens, "sequence_length": sequence_length, "task_limit": task_limit}
    _positive(**{key: value for key, value in numbers.items() if value is not None})
    if junit is not None:
        check_report(junit)
    compared = run_compare(
        _file_or_model(baseline),
        _file_or_model(candidate),
        data=data or (),
        reference=None if reference is None else _reference(reference),
        gate=gate,
        tokens=tokens,
        sequence_length=sequence_length,
        tasks=split_names(tasks or ()),
        task_data=task_data,
        task_limit=task_limit,
    )
    if json:
        emit_json(compared.as_dict())
    else:
        show(table_of(compared))
    report(compared, junit)
    require_passed(compared)
    return 0


def _file_or_model(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix == ".json" and not path.exists():
        raise BadFileError(
            "There is no such baseline.",
            found=name,
            todo="make it with: nanokit evaluate MODEL --data TEXT --save FILE.json (or --tasks NAMES)",
        )
    return path if path.is_file() else resolve_model(name)


def lm_eval(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run lm-evaluation-harness with nanokit's models in it: any of its tasks, on any stage's model.

    Parameters
    ----------
    arguments
        lm-eval's own command line (`lm-eval run --help` lists them), for instance: run --model nanokit --model_args
        path=FOLDER --tasks arc_easy. FOLDER is an HF folder, an int4 folder or a bundle; model_args may also hold
        activations=int8-xnnpack or int8-ort (int4 folders), max_length=N and add_bos_token=True.
    """
    import os
    import sys

    from nano.errors import require_module

    harness = require_module("lm_eval.__main__", "lm-eval")
    require_module("nano.lm_eval_model", "lm-eval")  # registers the model
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]  # where lm-eval's command line looks
    try:
        harness.cli_evaluate()
    except ValueError as error:  # how lm-eval refuses arguments, task names and settings
        if os.environ.get("NANOKIT_DEBUG"):
            raise
        raise RequestError("lm-evaluation-harness refused.", found=str(error), todo="lm-eval run --help") from None
    finally:
        sys.argv = before
    return 0


def generate(
    model: str,
    /,
    *,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Continue a prompt with any stage's model, run by its own runtime.

    Parameters
    ----------
    model
        An HF folder, an int4 folder, or a bundle.
    prompt
        The text to continue.
    max_new_tokens
        How many tokens to add, at most.
    temperature
        0 is greedy; higher samples more freely.
    seed
        Seed of the sampling.
    json
        Print one JSON object: prompt, text, tokens, tokens_per_second.
    """
    from nano.lm import generate as continue_prompt
    from nano.lm import open_model
    from nano.progress import emit_json, put

    _positive(max_new_tokens=max_new_tokens)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise RequestError("--temperature is out of range.", found=str(temperature), expected="0, or a number above it")
    if seed < 0:
        raise RequestError("--seed cannot be negative.", found=str(seed))
    opened = open_model(resolve_model(model))
    try:
        start = time.perf_counter()
        ids = continue_prompt(opened, prompt, max_new_tokens, temperature, seed)
        seconds = time.perf_counter() - start
        text = opened.tokenizer.continued(prompt, ids)
    finally:
        opened.close()
    if json:
        emit_json({"prompt": prompt, "text": text, "tokens": len(ids), "tokens_per_second": len(ids) / seconds})
    else:
        put(text)
    return 0


def build(
    recipe: Path,
    /,
    *,
    out: Path | None = None,
    rebuild: Annotated[bool, Negative] = False,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Run a recipe end to end: distil, quantize, export, check, evaluate. Skips what has not changed.

    Parameters
    ----------
    recipe
        A TOML file; `nanokit demo --print-recipe` shows a complete one.
    out
        Where the outputs go; default: the recipe's `out`, else a folder named after the recipe.
    rebuild
        Make everything again, also what has not changed.
    json
        Print one JSON object with a row for each artifact.
    """
    from nano.pipeline import run_recipe

    return run_recipe(recipe, out=out, rebuild=rebuild, json_mode=json)


def demo(
    *,
    out: Path = Path("demo-out"),
    rebuild: Annotated[bool, Negative] = False,
    print_recipe: Annotated[bool, Negative] = False,
    json: Annotated[bool, Negative] = False,
) -> int:
    """Run the whole way on the embedded teacher: two students, int4, four bundles, checks, and a ladder by capability.

    Parameters
    ----------
    out
        Where the outputs go.
    rebuild
        Make everything again, also what has not changed.
    print_recipe
        Print the embedded recipe and stop.
    json
        Print one JSON object with a row for each artifact.
    """
    from nano.demo.assets import recipe_path
    from nano.pipeline import run_recipe

    if print_recipe:
        print(recipe_path().read_text(encoding="utf-8"), end="")
        return 0
    return run_recipe(recipe_path(), out=out, rebuild=rebuild, json_mode=json)


def _positive(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1.", found=str(value))
