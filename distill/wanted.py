"""What a student is to be: a size cut from the teacher, a shape, or a folder with a model of its own.

Of a teacher of another family nothing can be cut. Its student is a folder: with weights it goes on from them, and with
--start random its config.json alone says the architecture, which begins from scratch.

A given student may be padded to another size of embedding than its teacher (Qwen2.5: 151,936 rows for the small
models, 152,064 for the large ones, of 151,665 that mean something). Both are then compared over the ids that the
tokenizer really gives. Where ids mean different tokens, nothing can be compared, and the request is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cross_vocabulary import check_different
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
        folder: the model's that was named, if one was.
        scratch: only its config.json (and tokenizer, where it has one) counts: the weights are drawn at random.
    """

    shape: ModelShape
    config: Mapping[str, Any]
    folder: Path | None = None
    scratch: bool = False


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
        return _of_folder(Path(student), start)
    target = student if isinstance(student, ModelShape) else solve_student(teacher, student)
    check_shapes(teacher, target, start=start)
    return Wanted(target, config)


def _of_folder(folder: Path, start: str) -> Wanted:
    """A student whose architecture is a folder's, and its weights too unless they are to be random."""
    config = read_config(folder)
    if config.get("final_logit_softcapping"):
        raise UnsupportedError(
            "Capped logits are not supported.",
            found=f"final_logit_softcapping = {config['final_logit_softcapping']} of the student",
            todo="take it out of its config.json",
        )
    if start == "random":
        shape = ModelShape.from_hf(config)
        return Wanted(shape, shape.to_hf(config), folder, scratch=True)
    if not any(folder.glob("*.safetensors")):
        raise RequestError(
            "The student's folder holds no weights.",
            found=str(folder),
            expected="*.safetensors beside its config.json",
            todo="--start random begins this architecture from scratch",
        )
    from nano.torch_lm import check_float_folder

    return Wanted(check_float_folder(folder), config, folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder brings a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def common_ids(wanted: Wanted, teacher: ModelShape, tokenizer: TextTokenizer) -> int | None:
    """How many ids a given student and its teacher share, where their embeddings differ in size; else None.

    Raises:
        UnsupportedError: their tokenizers differ; says how.
    """
    if wanted.folder is None:
        return None
    if not has_tokenizer(wanted.folder):
        return _with_teachers_tokenizer(wanted, teacher, tokenizer)
    own = load_tokenizer(wanted.folder, wanted.shape.vocab_size)
    difference = vocabulary_difference(tokenizer, own)
    if difference:
        raise UnsupportedError(
            "Teacher and student have different tokenizers.",
            found=f"{difference} (teacher's and student's)",
            expected="the same tokens by the same ids; only the padding of the embedding may differ",
            todo="--cross-tokenizer gold compares them by the text that their tokens stand for; or cut a student from "
            "the teacher (--student 150M)",
        )
    if tokenizer.bos_id != own.bos_id:
        raise UnsupportedError(
            "Teacher and student begin texts differently.",
            found=f"beginning id {tokenizer.bos_id} of the teacher, {own.bos_id} of the student",
            todo="make tokenizer_config.json of both say the same",
        )
    return tokenizer.size if wanted.shape.vocab_size != teacher.vocab_size else None


def _with_teachers_tokenizer(wanted: Wanted, teacher: ModelShape, tokenizer: TextTokenizer) -> int | None:
    """The ids of a student that brings no tokenizer and so gets its teacher's."""
    if wanted.shape.vocab_size < tokenizer.size:
        raise RequestError(
            "The student has fewer embeddings than its teacher's tokenizer has ids, and no tokenizer of its own.",
            found=f"vocab_size {wanted.shape.vocab_size} in {wanted.folder}",
            expected=f"at least {tokenizer.size}",
        )
    return tokenizer.size if wanted.shape.vocab_size != teacher.vocab_size else None


def students_tokenizer(targets: Sequence[Wanted], teachers: TextTokenizer) -> tuple[TextTokenizer, list[int | None]]:
    """The tokenizer of students that is not their teacher's; for each its ids, where its embedding has more rows.

    Raises:
        RequestError: a student is no folder with a tokenizer, or it is the teacher's.
        UnsupportedError: the students' differ.
    """
    own = []
    for target in targets:
        if target.folder is None or not has_tokenizer(target.folder):
            raise RequestError(
                "This student has its teacher's tokenizer.",
                found=f"--cross-tokenizer, and {target.folder or 'a student by size'} with no tokenizer of its own",
                expected="--student FOLDER, with a tokenizer beside its config.json",
                todo="leave --cross-tokenizer out",
            )
        own.append(load_tokenizer(target.folder, target.shape.vocab_size))
    check_different(teachers, own)
    return own[0], [own[0].size if target.shape.vocab_size > own[0].size else None for target in targets]


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
