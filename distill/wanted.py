"""What a student is to be: a size cut from the teacher, a shape, or a folder with a model of its own.

A given student may be padded to another size of embedding than its teacher (Qwen2.5: 151,936 rows for the small
models, 152,064 for the large ones, of 151,665 that mean something). Both are then compared over the ids that the
tokenizer really gives. Where ids mean different tokens, nothing can be compared, and the request is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.vocabulary import vocabulary_difference
from nano.errors import RequestError, UnsupportedError
from nano.shapes import FULL, SLIDING, ModelShape, read_config
from nano.solve import solve_student
from nano.tokens import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class Wanted:
    """A student that is asked for.

    Attributes:
        shape: its dimensions.
        config: the config.json that its own is made of.
        folder: where its weights lie, if it has some already.
    """

    shape: ModelShape
    config: Mapping[str, Any]
    folder: Path | None = None


def find_student(student: str | ModelShape, teacher: ModelShape, config: Mapping[str, Any], start: str) -> Wanted:
    """The student that a request means.

    Args:
        student: a shape, "nano-1", a size like "150k", or a folder with a config.json.
        teacher: the teacher's shape.
        config: its config.json.
        start: "pruned" or "random".

    Raises:
        RequestError and its kinds: it cannot be cut from this teacher, or the folder is broken.
    """
    if isinstance(student, str) and (Path(student) / "config.json").is_file():
        from nano.torch_lm import check_float_folder

        folder = Path(student)
        return Wanted(check_float_folder(folder), read_config(folder), folder)
    target = student if isinstance(student, ModelShape) else solve_student(teacher, student)
    check_shapes(teacher, target, start=start)
    return Wanted(target, config)


def common_ids(wanted: Wanted, teacher: ModelShape, tokenizer: TextTokenizer) -> int | None:
    """How many ids a given student and its teacher share, where their embeddings differ in size; else None.

    Raises:
        UnsupportedError: their tokenizers differ; says how.
    """
    if wanted.folder is None:
        return None
    own = load_tokenizer(wanted.folder, wanted.shape.vocab_size)
    difference = vocabulary_difference(tokenizer, own)
    if difference:
        raise UnsupportedError(
            "Teacher and student have different tokenizers.",
            found=f"{difference} (teacher's and student's)",
            expected="the same tokens by the same ids; only the padding of the embedding may differ",
            todo="use a student of the teacher's model family, or cut one from it (--student 150M)",
        )
    if tokenizer.bos_id != own.bos_id:
        raise UnsupportedError(
            "Teacher and student begin texts differently.",
            found=f"beginning id {tokenizer.bos_id} of the teacher, {own.bos_id} of the student",
            todo="make tokenizer_config.json of both say the same",
        )
    return tokenizer.size if wanted.shape.vocab_size != teacher.vocab_size else None


def check_shapes(teacher: ModelShape, student: ModelShape, start: str = "pruned") -> None:
    """Whether a student of this shape can be trained against this teacher, and cut from it where it starts so.

    Raises:
        RequestError: a dimension exceeds the teacher's, or layer kinds are wanted that the teacher has too few of.
        UnsupportedError: another family, vocabulary or head width.
    """
    for name in ("family", "vocab_size") if start == "random" else ("family", "vocab_size", "head_dim", "tied"):
        if getattr(student, name) != getattr(teacher, name):
            raise UnsupportedError(
                f"This student's {name} has to be its teacher's.",
                found=f"{getattr(student, name)} for a teacher of {getattr(teacher, name)}",
                todo="ask for the student by its size",
            )
    if start == "random":
        return
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(student, name) > getattr(teacher, name):
            raise RequestError(
                "The student exceeds its teacher, so it cannot be cut from its weights.",
                found=f"{name} = {getattr(student, name)}",
                expected=f"at most the teacher's {getattr(teacher, name)}",
                todo="ask for a smaller student, or start at random (--start random)",
            )
    for kind in (FULL, SLIDING):
        if student.layer_types.count(kind) > teacher.layer_types.count(kind):
            raise RequestError(
                "The student has more layers of one kind than its teacher.",
                found=f"{student.layer_types.count(kind)} of {kind}",
                expected=f"at most {teacher.layer_types.count(kind)}",
            )
