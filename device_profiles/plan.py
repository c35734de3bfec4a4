"""`Plan`: a student before anything is spent on it: its shape, its exact size, its bytes, what training it costs.

Training cost in floating-point operations, from Kaplan et al. 2020 (arXiv 2001.08361, section 2.1): a forward pass
takes 2 N operations a token and a backward pass twice that, N being the parameters that multiply (every linear and
the output head; looking an embedding up is free). A student that learns from a teacher's logits costs

    6 N_student + 2 N_teacher   operations a token

and, over all full layers, attention adds 2 x 2 x context x H A forward for either network; at a training window of a
few thousand positions that is a few percent, so it is left out, as there. The default number of tokens is 20 for each
of the student's parameters (Hoffmann et al. 2022, arXiv 2203.15556, table 3): a convention for training from scratch
that lets plans be compared, not a promise of quality. Minitron's pruned 4B took 94 B tokens (arXiv 2407.14679).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device_profiles.footprint import (
    RUNTIMES,
    CacheType,
    EmbeddingBits,
    PlannedRecipe,
    Runtime,
    cache_bytes,
    planned_parts,
)
from nano.errors import RequestError
from nano.exportable import warn_of_export
from nano.families import family_of
from nano.shapes import ModelShape, read_config
from nano.solve import SizeTarget, canonical_shape, parse_size, solve_student

TOKENS_PER_PARAMETER = 20
KV_CONTEXTS = (4096, 32768)
EMBEDDINGS: tuple[EmbeddingBits, ...] = ("float", "8", "4")


@dataclass(frozen=True)
class Plan:
    """A student on paper.

    Attributes:
        target: the size that was asked for.
        shape: the student's dimensions.
        teacher: the teacher's dimensions; None from scratch.
        tokens: training tokens that the cost is counted for.
        tokenizer_bytes: size of the teacher's tokenizer.json; 0 where it is not known.
    """

    target: SizeTarget
    shape: ModelShape
    teacher: ModelShape | None
    tokens: int
    tokenizer_bytes: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Parameters by kind; together exactly the student's, a tied embedding counted once."""
        embedding = self.shape.vocab_size * self.shape.hidden_size
        head = 0 if self.shape.tied else embedding
        linears = self.shape.linear_parameters
        norms = self.shape.num_parameters - embedding - head - linears
        return {"embedding": embedding, "head": head, "linears": linears, "norms": norms}

    @property
    def flops_per_token(self) -> int:
        """Training operations a token: 6 N_student + 2 N_teacher."""
        return 6 * multiplied(self.shape) + (2 * multiplied(self.teacher) if self.teacher else 0)

    @property
    def deviation(self) -> float:
        """How far the count lies from the size asked for, relatively."""
        return self.shape.num_parameters / self.target.parameters - 1

    def recipe(
        self, runtime: Runtime, *, embedding: EmbeddingBits = "4", context: int = 4096, kv: CacheType = "float"
    ) -> PlannedRecipe:
        """The recipe that bytes are counted for; the context is cut to the model's own."""
        context = min(context, self.shape.max_positions)
        return PlannedRecipe(runtime, embedding=embedding, context=context, tokenizer_bytes=self.tokenizer_bytes, kv=kv)

    def file_bytes(self) -> dict[str, dict[str, int]]:
        """Bytes in the file at int4 in groups of 32, scales included: by runtime, then linears, norms, and what the
        embedding takes with its head where it is kept in float32, int8 and int4."""
        found: dict[str, dict[str, int]] = {}
        for runtime in RUNTIMES:
            parts = {bits: planned_parts(self.shape, self.recipe(runtime, embedding=bits)) for bits in EMBEDDINGS}
            found[runtime] = {name: parts["4"][name] for name in ("linears", "norms")}
            for bits in EMBEDDINGS:
                found[runtime][f"embedding_{bits}"] = parts[bits]["embedding"] + parts[bits]["head"]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "student": self.target.name,
            "parameters": self.shape.num_parameters,
            "deviation": self.deviation,
            "shape": asdict(self.shape),
            "teacher": None if self.teacher is None else asdict(self.teacher),
            "counts": self.counts,
            "file_bytes": self.file_bytes(),
            "kv_bytes": {"dtype": "float32", **self.kv_bytes()},
            "flops_per_token": self.flops_per_token,
            "tokens": self.tokens,
            "flops": self.flops_per_token * self.tokens,
        }

    def kv_bytes(self) -> dict[str, dict[int, int]]:
        """float32 KV cache by runtime and context, as the exporters allocate it, up to the model's positions."""
        contexts = [context for context in KV_CONTEXTS if context <= self.shape.max_positions]
        return {r: {c: cache_bytes(self.shape, r, c, PlannedRecipe.chunk) for c in contexts} for r in RUNTIMES}


def multiplied(shape: ModelShape) -> int:
    """Parameters that take part in a multiplication for every token: the linears and the output head."""
    return shape.linear_parameters + shape.vocab_size * shape.hidden_size


def make_plan(student: str, teacher: Path | None = None, tokens: str | None = None) -> Plan:
    """Solve the student's shape and count it.

    Args:
        student: "nano-1", "nano-2" or a size like "1.2B".
        teacher: a model folder; None takes the canonical shape that is trained from scratch.
        tokens: training tokens, like "94B"; 20 a parameter where None.

    Raises:
        BadFileError, UnsupportedError: the teacher's config.json cannot be used.
        RequestError: no student of that size, or the number of tokens is not understood.
    """
    target = parse_size(student)
    if teacher is None:
        shape, source, tokenizer_bytes = canonical_shape(student), None, 0
    else:
        config = read_config(teacher)
        source = ModelShape.from_hf(config)
        shape = solve_student(source, target)
        warn_of_export(config, family_of(source.family))
        tokenizer = teacher / "tokenizer.json"
        tokenizer_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
    count = TOKENS_PER_PARAMETER * shape.num_parameters if tokens is None else parse_tokens(tokens)
    return Plan(target, shape, source, count, tokenizer_bytes)


def parse_tokens(text: str) -> int:
    """A number of tokens: "94B", "1.5T", "300M", "20k" or plain digits.

    Raises:
        RequestError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMbBtT]?)", text.strip().replace("_", ""))
    count = round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2].lower()]) if match else 0
    if count < 1:
        raise RequestError(
            "The number of training tokens is not understood.", found=repr(text), expected="a number like 94B or 300M"
        )
    return count
