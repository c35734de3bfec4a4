"""Commands that work on any stage's output: evaluate, generate, build, demo."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from nano.errors import RequestError
from nano.hub import resolve_model

if TYPE_CHECKING:
    from rich.table import Table

    from nano.metrics import Scores

Negative = Parameter(negative="")


def evaluate(
    model: str,
    /,
    *,
    data: list[Path],
    reference: str | None = None,
    tokens: int = 8192,
    sequence_length: int = 256,
    activations: Literal["float", "int8", "int8-xnnpack", "int8-ort"] = "float",
    json: Annotated[bool, Negative] = False,
) -> int:
    """Measure perplexity on text, and the divergence from a reference, of any stage's output.

    Parameters
    ----------
    model
        An HF folder, an int4 folder, or a bundle (ExecuTorch or ONNX); each is run by its own runtime.
    data
        Text or JSONL file, held out from training; may be repeated.
    reference
        Another model of the same vocabulary; adds KL, top-1 agreement and the relative logit error.
    tokens
        How many tokens to predict, at most.
    sequence_length
        Longest window; cut down to the model's context.
    activations
        How an int4 folder's linears see their input in torch: float, or int8 as the phone kernels quantize it
        ("int8" follows the bundle it is compared with).
    json
        Print one JSON object: perplexity, tokens, and with a reference kl, top1, logit_error.
    """
    from nano.evaluate import evaluate_folders
    from nano.progress import emit_json, show

    _positive(tokens=tokens, sequence_length=sequence_length)
    model_folder = resolve_model(model)
    reference_folder = None if reference is None else resolve_model(reference)
    scores = evaluate_folders(
        model_folder,
        data,
        reference_folder=reference_folder,
        tokens=tokens,
        sequence_length=sequence_length,
        activations=activations,
    )
    if json:
        emit_json({"model": model, "reference": reference, "activations": activations, **scores.as_dict()})
    else:
        show(_scores_table({"model": model, "reference": reference}, scores))
    return 0


def _scores_table(models: Mapping[str, str | None], scores: Scores) -> Table:
    """What was measured, a line each; what was not has none."""
    from rich.table import Table

    table = Table(show_header=False)
    rows = {
        **models,
        "perplexity": f"{scores.perplexity:.4f}",
        "tokens": f"{scores.tokens:,}",
        "perplexity of the reference": scores.reference_perplexity and f"{scores.reference_perplexity:.4f}",
        "KL, nats a token": scores.kl is not None and f"{scores.kl:.3g} ± {scores.kl_error:.2g}",
        "same most likely token": scores.top1 is not None and f"{scores.top1:.2%}",
        "relative logit error": scores.logit_error is not None and f"{scores.logit_error:.3%}",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


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
    from nano.progress import emit_json

    _positive(max_new_tokens=max_new_tokens)
    if temperature < 0:
        raise RequestError("--temperature cannot be negative.", found=str(temperature))
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
        print(text)
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
    """Run the whole way on the embedded teacher: two students, int4, four bundles, checks and scores.

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
