"""Which layers leave: measured by the damage their absence does, one after another.

A layer's own statistics mislead where layers work together (two that each do little alone may stand in for each
other), so the layer whose skipping moves the model's distributions least is dropped, then the next is looked for
among the rest. On stories260K the two layers that block influence (1 - cosine of a layer's input and output,
arXiv 2403.03853) would drop leave a cross-entropy of 4.35, these two 3.45.

Legend: L layers, N positions, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.data import Batch
from distill.losses import compare
from distill.models import head_weight, hidden_states, skipped
from nano.progress import track
from nano.shapes import ModelShape


def layers_to_drop(
    model: Any, teacher: ModelShape, student: ModelShape, batches: list[Batch]
) -> list[tuple[int, float]]:
    """Greedily, so many of each kind (sliding, full) that the student's count is left.

    Args:
        model: the teacher's.
        teacher, student: shapes; the student has no more layers of a kind than the teacher.
        batches: calibration text.

    Returns:
        (layer, KL per token to the whole teacher once it is gone too), in the order of dropping.
    """
    surplus = {kind: teacher.layer_types.count(kind) - student.layer_types.count(kind) for kind in teacher.layer_types}
    count = sum(surplus.values())
    if not count:
        return []
    with torch.inference_mode():
        whole = [hidden_states(model, teacher, batch) for batch in batches]
    dropped: list[tuple[int, float]] = []
    with track("rank layers", sum(teacher.num_layers - i for i in range(count)), "trials") as progress:
        for _ in range(count):
            gone = [layer for layer, _damage in dropped]
            damage: dict[int, float] = {}
            for layer in range(teacher.num_layers):
                if layer not in gone and surplus[teacher.layer_types[layer]]:
                    damage[layer] = _damage(model, teacher, [*gone, layer], batches, whole)
                if layer not in gone:
                    progress.advance()
            least = min(damage, key=lambda layer: (damage[layer], layer))
            surplus[teacher.layer_types[least]] -= 1
            dropped.append((least, damage[least]))
    return dropped


@torch.inference_mode()
def _damage(model: Any, shape: ModelShape, gone: list[int], batches: list[Batch], whole: list[torch.Tensor]) -> float:
    head, kl, tokens = head_weight(model), 0.0, 0
    with skipped(model, gone):
        for batch, whole_ND in zip(batches, whole, strict=True):
            found = compare(hidden_states(model, shape, batch), head, whole_ND, head, batch.target_N)
            kl, tokens = kl + found.kl, tokens + found.tokens
    return kl / tokens
