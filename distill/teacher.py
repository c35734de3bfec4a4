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
from nano.errors import UnsupportedError, require_module
from nano.shapes import ModelShape
from nano.torch_lm import check_finite, load_float


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

    def compare(self, student: Any, shape: ModelShape, batches: list[Batch], vocab: int | None = None) -> Comparison:
        """How a student compares with this teacher on held-out text, both in their own precision.

        Args:
            student: its model.
            shape: its dimensions.
            batches: text.
            vocab: ids that are compared; None means all.
        """
        head, own_head = head_weight(self.model)[:vocab], head_weight(student)[:vocab]
        parts = []
        with torch.inference_mode():
            for batch in batches:
                ours, theirs = hidden_states(student, shape, batch), hidden_states(self.model, self.shape, batch)
                parts.append(compare(ours, own_head, theirs, head, batch.target_N))
        return Comparison(
            ce=sum(part.ce for part in parts),
            teacher_ce=sum(part.teacher_ce for part in parts),
            kl=sum(part.kl for part in parts),
            same=sum(part.same for part in parts),
            tokens=sum(part.tokens for part in parts),
        )


def open_teacher(folder: Path, shape: ModelShape, precision: str, device: str) -> LiveTeacher:
    """A float HF folder as a live teacher.

    Args:
        folder: of the model.
        shape: its dimensions.
        precision: "float32", "bfloat16", or bitsandbytes' "int8" or "nf4", whose other parts are in bfloat16 on a GPU.
        device: "cpu" or "cuda".

    Raises:
        MissingExtraError: bitsandbytes or accelerate is wanted and not installed.
        UnsupportedError: bitsandbytes cannot run it on this machine.
    """
    if precision in ("int8", "nf4"):
        model = _load_bitsandbytes(folder, precision, device)
    else:
        model = load_float(folder, getattr(torch, precision)).to(device)
    return LiveTeacher(model.eval().requires_grad_(False), shape)


def _load_bitsandbytes(folder: Path, precision: str, device: str) -> Any:
    require_module("bitsandbytes", "bnb")
    require_module("accelerate", "bnb")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = BitsAndBytesConfig(
        load_in_8bit=precision == "int8", load_in_4bit=precision == "nf4",
        bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), quantization_config=settings, dtype=dtype, device_map={"": device}, local_files_only=True
        )
        with torch.inference_mode():  # what a machine cannot do shows in the first product
            model.model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=device))
    except (RuntimeError, NotImplementedError, ValueError, ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"bitsandbytes cannot run this teacher in {precision} here.",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} (on {device})",
            todo="use a CUDA GPU, or --teacher-dtype bfloat16",
        ) from None
    check_finite(model, folder)
    return model
