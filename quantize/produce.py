"""The tensors of an int4 folder, made layer by layer and written as they come.

Legend: N output channels, K input channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nano.families import EMBEDDING, HEAD, layer_prefix, weight_shapes
from nano.progress import track
from quantize.calibrate import Calibration
from quantize.options import QuantizeOptions
from quantize.recipe import Grid, float_modules, targets
from quantize.student import Student

if TYPE_CHECKING:
    import torch

    from quantize.grid import QuantizedTensor
    from quantize.journal import Journal
    from quantize.layers import LayerResult

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
        journal: what an interrupted run finished, and where this one keeps what it finishes.
    """

    model: Student
    grids: dict[str, Grid]
    options: QuantizeOptions
    calibration: Calibration | None
    training: Calibration | None
    journal: Journal


def write_tensors(job: Job, folder: Path) -> dict[str, Any]:
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
        "layer_error": {layer: errors.layer_error for layer, errors in enumerate(done) if errors.layer_error},
        **results,
        "padding": job.model.padding,
        "float_modules": float_modules(shape, grids),
        "seconds": round(time.monotonic() - start, 2),
    }


def _outside_layers(job: Job) -> Named:
    """The tensors that belong to no layer."""
    from quantize.rtn import round_table, round_to_nearest

    for name in weight_shapes(job.model.shape):
        if not name.startswith("model.layers."):
            tensor, module = job.model.tensor(name), name.removesuffix(".weight")
            solve = round_table if module == EMBEDDING else round_to_nearest
            yield name, solve(tensor, job.grids[module]) if module in job.grids else tensor


def _streamed(job: Job, done: list[LayerResult]) -> Named:
    """Every tensor of the int4 folder, each layer's as soon as it is solved."""
    yield from _outside_layers(job)
    for layer, result in enumerate(_solved_layers(job)):
        prefix = layer_prefix(layer)
        for name in weight_shapes(job.model.shape):
            if name.startswith(prefix):
                module = name.removesuffix(".weight")
                if module in result.weights:
                    yield name, result.weights[module]
                else:
                    yield name, result.floats[name] if name in result.floats else job.model.tensor(name)
        result.weights.clear()
        done.append(result)


def _trained(job: Job, done: list[LayerResult], results: dict[str, Any]) -> Named:
    """Every tensor of the int4 folder, after all layers were solved and trained together."""
    import torch

    from quantize.recover import recover
    from quantize.rtn import rounded_ends

    assert job.training is not None
    done.extend(_solved_layers(job))
    start = {name: tensor for layer in done for name, tensor in layer.weights.items()}
    windows = [torch.from_numpy(window) for window in job.training.windows.ids]
    ends = rounded_ends(job.model, job.grids)
    tables = [f"{end}.weight" for end in (EMBEDDING, HEAD) if end in float_modules(job.model.shape, job.grids)]
    steps, ids_U = job.training.record["steps"], torch.tensor(job.training.text_ids)
    found = recover(job.model, start, windows, steps, job.options, job.journal, ends, tables, ids_U)
    results.update(kl_before_training=found.kl_before, kl_after_training=found.kl_after)
    for name, tensor in _outside_layers(job):
        yield name, found.floats.get(name, tensor)
    for name in weight_shapes(job.model.shape):
        if name.startswith("model.layers."):
            module = name.removesuffix(".weight")
            if module in found.weights:
                yield name, found.weights[module]
            else:
                yield name, found.floats[name] if name in found.floats else job.model.tensor(name)


def _solved_layers(job: Job) -> Iterator[LayerResult]:
    """Layer after layer on the grid, with progress; each is kept in the journal."""
    if job.calibration is None:
        from quantize.rtn import rounded_layers

        layers = rounded_layers(job.model, job.grids, job.journal.layer)
    else:
        from quantize.sequential import calibrated_layers

        layers = calibrated_layers(job.model, job.grids, job.options, job.calibration, job.journal.layer)
    with track("quantize", job.model.shape.num_layers, "layers") as bar:
        for layer, result in enumerate(layers):
            if not job.journal.has_layer(layer):
                job.journal.save_layer(layer, result)
            bar.advance(note=f"worst relative error {max(result.error.values(), default=0.0):.2%}")
            yield result
