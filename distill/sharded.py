"""Models whose weights are spread over processes (FSDP2), and a teacher that is one.

`Body` is what is sharded: a model, and whatever is to be made of its hidden states and its head, done inside one
forward pass. There FSDP2 has the weights of embedding and head whole, as plain tensors; the chunked loss takes the
head as it does on one device, its gradient is added to the embedding's where both are tied, and one reduce-scatter
brings the sum to the shards. Losses are sums over positions divided by the count over all processes, so gradients
are summed and never averaged.

Only the first process ever holds a model whole (it cuts the student); the others receive it weight by weight.

Legend: N positions that carry a token, D and E hidden widths of student and teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distill.data import Batch
from distill.losses import Comparison, DenseAnswers, compare
from distill.match import Matcher, states_and_layers
from distill.models import blank_model, head_weight
from distill.parallel import World
from distill.teacher import Teacher
from nano.shapes import ModelShape

Use = Callable[[torch.Tensor, Mapping[int, torch.Tensor], torch.Tensor], Any]
"""What is made of hidden states (N, D), watched layers' outputs, and the head (V, D)."""


class Body(torch.nn.Module):
    """A model with all that is trained beside it.

    Args:
        model: transformers' model.
        shape: its dimensions.
        matcher: projections for hidden-state matching.
    """

    def __init__(self, model: Any, shape: ModelShape, matcher: Matcher | None = None) -> None:
        super().__init__()
        self.model, self.shape, self.matcher = model, shape, matcher

    def forward(self, batch: Batch, watched: Sequence[int], use: Use, dtype: torch.dtype | None = None) -> Any:
        """Run the model on a batch, under autocast to `dtype` if any, and give what `use` makes of it without."""
        device = batch.ids_BT.device.type
        # no cache of casts: no weight is cast twice in a pass, and it would hold all of them until its end
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False):
            hidden_ND, layers = states_and_layers(self.model, self.shape, batch, watched)
        return use(hidden_ND, layers, head_weight(self.model))


@dataclass(frozen=True)
class SharedTeacher:
    """A teacher that runs on all processes together, each on rows of its own.

    Its embedding and head stay whole on every process once they were gathered; its layers do not.

    Attributes:
        body: the sharded model, without gradients.
        watched: layers whose outputs students are matched with.
    """

    body: Body
    watched: tuple[int, ...] = ()

    def answers(self, batch: Batch) -> DenseAnswers:
        """See `distill.teacher.Teacher.answers`. All processes have to call it as often."""
        with torch.no_grad():  # FSDP2 keeps what it gathers, which no tensor of inference_mode may be
            answers: DenseAnswers = self.body(
                batch, self.watched, lambda hid, layers, head: DenseAnswers(hid, head, layers)
            )
        return answers


def shard(model: Any | None, shape: ModelShape, world: World, device: str, matcher: Matcher | None = None) -> Body:
    """The first process's model, spread over all.

    Args:
        model: transformers' model on the first process; not looked at elsewhere.
        shape: its dimensions.
        world: the processes.
        device: "cpu" or "cuda", where the shards lie.
        matcher: the same on all processes.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    config, dtype = world.shared((model.config, model.dtype) if model is not None else None)
    trained = world.shared(any(p.requires_grad for p in model.parameters()) if model is not None else None)
    blank = blank_model(config, dtype).requires_grad_(trained)
    for layer in blank.model.layers:  # one after another: no process has room for all of them
        fully_shard(layer.to_empty(device=device), mesh=world.mesh)
    for name, part in [*blank.model.named_children(), ("lm_head", blank.lm_head)]:
        if name != "layers":
            part.to_empty(device=device)
    if config.tie_word_embeddings:
        blank.lm_head.weight = blank.model.embed_tokens.weight
    body = Body(blank, shape, matcher)
    fully_shard(body, mesh=world.mesh)
    for part in body.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    _fill(blank, model, world, device)
    return body


@torch.no_grad()
def _fill(sharded: Any, model: Any | None, world: World, device: str) -> None:
    """Every weight and buffer from the first process's model."""
    for kind in ("named_parameters", "named_buffers"):
        source = dict(getattr(model, kind)()) if model is not None else {}
        for name, into in getattr(sharded, kind)():
            whole = torch.empty(into.shape, dtype=into.dtype, device=device)
            if world.first:
                whole.copy_(source[name])
            torch.distributed.broadcast(whole, 0)
            put(into, whole)


@torch.no_grad()
def put(into: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor's values into a plain or sharded one, without communication."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(into, DTensor):
        whole = whole.to(into.device)
        whole = distribute_tensor(whole, into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(whole)


def like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor on a parameter's device, sharded as it is."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    into = torch.zeros_like(parameter.detach(), dtype=whole.dtype)
    put(into, whole)
    return into


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered on every process (all have to ask); a plain one as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def compare_shared(
    teacher: Teacher, student: Body, batches: Sequence[Batch], world: World, vocab: int | None = None
) -> Comparison:
    """How a sharded student compares with a live teacher on held-out text; each process takes batches of its own.

    A process that has none left goes along with one that does not count: a sharded pass needs all of them.

    Args:
        teacher: answers with `DenseAnswers`.
        student: the sharded student.
        batches: text.
        world: the processes.
        vocab: ids that are compared; None means all.
    """
    sums = [0.0] * 5
    for at in range(0, len(batches), world.size):
        mine = at + world.rank
        batch = batches[min(mine, len(batches) - 1)]
        answers = teacher.answers(batch)
        assert isinstance(answers, DenseAnswers)
        found = student(batch, (), _comparing(answers.over(vocab), batch, vocab))
        if mine < len(batches):
            figures = (found.ce, found.teacher_ce, found.kl, found.same, found.tokens)
            sums = [a + b for a, b in zip(sums, figures, strict=True)]
    student.reshard()  # type: ignore[operator]  # fully_shard made it an FSDPModule
    ce, teacher_ce, kl, same, tokens = world.sums(sums)
    return Comparison(ce, teacher_ce, kl, int(same), int(tokens))


def _comparing(answers: DenseAnswers, batch: Batch, vocab: int | None) -> Use:
    def use(hidden_ND: torch.Tensor, _layers: Mapping[int, torch.Tensor], head_VD: torch.Tensor) -> Comparison:
        return compare(hidden_ND, head_VD[:vocab], answers.hidden_NE, answers.head_VE, batch.target_N)

    return use
