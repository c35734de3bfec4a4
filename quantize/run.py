"""The quantize stage: a float student in, an int4 folder out, one decoder layer in memory at a time.

Everything that can be checked is checked first. Then each layer is read, its linears are solved in the order in
which data flows (each seeing inputs that the already quantized ones before it produce), packed and written.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.errors import RequestError
from nano.families import layer_prefix, weight_shapes
from nano.folder import check_output, require_space, staged_folder
from nano.manifest import Manifest, input_entry, write_manifest
from nano.progress import Track, say, track
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.calibrate import Calibration, draw_windows
from quantize.options import QuantizeOptions
from quantize.recipe import Grid, QuantRecipe, check_grids, default_recipe, float_modules, targets
from quantize.student import Student

if TYPE_CHECKING:
    import torch

    from quantize.grid import QuantizedTensor

Named = Iterator[tuple[str, "torch.Tensor | QuantizedTensor"]]


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
    recipe = recipe or default_recipe(options)
    with Student(student, options.group_size) as model:
        grids = recipe.grids(model.shape)
        check_grids(model.shape, grids)
        tokenizer = load_tokenizer(student, model.shape.vocab_size)
        calibration = None if options.method == "rtn" else _calibration(data, tokenizer, options, model)
        require_space(out, 2 * model.shape.num_parameters)
        if model.padding:
            say(
                f"the feed-forward width {model.source_shape.intermediate_size} is padded to "
                f"{model.shape.intermediate_size} with zero neurons (exact), so that groups of "
                f"{options.group_size} fit"
            )
        with staged_folder(out, force=force) as folder:
            results = _write(model, folder, grids, options, calibration)
            copy_tokenizer(student, folder)
            manifest = Manifest(
                kind="int4",
                inputs={"student": input_entry(student)},
                recipe={**asdict(options), "rules": recipe.describe()},
                data=calibration.record if calibration else {},
                results=results,
                shape=asdict(model.shape),
            )
            return write_manifest(folder, manifest)


def _calibration(data: Sequence[Path], tokenizer: Any, options: QuantizeOptions, model: Student) -> Calibration:
    if not data:
        raise RequestError(
            f"--method {options.method} needs calibration text.",
            expected="--data FILE, a text or JSONL file like what the model will be used on (may be repeated)",
            todo="give --data, or use --method rtn, which reads none",
        )
    return draw_windows(data, tokenizer, options, model.shape.max_positions)


def _write(
    model: Student, folder: Path, grids: dict[str, Grid], options: QuantizeOptions, calibration: Calibration | None
) -> dict[str, Any]:
    """Solve and write all tensors; gives the manifest's results."""
    from quantize.packed import quantization_config, write_int4

    errors: dict[str, float] = {}
    start = time.monotonic()
    config = {**model.config, "quantization_config": quantization_config(*targets(model.shape, grids))}
    with track("quantize", model.shape.num_layers, "layers") as bar:
        write_int4(folder, config, _tensors(model, grids, options, calibration, errors, bar))
    return {
        "relative_error": errors,
        "mean_relative_error": sum(errors.values()) / max(len(errors), 1),
        "padding": model.padding,
        "float_modules": float_modules(model.shape, grids),
        "seconds": round(time.monotonic() - start, 2),
    }


def _tensors(
    model: Student,
    grids: dict[str, Grid],
    options: QuantizeOptions,
    calibration: Calibration | None,
    errors: dict[str, float],
    bar: Track,
) -> Named:
    """Every tensor of the int4 folder: what lies outside the layers, then layer by layer."""
    from quantize.rtn import round_to_nearest

    for name in weight_shapes(model.shape):
        if name.startswith("model.layers."):
            continue
        tensor, module = model.tensor(name), name.removesuffix(".weight")
        yield name, round_to_nearest(tensor, grids[module]) if module in grids else tensor
    solved = _solved_layers(model, grids, options, calibration)
    for layer, (weights, layer_errors) in enumerate(solved):
        prefix = layer_prefix(layer)
        for name in weight_shapes(model.shape):
            if name.startswith(prefix):
                module = name.removesuffix(".weight")
                yield name, weights[module] if module in weights else model.tensor(name)
        errors.update(layer_errors)
        worst = max(layer_errors.values(), default=0.0)
        bar.advance(note=f"worst relative error {worst:.2%}")


def _solved_layers(
    model: Student, grids: dict[str, Grid], options: QuantizeOptions, calibration: Calibration | None
) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, float]]]:
    """Per layer, its modules on the grid and the relative error of each."""
    if calibration is None:
        yield from _rounded_layers(model, grids)
        return
    from quantize.sequential import calibrated_layers

    yield from calibrated_layers(model, grids, options, calibration)


def _rounded_layers(
    model: Student, grids: dict[str, Grid]
) -> Iterator[tuple[dict[str, QuantizedTensor], dict[str, float]]]:
    from quantize.rtn import round_to_nearest

    for layer in range(model.shape.num_layers):
        weights, errors = {}, {}
        for module, grid in grids.items():
            if module.startswith(layer_prefix(layer)):
                weight_NK = model.tensor(module + ".weight").float()
                weights[module] = round_to_nearest(weight_NK, grid)
                lost = (weights[module].dequantize() - weight_NK).square().sum()
                errors[module] = float(lost / weight_NK.square().sum().clamp_min(1e-30))
        yield weights, errors
