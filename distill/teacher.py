"""The teacher's side of training: something that answers a batch of text, once for all students.

The loop knows a teacher only by `Teacher.answers`, so a teacher read from disk can stand where a live one does.

Legend: N positions that carry a token, E hidden width of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from distill.data import Batch
from distill.losses import Answers, Comparison, DenseAnswers, compare
from distill.match import states_and_layers
from distill.models import head_weight, hidden_states
from nano.shapes import ModelShape
from nano.torch_lm import load_float


class Teacher(Protocol):
    """What a student is trained against."""

    def answers(self, batch: Batch) -> Answers:
        """What it says of a batch's positions."""


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that runs beside its student.

    Attributes:
        model: transformers' model, without gradients.
        shape: its dimensions.
        watched: layers whose outputs students are matched with.
    """

    model: Any
    shape: ModelShape
    watched: tuple[int, ...] = ()

    def answers(self, batch: Batch) -> DenseAnswers:
        """See `Teacher.answers`."""
        with torch.inference_mode():
            hidden_NE, layers = states_and_layers(self.model, self.shape, batch, self.watched)
        return DenseAnswers(hidden_NE, head_weight(self.model), layers)

    def compare(self, student: Any, shape: ModelShape, batches: list[Batch]) -> Comparison:
        """How a student compares with this teacher on held-out text, both in their own precision."""
        parts = []
        with torch.inference_mode():
            for batch in batches:
                ours, theirs = hidden_states(student, shape, batch), hidden_states(self.model, self.shape, batch)
                parts.append(compare(ours, head_weight(student), theirs, head_weight(self.model), batch.target_N))
        return Comparison(
            ce=sum(part.ce for part in parts),
            teacher_ce=sum(part.teacher_ce for part in parts),
            kl=sum(part.kl for part in parts),
            same=sum(part.same for part in parts),
            tokens=sum(part.tokens for part in parts),
        )


def open_teacher(folder: Path, shape: ModelShape, dtype: torch.dtype, device: str) -> LiveTeacher:
    """A float HF folder as a live teacher."""
    model = load_float(folder, dtype).to(device).eval().requires_grad_(False)
    return LiveTeacher(model, shape)
