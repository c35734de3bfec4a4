"""Which foldings a request asks for, in their order: rotations first, then AWQ's scales, which depend on the basis.

The result is a view of the student, the same function, that every method then quantizes. What was found is kept in
the journal, since learning a rotation of a large model takes long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.options import END_TO_END, QuantizeOptions
from quantize.student import Student

if TYPE_CHECKING:
    import torch

    from quantize.awq import Scales
    from quantize.calibrate import Calibration
    from quantize.journal import Journal
    from quantize.recipe import Grid
    from quantize.rotate import Rotation

STREAM_STAYS = ("none", "heads")
"""Rotations under which the residual stream keeps its basis, and a tied head its embedding."""


def with_rotation(folder: Path, options: QuantizeOptions) -> QuantizeOptions:
    """The options with "auto" decided: the learned rotations that cost no bytes, where measurements say that they pay.

    On stories260K, whose head is tied, KL of recover is 0.0193 without, 0.0175 with those of attention's values, 0.0153
    with that of the residual stream too; but the latter takes a tied head apart from its embedding.

    Args:
        folder: the float model.
        options: with the method that will run.

    Raises:
        BadFileError: the folder is no float model.
    """
    if options.rotation != "auto":
        return options
    if options.method not in END_TO_END:
        return replace(options, rotation="none")
    from quantize.rotate import can_turn_residual

    with Student(folder, 1) as student:
        whole = can_turn_residual(student) and not student.shape.tied
    return replace(options, rotation="learned" if whole else "heads")


def head_stays_tied(folder: Path, options: QuantizeOptions) -> bool:
    """Whether a float model's head is its embedding still once it is folded as the options say.

    Says what a rotation costs, or what it leaves out.

    Raises:
        BadFileError: the folder is no float model.
    """
    with Student(folder, 1) as student:
        if options.rotation in STREAM_STAYS:
            return student.shape.tied
        from quantize.rotate import say_cost, unties_head

        say_cost(student)
        return student.shape.tied and not unties_head(student)


def prepared(student: Student, options: QuantizeOptions) -> tuple[Student, dict[str, Any]]:
    """The student in the shape that `folded` will give it: the head apart from the embedding where it comes to that.

    Where the whole model will be trained, dead neurons are put to use, and channels are sorted that stay channels.

    Returns:
        A view of the student, or itself; and what was done, for the manifest: how many neurons are split, and whether
        channels are in another order than the student's.
    """
    from quantize.rotate import can_turn_residual, fold_norms

    turned = options.rotation not in STREAM_STAYS and can_turn_residual(student)
    done: dict[str, Any] = {}
    if options.method in END_TO_END:
        from quantize.sorting import sorted_channels
        from quantize.split import split_neurons

        student, split = split_neurons(student)
        student = student if turned else sorted_channels(student)
        done = {**({"neurons_split": split} if split else {}), **({} if turned else {"channels_sorted": True})}
    return (fold_norms(student) if turned else student), done


def folded(
    student: Student,
    grids: Mapping[str, Grid],
    options: QuantizeOptions,
    calibration: Calibration | None,
    journal: Journal,
) -> tuple[Student, dict[str, Any]]:
    """The student with everything folded in that the options ask for.

    Args:
        student: the float student, prepared.
        grids: what goes on which grid.
        options: `rotation` and `awq`.
        calibration: windows of token ids; a learned rotation and AWQ need them.
        journal: where what is found is kept, and looked for first.

    Returns:
        A view of the student, or itself; and what was done, for the manifest.
    """
    kept, record = journal.folds() or ({}, {})
    tensors: dict[str, torch.Tensor] = dict(kept)
    if options.rotation != "none":
        from quantize.rotate import Rotation, rotated

        if "rotation.heads" not in tensors:
            rotation = _rotation(student, grids, options, calibration)
            tensors["rotation.heads"] = rotation.heads_LGAA
            if rotation.residual_DD is not None:
                tensors["rotation.residual"] = rotation.residual_DD
            record = {"rotation": {"kind": options.rotation, "residual": rotation.residual_DD is not None}}
            journal.save_folds(tensors, record)
        student = rotated(student, Rotation(tensors.get("rotation.residual"), tensors["rotation.heads"]))
    if options.awq:
        from quantize.awq import awq, scaled

        assert calibration is not None  # options.reads_text
        if "awq" not in record:
            student, layers = awq(student, grids, calibration)
            tensors |= {f"awq.{i}.{fold}": s for i, layer in enumerate(layers) for fold, s in layer.factor_K.items()}
            record = {**record, "awq": [_described(layer) for layer in layers]}
            journal.save_folds(tensors, record)
        else:
            student = scaled(student, _layers(tensors, student.shape.num_layers))
    return student, record


def _rotation(
    student: Student, grids: Mapping[str, Grid], options: QuantizeOptions, calibration: Calibration | None
) -> Rotation:
    from quantize.learn_rotation import learned_rotation
    from quantize.rotate import hadamard_rotation

    if options.rotation == "hadamard":
        return hadamard_rotation(student, options.seed)
    assert calibration is not None  # options.reads_text
    return learned_rotation(student, grids, calibration, options.seed, residual=options.rotation == "learned")


def _described(layer: Scales) -> dict[str, dict[str, float]]:
    """A layer's scales in numbers: exponent, relative error of rounding without them and with them."""
    return {
        fold: {"power": layer.power[fold], "error_before": before, "error_after": after}
        for fold, (before, after) in layer.error.items()
    }


def _layers(tensors: Mapping[str, torch.Tensor], count: int) -> list[Scales]:
    """Scales of every layer as an earlier run kept them."""
    from quantize.awq import Scales

    layers = []
    for i in range(count):
        prefix = f"awq.{i}."
        layers.append(Scales({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}, {}, {}))
    return layers
