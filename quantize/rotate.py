"""Rotations folded into the weights: the same function on a basis in which int4 loses less. Nothing runs on the phone.

R1 turns the residual stream: h' = h Q. What reads it takes W Q, what writes to it Q^T W, the embedding E Q. An RMS
norm commutes with a turn only where its weight is constant, so each norm's weight is folded into its readers first
(QuaRot, 2404.00456; SpinQuant, 2405.16406). The final norm's only reader is the head: where head and embedding are
one tensor they come apart, unless that norm is constant already.
R2 turns each key/value head between v_proj and o_proj, where attention only takes weighted means. It costs nothing.

Families whose blocks end in norms (Gemma 3) cannot have R1: a norm of non-constant weight stands between what
writes to the stream and the stream. They get R2 alone.

Legend: D hidden width, V vocabulary, N output channels, K input channels, L layers, G key/value heads, A head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nano.families import EMBEDDING, FINAL_NORM, HEAD, family_of, layer_prefix
from nano.folder import human_bytes
from nano.progress import say, warn
from quantize.hadamard import hadamard, randomised_hadamard
from quantize.student import Student
from quantize.view import StudentView, norm_read_by

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")

ROWS_AT_ONCE = 1 << 14
"""Rows of an embedding turned in one product: its float32 copy stays small beside it."""


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices to fold into a model.

    Attributes:
        residual_DD: R1, float32, or None to leave the residual stream as it is.
        heads_LGAA: R2 of every layer's key/value heads, float32.
    """

    residual_DD: torch.Tensor | None
    heads_LGAA: torch.Tensor


def hadamard_rotation(student: Student, seed: int, residual: bool = True) -> Rotation:
    """Randomised Hadamard matrices for a student; R1 only where it is asked for and the family can have it."""
    generator, shape = torch.Generator().manual_seed(seed), student.shape
    turned = residual and can_turn_residual(student)
    residual_DD = randomised_hadamard(shape.hidden_size, generator) if turned else None
    heads = [randomised_hadamard(shape.head_dim, generator) for _ in range(shape.num_layers * shape.num_kv_heads)]
    heads_LGAA = torch.stack(heads).view(shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.head_dim)
    return Rotation(residual_DD, heads_LGAA)


def can_turn_residual(student: Student) -> bool:
    """Whether R1 is exact for the student's family."""
    return not family_of(student.shape.family).post_norms


def unties_head(student: Student) -> bool:
    """Whether R1 takes a tied head apart from the embedding: the final norm's weight goes into the head alone."""
    return (
        student.shape.tied and can_turn_residual(student) and not _is_constant(student.tensor(FINAL_NORM + ".weight"))
    )


def say_cost(student: Student) -> None:
    """Say what a rotation will not do for this student, or what it costs."""
    if not can_turn_residual(student):
        warn(
            f"the blocks of {student.shape.family} end in norms, through which the residual stream cannot be rotated "
            f"exactly: only the attention heads are (between v_proj and o_proj)"
        )
    elif unties_head(student):
        size = student.tensor(EMBEDDING + ".weight")
        warn(
            f"rotating the residual stream takes the tied head apart from the embedding, because the final norm's "
            f"weight is folded into the head: the model grows by {human_bytes(size.numel() * size.element_size())}"
        )
    if can_turn_residual(student) and hadamard(student.shape.hidden_size) is None:
        say(f"no Hadamard matrix of order {student.shape.hidden_size}: a random orthogonal one is used")


def rotated(student: Student, rotation: Rotation) -> Student:
    """The student with a rotation folded in: the same function, other weights.

    Linears come as float32; the embedding and the head in the type they have on disk, as they are stored so.
    """
    if rotation.residual_DD is not None:
        student = fold_norms(student)
    return StudentView(student, _turned(student, rotation))


def fold_norms(student: Student) -> Student:
    """The student with the weight of every norm over the residual stream folded into what reads that norm.

    A final norm of constant weight is left alone and the head stays tied; any other is folded into a head of its own.
    """
    family, shape = family_of(student.shape.family), student.shape
    norms = {layer_prefix(i) + name + ".weight" for i in range(shape.num_layers) for name in family.layer_norms}
    fold_final = not (shape.tied and _is_constant(student.tensor(FINAL_NORM + ".weight")))

    def change(name: str) -> torch.Tensor:
        if name in norms or (fold_final and name == FINAL_NORM + ".weight"):
            return torch.full_like(student.tensor(name), 1.0 - family.norm_offset)
        module = name.removesuffix(".weight")
        if fold_final and module == HEAD:
            matrix_VD = student.tensor((EMBEDDING if shape.tied else HEAD) + ".weight")
            gain_D = student.tensor(FINAL_NORM + ".weight").float() + family.norm_offset
            return _in_parts(matrix_VD, lambda rows_vD: rows_vD * gain_D)
        prefix, linear = module[: -len(_in_layer(module))], _in_layer(module)
        norm = norm_read_by(linear, family)
        if norm is None:
            return student.tensor(name)
        return student.tensor(name).float() * (student.tensor(f"{prefix}{norm}.weight").float() + family.norm_offset)

    return StudentView(student, change, shape.resized(tied=shape.tied and not fold_final))


def _in_layer(module: str) -> str:
    """A module's name within its layer; itself where it belongs to none."""
    return module.split(".", 3)[-1]


def _is_constant(weight_D: torch.Tensor) -> bool:
    return bool((weight_D == weight_D[0]).all())


def _in_parts(matrix_VD: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A change of a tall matrix's rows, computed in float32, given back in its own type."""
    result_VD = torch.empty_like(matrix_VD)
    for start in range(0, len(matrix_VD), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        result_VD[part] = change(matrix_VD[part].float())
    return result_VD


def _turned(student: Student, rotation: Rotation) -> Callable[[str], torch.Tensor]:
    """Each tensor of the student (its norms folded, where R1 is given) on the new bases."""
    residual_DD, heads_LGAA = rotation.residual_DD, rotation.heads_LGAA
    kv_heads, head_dim = student.shape.num_kv_heads, student.shape.head_dim

    def change(name: str) -> torch.Tensor:
        tensor = student.tensor(name)
        module = name.removesuffix(".weight")
        if module in (EMBEDDING, HEAD):
            return tensor if residual_DD is None else _in_parts(tensor, lambda rows_vD: rows_vD @ residual_DD)
        if not module.endswith((*READERS, *WRITERS)):
            return tensor
        weight_NK, layer = tensor.float(), int(module.split(".")[2])
        if module.endswith("v_proj"):
            rows_GAK = weight_NK.view(kv_heads, head_dim, -1)
            weight_NK = (heads_LGAA[layer].mT @ rows_GAK).reshape(weight_NK.shape)
        if module.endswith("o_proj"):  # query heads of one key/value head stand together: (G, heads of it, A)
            columns_NGPA = weight_NK.view(len(weight_NK), kv_heads, -1, head_dim)
            weight_NK = (columns_NGPA @ heads_LGAA[layer]).reshape(weight_NK.shape)
        if residual_DD is not None:
            weight_NK = weight_NK @ residual_DD if module.endswith(READERS) else residual_DD.T @ weight_NK
        return weight_NK

    return change
