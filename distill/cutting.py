"""One round's cut, from a teacher or from what the round before it left, and plain data that say what it cut.

Each round is measured anew: which layers can be missed, and how important every part is, in the model that is cut.
What stayed is kept in the teacher's own numbers through all rounds, so that the layers of any round's student can be
matched with the teacher's they came from.

Legend: D hidden width, F feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.data import Batch, Rows, make_batch
from distill.depth import layers_to_drop
from distill.importance import Importance, measure
from distill.models import load_weights, new_model
from distill.options import DistillOptions
from distill.refit import Refit
from distill.shrink import Cut, Narrow, Read, choose, cut_tensors, least_influence, select
from nano.shapes import ModelShape

CALIBRATION_BATCH = 16
RANKING_BATCHES = 2
"""Of CALIBRATION_BATCH sequences: enough to rank layers, which differ by tenths of a nat."""

COUNTED = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size")


@dataclass(frozen=True)
class Source:
    """A model to be cut.

    Attributes:
        model: transformers'.
        shape: its dimensions.
        read: a tensor of it by its full name, in the precision it is stored in.
        kept: what it has kept of the teacher (`lists`); None for the teacher itself.
    """

    model: Any
    shape: ModelShape
    read: Read
    kept: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Parts:
    """What is known of a model's parts before widths are cut.

    Attributes:
        damage: layers that leave, and the KL to the whole model once each is gone (None where that was not measured).
        importance: of the parts of those that stay.
        narrow: what is left of a linear whose inputs are cut.
    """

    damage: list[tuple[int, float | None]]
    importance: Importance
    narrow: Narrow


@dataclass(frozen=True)
class Made:
    """A cut model.

    Attributes:
        model: transformers', float32.
        shape: its dimensions; layer kinds are those of the layers that stayed.
        kept: what stayed of the teacher, see `lists`.
        record: counts before and after, and which of the teacher's layers left at what damage.
    """

    model: Any
    shape: ModelShape
    kept: dict[str, Any]
    record: dict[str, Any]


def cut_model(
    source: Source, target: ModelShape, config: Mapping[str, Any], calibration: list[Batch], options: DistillOptions
) -> Made:
    """Cut a model to a shape: depth first, then widths by what matters among the layers that stay.

    Args:
        source: what to cut.
        target: a shape that no dimension of the source's is smaller than.
        config: the config.json that the student's is made of.
        calibration: text that importance is measured on.
        options: how.
    """
    return cut_widths(source, target, config, rank_parts(source, target, calibration, options))


def rank_parts(
    source: Source,
    target: ModelShape,
    calibration: list[Batch],
    options: DistillOptions,
    damage: list[tuple[int, float | None]] | None = None,
) -> Parts:
    """Which layers leave, and how important every part of those that stay is.

    Args:
        source: what will be cut.
        target: only its layers matter here, so shapes with the same ones can share what is found.
        calibration, options: see `cut_model`.
        damage: layers that leave (as `Parts` has them), where that is known.
    """
    model, shape = source.model, source.shape
    if damage is None and options.layers == "damage":
        damage = [*layers_to_drop(model, shape, target, calibration[:RANKING_BATCHES])]
    elif damage is None:
        ranking = measure(model, shape, calibration[:RANKING_BATCHES])
        damage = [(layer, None) for layer in least_influence(shape, target, ranking)]
    dropped = [layer for layer, _kl in damage]
    importance = measure(model, shape, calibration, dropped)
    return Parts(damage, importance, Refit(model, shape, calibration, dropped) if options.refit else select)


def cut_widths(source: Source, target: ModelShape, config: Mapping[str, Any], parts: Parts) -> Made:
    """Cut a model to a shape by what was found of its parts."""
    shape = source.shape
    cut = choose(shape, target, [layer for layer, _kl in parts.damage], parts.importance)
    student = new_model(cut.shape.to_hf(config))
    load_weights(student, dict(cut_tensors(shape, cut, parts.importance, source.read, parts.narrow)))
    name = source.kept["layers"] if source.kept else range(shape.num_layers)
    record = {
        "parameters": [shape.num_parameters, cut.shape.num_parameters],
        **{key: [getattr(shape, key), getattr(cut.shape, key)] for key in COUNTED},
        "dropped_layers": [{"layer": name[layer], "kl_without": kl} for layer, kl in parts.damage],
    }
    return Made(student, cut.shape, lists(cut, source.kept), record)


def lists(cut: Cut, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What stays, part by part, as plain data in the teacher's numbers; millions of characters for a large model.

    Args:
        cut: of a round.
        earlier: the same of the round before, whose model was cut; None where that was the teacher.

    Returns:
        "layers" and "hidden_channels"; and a row a layer each of "kv_heads" (a list for each of the student's: those
        that were averaged into it), "query_heads" and "ffn_neurons".
    """
    found: dict[str, Any] = {
        "layers": [layer.source for layer in cut.layers],
        "hidden_channels": list(cut.hidden),
        "kv_heads": [[list(group) for group in layer.kv_groups] for layer in cut.layers],
        "query_heads": [list(layer.query_heads) for layer in cut.layers],
        "ffn_neurons": [list(layer.neurons) for layer in cut.layers],
    }
    if earlier is None:
        return found
    rows = found["layers"]
    return {
        "layers": [earlier["layers"][i] for i in rows],
        "hidden_channels": [earlier["hidden_channels"][i] for i in found["hidden_channels"]],
        "kv_heads": [
            [[teachers for g in group for teachers in earlier["kv_heads"][i][g]] for group in groups]
            for i, groups in zip(rows, found["kv_heads"], strict=True)
        ],
        **{
            name: [[earlier[name][i][j] for j in kept] for i, kept in zip(rows, found[name], strict=True)]
            for name in ("query_heads", "ffn_neurons")
        },
    }


def calibration_text(rows: Rows, options: DistillOptions, device: str) -> list[Batch]:
    """The first rows that training would see."""
    count = min(len(rows), max(1, math.ceil(options.calibration_tokens / options.length)))
    order = np.sort(rows.order(count, 0, options.seed))
    starts = range(0, count, CALIBRATION_BATCH)
    return [make_batch(rows, order[at : at + CALIBRATION_BATCH], device) for at in starts]
