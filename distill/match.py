"""Hidden-state matching: a student's layers learn to give what the teacher's layers they came from give.

    loss = weight * sum_N mean_pairs ||P_i h_i - t_j||^2 / ||t_j||^2

with h_i what student layer i adds up to, t_j the same of teacher layer j, and P_i a learned projection (TinyBERT,
arXiv 1909.10351, equation 8; relative to each position's own size, since residual streams of language models differ
by orders of magnitude between positions). The projections live in the training state and are no part of the student.

Legend: N positions, D and E hidden widths of student and teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distill.data import Batch
from distill.models import hidden_states


class Matcher(torch.nn.Module):
    """Projections of a student's layers to the teacher's width.

    Args:
        layers: for each layer of the student the teacher's that it is matched with.
        width, teacher_width: D and E.
        channels: the teacher's channels that the student's are, where it was cut from it; a projection then starts
            by putting each where it was. Else it starts at zero.
    """

    def __init__(
        self, layers: Sequence[int], width: int, teacher_width: int, channels: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        first_ED = torch.zeros(teacher_width, width)
        if channels is not None:
            first_ED[list(channels), range(width)] = 1.0
        self.projections = torch.nn.ParameterList(first_ED.clone() for _ in self.layers)

    def loss(self, ours: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The sum above, without its weight.

        Args:
            ours: outputs of the student's layers by number, (N, D).
            theirs: of the teacher's, (N, E).
        """
        parts = []
        for i, (j, projection_ED) in enumerate(zip(self.layers, self.projections, strict=True)):
            wanted_NE = theirs[j].to(projection_ED.dtype)
            error_NE = ours[i].to(projection_ED.dtype) @ projection_ED.T - wanted_NE
            parts.append((error_NE.square().sum(1) / wanted_NE.square().sum(1).clamp_min(1e-12)).sum())
        return torch.stack(parts).mean()


def spread(count: int, teacher_count: int) -> list[int]:
    """Teacher layers for a student that was not cut from it: evenly, the last with the last."""
    return [round((i + 1) * teacher_count / count) - 1 for i in range(count)]


def states_and_layers(
    model: Any, shape: Any, batch: Batch, layers: Sequence[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """`distill.models.hidden_states`, and the outputs of some layers at the same positions, (N, D) each."""
    with _listening(model, layers) as heard:
        hidden_ND = hidden_states(model, shape, batch)
    return hidden_ND, {i: out_BTD.flatten(0, 1)[batch.real_N] for i, out_BTD in heard.items()}


@contextmanager
def _listening(model: Any, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Outputs of layers while the block runs."""
    heard: dict[int, torch.Tensor] = {}

    def hook(i: int) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            heard[i] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [model.model.layers[i].register_forward_hook(hook(i)) for i in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
