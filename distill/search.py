"""Which of several shapes of one size a teacher bears best: each is cut, and measured before any training.

A formula over dimensions (`nano.solve`) cannot know what a teacher's heads or layers do. The damage right after the
cut can, and foretells what training leaves of it (as Minitron's search, arXiv 2407.14679, section 4.4, which trains its
candidates briefly). The demo's teacher (1.9 M parameters, 6 heads) cut to 1.03 M in six ways, 100 steps each:

    width, feed-forward, layers, query heads    KL after the cut    after training    answers right
    192, 160, 4, 6                              0.21                0.031             0.89
    192, 256, 3, 6                              0.45                0.047             0.77
    160, 224, 5, 4                              0.65                0.053             0.65
    192, 224, 4, 4                              0.75                0.064             0.61
    160, 320, 4, 4 (the gentlest by formula)    0.80                0.063             0.63
    128, 320, 5, 4                              0.89                0.057             0.66

Legend: N positions that carry a token, D hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.cutting import COUNTED, Parts, Source, calibration_text, cut_widths, rank_parts
from distill.data import Batch, Rows
from distill.depth import layers_to_drop
from distill.losses import compare
from distill.models import head_weight, hidden_states
from distill.options import DistillOptions
from distill.teacher import open_teacher
from nano.checkpoint import Checkpoint
from nano.progress import track
from nano.shapes import ModelShape

JUDGING_BATCHES = 1
"""Of the calibration text's, 16 sequences each, for ranking parts too: shapes' damages differ by tenths of a nat. The
one that is taken is cut anew, by all of the text."""


@dataclass(frozen=True)
class Trial:
    """A shape and what cutting to it costs.

    Attributes:
        shape: of the student.
        kl: KL(teacher || student) in nats a token right after the cut, on calibration text.
    """

    shape: ModelShape
    kl: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        counts = {name: getattr(self.shape, name) for name in COUNTED}
        return {"parameters": self.shape.num_parameters, **counts, "kl": self.kl}


def least_damaged(
    folder: Path,
    teacher: ModelShape,
    shapes: Sequence[Sequence[ModelShape]],
    config: Mapping[str, Any],
    rows: Rows,
    options: DistillOptions,
) -> list[tuple[Trial, ...]]:
    """For each student its shapes, the least damaged first.

    Args:
        folder: the teacher's.
        teacher: its shape.
        shapes: for each student those to try.
        config: the config.json that students' are made of.
        rows: text; the calibration text is taken from it.
        options: how to cut.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_teacher(folder, teacher, options.teacher_precision, device).model
    judging = calibration_text(rows, options, device)[:JUDGING_BATCHES]
    leaving, known = _leaving(model, teacher, shapes, judging, options), dict[tuple[str, ...], Parts]()
    found = []
    with (
        Checkpoint(folder) as checkpoint,
        torch.inference_mode(),
        track("try shapes", sum(map(len, shapes)), "shapes") as progress,
    ):
        source = Source(model, teacher, checkpoint.tensor)
        whole = [hidden_states(model, teacher, batch) for batch in judging]
        for tried in shapes:
            trials = []
            for shape in tried:
                layers = tuple(sorted(shape.layer_types))
                if layers not in known:
                    gone = None if leaving is None else leaving[: teacher.num_layers - shape.num_layers]
                    known[layers] = rank_parts(source, shape, judging, options, gone)
                made = cut_widths(source, shape, config, known[layers])
                kl = _damage(made.model.to(device), made.shape, model, judging, whole)
                trials.append(Trial(shape, kl))
                progress.advance(note=f"KL {kl:.3f}")
            found.append(tuple(sorted(trials, key=lambda trial: trial.kl)))
    return found


def _leaving(
    model: Any,
    teacher: ModelShape,
    shapes: Sequence[Sequence[ModelShape]],
    batches: list[Batch],
    options: DistillOptions,
) -> list[tuple[int, float | None]] | None:
    """The layers that the shallowest shape loses, in the order of leaving: deeper ones lose the first of them.

    None where layers differ in kind, so that what leaves depends on the shape, or are not ranked so.
    """
    if options.layers != "damage" or len(set(teacher.layer_types)) > 1:
        return None
    shallowest = min((shape for tried in shapes for shape in tried), key=lambda shape: shape.num_layers)
    return [*layers_to_drop(model, teacher, shallowest, batches)]


def _damage(
    student: Any, shape: ModelShape, teacher: Any, batches: Sequence[Batch], whole: Sequence[torch.Tensor]
) -> float:
    """KL per token; `whole` are the teacher's hidden states, (N, D) a batch."""
    kl, tokens = 0.0, 0
    for batch, whole_ND in zip(batches, whole, strict=True):
        ours_ND = hidden_states(student, shape, batch)
        found = compare(ours_ND, head_weight(student), whole_ND, head_weight(teacher), batch.target_N)
        kl, tokens = kl + found.kl, tokens + found.tokens
    return kl / tokens
