"""A student read through a change of its weights: what the folding methods make and every solver reads.

Rotations and scale folds leave the model's function as it is and move numbers between its weights. They are not
applied to a copy of the model: a view computes each tensor when it is asked for, from the student below it, so that
a model of any size still passes through memory one layer at a time. Views stack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nano.families import Family
from nano.shapes import ModelShape
from quantize.student import Student

if TYPE_CHECKING:
    import torch


class StudentView(Student):
    """A student whose tensors are those of another, changed as they are read.

    Attributes:
        source: the student below; closed by whoever opened it, as this view owns no file.

    Args:
        source: the student below.
        change: gives a tensor of the view by its full name; reads what it needs from `source`.
        shape: the view's dimensions, where they are not the source's (a head that is no longer tied).
    """

    def __init__(self, source: Student, change: Callable[[str], torch.Tensor], shape: ModelShape | None = None) -> None:
        self.source, self._change = source, change
        self.folder, self.store = source.folder, source.store
        self.source_shape, self.shape = source.source_shape, shape or source.shape
        self.config = self.shape.to_hf(source.config)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the changed model.

        Raises:
            BadFileError: what it is made from holds NaN or infinity.
        """
        return self._change(name)

    def close(self) -> None:
        """Nothing: the files belong to the student below."""


def norm_read_by(linear: str, family: Family) -> str | None:
    """The norm whose output a linear reads, both named as within a layer; None for o_proj and down_proj."""
    if linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        return family.layer_norms[0]
    if linear in ("mlp.gate_proj", "mlp.up_proj"):  # where blocks end in norms too, the MLP's is the third
        return family.layer_norms[2] if family.post_norms else family.layer_norms[1]
    return None
