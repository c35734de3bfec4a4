"""The teacher's side of training: something that turns a student's hidden states into a loss.

The loop knows a teacher only by `Teacher.loss`, so a teacher read from disk can stand where a live one does.

Legend: N positions that carry a token, D hidden width of the student, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from distill.data import Batch
from distill.losses import Comparison, Mix, Sums, compare, distillation_loss
from distill.models import head_weight, hidden_states
from nano.shapes import ModelShape
from nano.torch_lm import load_float


class Teacher(Protocol):
    """What a student is trained against."""

    def loss(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, batch: Batch, mix: Mix) -> tuple[torch.Tensor, Sums]:
        """The student's loss on a batch, and the sums to report; see `distill.losses.distillation_loss`."""


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that runs beside its student.

    Attributes:
        model: transformers' model, without gradients.
        shape: its dimensions.
    """

    model: Any
    shape: ModelShape

    def loss(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, batch: Batch, mix: Mix) -> tuple[torch.Tensor, Sums]:
        """See `Teacher.loss`. The teacher runs even where the mix gives its KL no weight: the KL is reported."""
        with torch.inference_mode():
            teacher_hidden_NE = hidden_states(self.model, self.shape, batch)
        return distillation_loss(hidden_ND, head_VD, teacher_hidden_NE, head_weight(self.model), batch.target_N, mix)

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
