"""Cut a teacher's tensors to a student's shape: which parts stay, and the tensors that follow from it.

Kept: the layers that `distill.depth` leaves; of each, by importance, whole attention groups (a key/value head with
its query heads) and feed-forward neurons; hidden channels, the same everywhere. Everything kept stays in the
teacher's order, so cutting nothing changes nothing. What is left of a linear whose inputs were cut is for `narrow`
to say: its columns, or a least-squares fit (`distill.refit`).

A norm divides by the root mean square of all D channels; over the d that stay the mean is another one. Each norm's
weight is therefore multiplied by sqrt(mean over kept i of E[x_i^2 / mean_j x_j^2]), measured on the calibration
text, so that kept channels keep their size. Where the embedding is scaled by sqrt(D) (Gemma) it is multiplied by
sqrt(D / d), and where it is the head too the last norm takes the factor back.

Where the student has more query heads to a group than the teacher (fewer key/value heads at as many heads), the
keys and values of the groups that merge are averaged (arXiv 2305.13245, section 2.1).

Legend: D, d hidden width of teacher and student, F feed-forward width, H query heads, G key/value heads, A head
width, N outputs and K inputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from distill.importance import Importance
from nano.errors import RequestError
from nano.families import EMBEDDING, FINAL_NORM, HEAD, LAYER_LINEARS, QK_NORMS, Family, family_of, layer_prefix
from nano.shapes import FULL, SLIDING, ModelShape

Read = Callable[[str], torch.Tensor]
Narrow = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""(module, weight (N, K), kept inputs (k,)) to the weight over the kept inputs, (N, k)."""


def select(_module: str, weight_NK: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The plainest `Narrow`: the kept columns."""
    return weight_NK[:, kept]


@dataclass(frozen=True)
class LayerCut:
    """What stays of one layer.

    Attributes:
        source: the teacher's layer.
        kv_groups: for each of the student's key/value heads, the teacher's that are averaged into it (mostly one).
        query_heads: the teacher's query heads, group by group.
        neurons: the teacher's feed-forward neurons.
    """

    source: int
    kv_groups: tuple[tuple[int, ...], ...]
    query_heads: tuple[int, ...]
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """What stays of a teacher: hidden channels and layers, all ascending. `shape` is what comes out."""

    shape: ModelShape
    hidden: tuple[int, ...]
    layers: tuple[LayerCut, ...]


def choose(teacher: ModelShape, student: ModelShape, dropped: Sequence[int], importance: Importance) -> Cut:
    """What stays. The student's layer_types become those of the kept layers, in the teacher's order.

    Args:
        teacher, student: shapes.
        dropped: the teacher's layers that leave.
        importance: scores of the parts of those that stay.
    """
    kept = [i for i in range(teacher.num_layers) if i not in dropped]
    assert len(kept) == student.num_layers
    layers = tuple(_cut_layer(teacher, student, importance, i) for i in kept)
    shape = student.resized(layer_types=tuple(teacher.layer_types[i] for i in kept))
    hidden = _best(range(teacher.hidden_size), importance.hidden_D, student.hidden_size)
    return Cut(shape, tuple(hidden), layers)


def least_influence(teacher: ModelShape, student: ModelShape, importance: Importance) -> list[int]:
    """Layers to drop by block influence alone: cheaper than `distill.depth`, and worse."""
    dropped: list[int] = []
    for kind in (FULL, SLIDING):
        of_kind = [i for i in range(teacher.num_layers) if teacher.layer_types[i] == kind]
        stay = _best(of_kind, importance.layers_L, student.layer_types.count(kind))
        dropped += [i for i in of_kind if i not in stay]
    return dropped


def _best(candidates: range | list[int], score: torch.Tensor, count: int) -> list[int]:
    """The `count` candidates of the highest score, ascending; of equals the first."""
    ranked = sorted(candidates, key=lambda i: (-float(score[i]), i))
    return sorted(ranked[:count])


def _cut_layer(teacher: ModelShape, student: ModelShape, importance: Importance, layer: int) -> LayerCut:
    theirs, ours = teacher.num_heads // teacher.num_kv_heads, student.num_heads // student.num_kv_heads
    head_score = importance.heads_LH[layer]
    merged = math.ceil(ours / theirs)  # teacher groups that make one of the student's
    group_score = (head_score**2).view(teacher.num_kv_heads, theirs).sum(1).sqrt()
    if merged * student.num_kv_heads > teacher.num_kv_heads:
        raise RequestError(
            "The student's query heads cannot be taken from whole attention groups.",
            found=f"{student.num_heads} query and {student.num_kv_heads} key/value heads",
            expected=f"at most {theirs} query heads for each key/value head that stays, or groups that merge evenly",
        )
    groups = _best(range(teacher.num_kv_heads), group_score, merged * student.num_kv_heads)
    kv_groups = tuple(tuple(groups[i : i + merged]) for i in range(0, len(groups), merged))
    queries: list[int] = []
    for members in kv_groups:
        candidates = [g * theirs + q for g in members for q in range(theirs)]
        queries += _best(candidates, head_score, ours)
    neurons = _best(range(teacher.intermediate_size), importance.ffn_LF[layer], student.intermediate_size)
    return LayerCut(layer, kv_groups, tuple(queries), tuple(neurons))


def cut_tensors(
    teacher: ModelShape, cut: Cut, importance: Importance, read: Read, narrow: Narrow = select
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the student, one at a time, in the teacher's precision.

    Args:
        teacher: shape of the teacher.
        cut: what stays.
        importance: gives the norms' statistics.
        read: a teacher's tensor by its full name.
        narrow: what is left of a linear over its kept inputs.
    """
    family = family_of(teacher.family)
    hidden = torch.tensor(cut.hidden)
    embedding_factor = math.sqrt(teacher.hidden_size / len(hidden)) if family.scaled_embedding else 1.0
    yield f"{EMBEDDING}.weight", _scaled(read(f"{EMBEDDING}.weight")[:, hidden], embedding_factor)
    for i, layer in enumerate(cut.layers):
        old, new = layer_prefix(layer.source), layer_prefix(i)
        for name in LAYER_LINEARS:
            weight_NK, kept = _rows_and_inputs(teacher, layer, hidden, name, read(f"{old}{name}.weight"))
            merged = name == "self_attn.o_proj" and any(len(group) > 1 for group in layer.kv_groups)
            yield f"{new}{name}.weight", (select if merged else narrow)(old + name, weight_NK, kept)
        for norm in family.layer_norms:
            factor = _norm_factor(importance, old + norm, cut)
            yield f"{new}{norm}.weight", _rescaled_norm(family, read(f"{old}{norm}.weight")[hidden], factor)
        for norm in QK_NORMS if family.qk_norm else ():
            yield f"{new}{norm}.weight", read(f"{old}{norm}.weight")
    factor = _norm_factor(importance, FINAL_NORM, cut) / (embedding_factor if teacher.tied else 1.0)
    yield f"{FINAL_NORM}.weight", _rescaled_norm(family, read(f"{FINAL_NORM}.weight")[hidden], factor)
    if not teacher.tied:
        yield f"{HEAD}.weight", narrow(HEAD, read(f"{HEAD}.weight"), hidden)


def _rows_and_inputs(
    teacher: ModelShape, layer: LayerCut, hidden: torch.Tensor, name: str, weight_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear's kept rows over all its inputs, and which inputs are kept."""
    A = teacher.head_dim
    of_heads = (torch.tensor(layer.query_heads)[:, None] * A + torch.arange(A)).flatten()
    neurons = torch.tensor(layer.neurons)
    if name == "self_attn.q_proj":
        return weight_NK[of_heads], hidden
    if name in ("self_attn.k_proj", "self_attn.v_proj"):
        kv_GAD = weight_NK.view(-1, A, teacher.hidden_size)
        return torch.cat([_average(kv_GAD[list(group)]) for group in layer.kv_groups]), hidden
    if name == "self_attn.o_proj":
        return weight_NK[hidden], of_heads
    if name == "mlp.down_proj":
        return weight_NK[hidden], neurons
    return weight_NK[neurons], hidden


def _average(kv_gAD: torch.Tensor) -> torch.Tensor:
    return kv_gAD[0] if len(kv_gAD) == 1 else kv_gAD.float().mean(0).to(kv_gAD.dtype)


def _norm_factor(importance: Importance, norm: str, cut: Cut) -> float:
    """By how much the root mean square of a norm's input grows when only the kept channels are counted."""
    energy_D = importance.energy[norm]
    if len(cut.hidden) == len(energy_D):
        return 1.0
    return math.sqrt(float(energy_D[list(cut.hidden)].mean()))


def _rescaled_norm(family: Family, weight: torch.Tensor, factor: float) -> torch.Tensor:
    """A norm's weight times a factor, where the family stores weight - offset."""
    if factor == 1.0:
        return weight.contiguous()
    return ((weight.float() + family.norm_offset) * factor - family.norm_offset).to(weight.dtype)


def _scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor.contiguous() if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)
