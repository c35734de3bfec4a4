"""The quantize stage: a float student in, an int4 folder out, one decoder layer in memory at a time.

Everything that can be checked is checked first. Then each layer is read, its linears are solved in the order in
which data flows (each seeing inputs that the already quantized ones before it produce), packed and written.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.errors import RequestError
from nano.families import layer_prefix, weight_shapes
from nano.folder import check_output, human_bytes, require_space, staged_folder
from nano.manifest import Manifest, input_entry, write_manifest
from nano.progress import say, track, warn
from nano.shapes import ModelShape, read_config
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.calibrate import Calibration, draw_training_windows, draw_windows
from quantize.options import STEPS, QuantizeOptions
from quantize.recipe import (
    Grid,
    QuantRecipe,
    check_grids,
    check_rules,
    default_recipe,
    float_modules,
    padding_multiple,
    targets,
)
from quantize.runtimes import check_runtime
from quantize.student import Student

if TYPE_CHECKING:
    import torch

    from quantize.grid import QuantizedTensor
    from quantize.layers import LayerResult

TRAINING_BYTES = 24
"""A parameter's share of memory in training, float32: float original, forward weight, its gradient and u's, and
Adam's two moments."""

Named = Iterator[tuple[str, "torch.Tensor | QuantizedTensor"]]


@dataclass(frozen=True)
class Job:
    """One run's parts.

    Attributes:
        model: the float student.
        grids: what goes on which grid, by module.
        options: see `QuantizeOptions`.
        calibration: windows for solving, or None for rtn.
        training: windows for training, or None where the method does not train.
    """

    model: Student
    grids: dict[str, Grid]
    options: QuantizeOptions
    calibration: Calibration | None
    training: Calibration | None


def run_quantize(
    student: Path,
    data: Sequence[Path],
    out: Path,
    options: QuantizeOptions,
    force: bool = False,
    recipe: QuantRecipe | None = None,
) -> Manifest:
    """Quantize a float HF folder to an int4 folder with a manifest.

    Args:
        student: a float HF folder.
        data: calibration text; may be empty for methods that read none (rtn).
        out: the folder to make.
        options: see `QuantizeOptions`.
        force: replace `out` where it exists, once the new one is complete.
        recipe: which module gets which grid; by default every decoder linear as the options say.

    Raises:
        RequestError: bad input of any kind; nothing was written.
        WorkError: the calibration text drives the model to numbers that are not finite.
    """
    check_output(out, force=force)
    shape = ModelShape.from_hf(read_config(student))
    own, recipe = (recipe.rules, recipe) if recipe else (options.rules, default_recipe(options, shape.tied))
    with Student(student, padding_multiple(shape, recipe)) as model:
        grids = recipe.grids(model.shape)
        check_grids(model.shape, grids)
        check_runtime(model.shape, {n: (g.bits, g.group_size, g.symmetric) for n, g in grids.items()}, options.runtime)
        for words in check_rules(model.shape, recipe, own):
            warn(words)
        tokenizer = load_tokenizer(student, model.shape.vocab_size)
        calibration = None if options.method == "rtn" else _calibration(data, tokenizer, options, model)
        if options.method in STEPS:
            _check_memory(model)
        training = (
            draw_training_windows(data, tokenizer, options, model.shape.max_positions)
            if options.method in STEPS
            else None
        )
        require_space(out, 2 * model.shape.num_parameters)
        if model.padding:
            say(
                f"the feed-forward width {model.source_shape.intermediate_size} is padded to "
                f"{model.shape.intermediate_size} with zero neurons (exact), so that whole groups fit"
            )
        job = Job(model, grids, options, calibration, training)
        with staged_folder(out, force=force) as folder:
            results = _write(job, folder)
            copy_tokenizer(student, folder)
            record = {**calibration.record} if calibration else {}
            manifest = Manifest(
                kind="int4",
                inputs={"student": input_entry(student)},
                recipe={**asdict(options), "rules": recipe.describe()},
                data={**record, "training": training.record} if training else record,
                results=results,
                shape=asdict(model.shape),
            )
            return write_manifest(folder, manifest)


def _check_memory(model: Student) -> None:
    """Refuse to train what the memory cannot hold: the solving methods need one layer of it, training all.

    Raises:
        RequestError: says how much is needed and what to do.
    """
    import torch

    needed = TRAINING_BYTES * model.shape.num_parameters
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise RequestError(
            "This machine's memory cannot hold the training of a model of this size.",
            found=f"{human_bytes(free)}",
            expected=f"about {human_bytes(needed)} ({TRAINING_BYTES} bytes a parameter)",
            todo="use --method gptq, which holds one layer at a time, or a machine with more memory",
        )


def _calibration(data: Sequence[Path], tokenizer: Any, options: QuantizeOptions, model: Student) -> Calibration:
    if not data:
        raise RequestError(
            f"--method {options.method} needs calibration text.",
            expected="--data FILE, a text or JSONL file like what the model will be used on (may be repeated)",
            todo="give --data, or use --method rtn, which reads none",
        )
    return draw_windows(data, tokenizer, options, model.shape.max_positions)


def _write(job: Job, folder: Path) -> dict[str, Any]:
    """Solve and write all tensors; gives the manifest's results."""
    from quantize.packed import quantization_config, write_int4

    done: list[LayerResult] = []
    start = time.monotonic()
    shape, grids = job.model.shape, job.grids
    config = {**job.model.config, "quantization_config": quantization_config(*targets(shape, grids))}
    results: dict[str, Any] = {}
    write_int4(folder, config, _trained(job, done, results) if job.training else _streamed(job, done))
    errors = {name: value for layer in done for name, value in layer.error.items()}
    before = {name: value for layer in done for name, value in layer.rounding_error.items()}
    return {
        "relative_error": errors,
        "rounding_error": before,
        "mean_relative_error": sum(errors.values()) / max(len(errors), 1),
        **results,
        "padding": job.model.padding,
        "float_modules": float_modules(shape, grids),
        "seconds": round(time.monotonic() - start, 2),
    }


def _outside_layers(job: Job) -> Named:
    """The tensors that belong to no layer."""
    from quantize.rtn import round_to_nearest

    for name in weight_shapes(job.model.shape):
        if not name.startswith("model.layers."):
            tensor, module = job.model.tensor(name), name.removesuffix(".weight")
            yield name, round_to_nearest(tensor, job.grids[module]) if module in job.grids else tensor


def _streamed(job: Job, done: list[LayerResult]) -> Named:
    """Every tensor of the int4 folder, each layer's as soon as it is solved."""
    yield from _outside_layers(job)
    for layer, result in enumerate(_solved_layers(job)):
        prefix = layer_prefix(layer)
        for name in weight_shapes(job.model.shape):
            if name.startswith(prefix):
                module = name.removesuffix(".weight")
                yield name, result.weights[module] if module in result.weights else job.model.tensor(name)
        result.weights.clear()
        done.append(result)


def _trained(job: Job, done: list[LayerResult], results: dict[str, Any]) -> Named:
    """Every tensor of the int4 folder, after all layers were solved and trained together."""
    import torch

    from quantize.recover import recover

    assert job.training is not None
    done.extend(_solved_layers(job))
    start = {name: tensor for layer in done for name, tensor in layer.weights.items()}
    windows = [torch.from_numpy(window) for window in job.training.windows.ids]
    found = recover(job.model, start, windows, job.training.record["steps"], job.options)
    results.update(kl_before_training=found.kl_before, kl_after_training=found.kl_after)
    for name, tensor in _outside_layers(job):
        yield name, found.norms.get(name, tensor)
    for name in weight_shapes(job.model.shape):
        if name.startswith("model.layers."):
            module = name.removesuffix(".weight")
            if module in found.weights:
                yield name, found.weights[module]
            else:
                yield name, found.norms[name] if name in found.norms else job.model.tensor(name)


def _solved_layers(job: Job) -> Iterator[LayerResult]:
    """Layer after layer on the grid, with progress."""
    if job.calibration is None:
        from quantize.rtn import rounded_layers

        layers = rounded_layers(job.model, job.grids)
    else:
        from quantize.sequential import calibrated_layers

        layers = calibrated_layers(job.model, job.grids, job.options, job.calibration, lambda _layer: None)
    with track("quantize", job.model.shape.num_layers, "layers") as bar:
        for result in layers:
            bar.advance(note=f"worst relative error {max(result.error.values(), default=0.0):.2%}")
            yield result
