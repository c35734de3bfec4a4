"""A baseline: what a model scored on each document of a text, small enough for git, enough to judge another by.

A JSON file holds, for each unit of text, its predicted tokens, its negative log-likelihood, how many tokens the
model had right, and where there was a reference the sum of KL(reference || model) and how many most likely tokens
agreed; besides, what it was measured on, by hash. A paired test needs no more than that.

The unit is the document. A text of fewer than MIN_DOCUMENTS documents, for instance one plain file, is judged by
its windows instead: each begins afresh, so it is a text of its own to the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from nano.corpus import Windows
from nano.divergence import TokenFigures
from nano.errors import BadFileError
from nano.folder import write_text_atomically
from nano.manifest import library_versions
from nano.saved import read_saved
from nano.tokens import TextTokenizer

FORMAT, SCHEMA_VERSION = "nanokit baseline", 1
MIN_DOCUMENTS = 20
DIGITS = 4
"""Decimals kept of a sum of nats: a hundred thousandth of a token's likelihood is no difference."""
FIRST_WORDS = 48
"""Characters of a unit's beginning that are kept, to name it by."""


@dataclass(frozen=True)
class Unit:
    """What a model scored on one document (or window).

    Attributes:
        words: how it begins.
        ids: 12 hex digits of the hash of its token ids.
        tokens: predicted tokens.
        nll: their negative log-likelihood, nats.
        correct: tokens that were the model's most likely.
        kl: sum of KL(reference || model), nats; None without a reference.
        same: positions where model and reference have the same most likely token; None without a reference.
    """

    words: str
    ids: str
    tokens: int
    nll: float
    correct: int
    kl: float | None = None
    same: int | None = None


@dataclass(frozen=True)
class Baseline:
    """A model's scores by unit and what they were measured on.

    Attributes:
        model: {"path", "fingerprint", "kind"}.
        data: {"files": [{"path", "sha256"}], "tokens", "sequence_length"}.
        units: in the text's order.
        reference: as `model`, or None.
        activations: how an int4 folder's activations were simulated.
        scores: the figures over all of it.
        command: the command line that made it.
        created: UTC time, ISO 8601.
        versions: of nanokit and the libraries.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    units: tuple[Unit, ...]
    reference: Mapping[str, Any] | None = None
    activations: str = "float"
    scores: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many units."""
        return len(self.units)

    @property
    def hashes(self) -> tuple[str, ...]:
        """The text it was measured on, by content."""
        return tuple(entry["sha256"] for entry in self.data["files"])


def units_of(windows: Windows, figures: Sequence[TokenFigures], tokenizer: TextTokenizer) -> tuple[Unit, ...]:
    """Windows' token figures added up by document, or one by one where there are few documents."""
    by_window = [_unit(ids, found, tokenizer) for ids, found in zip(windows.ids, figures, strict=True)]
    if len(set(windows.documents)) < MIN_DOCUMENTS:
        return tuple(by_window)
    documents: dict[int, Unit] = {}
    for number, unit in zip(windows.documents, by_window, strict=True):
        documents[number] = _added(documents[number], unit) if number in documents else unit
    return tuple(documents.values())


def _unit(ids: Any, found: TokenFigures, tokenizer: TextTokenizer) -> Unit:
    begin = [i for i in ids[:FIRST_WORDS].tolist() if i != tokenizer.bos_id]
    words = " ".join(tokenizer.backend.decode(begin, skip_special_tokens=True).split())
    unit = Unit(
        words[:FIRST_WORDS],
        hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()[:12],
        len(found.nll_T),
        round(float(found.nll_T.sum()), DIGITS),
        int(found.correct_T.sum()),
    )
    if found.kl_T is None or found.same_T is None:
        return unit
    return replace(unit, kl=float(f"{found.kl_T.sum():.6g}"), same=int(found.same_T.sum()))


def _added(one: Unit, other: Unit) -> Unit:
    ids = hashlib.sha256((one.ids + other.ids).encode()).hexdigest()[:12]
    kl = None if one.kl is None or other.kl is None else float(f"{one.kl + other.kl:.6g}")
    same = None if one.same is None or other.same is None else one.same + other.same
    nll = round(one.nll + other.nll, DIGITS)
    return Unit(one.words, ids, one.tokens + other.tokens, nll, one.correct + other.correct, kl, same)


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write it as JSON, a unit a line so that git shows what changed; an older file stays until it is whole."""
    full = replace(
        baseline,
        command=baseline.command or ("nanokit", *sys.argv[1:]),
        created=baseline.created or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=baseline.versions or library_versions(),
    )
    plain = asdict(full)
    units = plain.pop("units")
    head = json.dumps({"format": FORMAT, "schema_version": SCHEMA_VERSION, **plain}, indent=1, ensure_ascii=False)
    keys = [key for key in units[0] if units[0][key] is not None]
    rows = ",\n  ".join(json.dumps([unit[key] for key in keys], ensure_ascii=False) for unit in units)
    text = f'{head[:-2]},\n "columns": {json.dumps(keys)},\n "units": [\n  {rows}\n ]\n}}\n'
    write_text_atomically(path, text)


def read_baseline(path: Path) -> Baseline:
    """A file that `nanokit evaluate --save` wrote.

    Raises:
        BadFileError: not JSON, not a baseline, of another schema, or damaged.
    """
    todo = "make it with: nanokit evaluate MODEL --data TEXT --save FILE.json"
    return _validated(read_saved(path, "baseline", FORMAT, SCHEMA_VERSION, todo), path, todo)


def _validated(raw: dict[str, Any], path: Path, todo: str) -> Baseline:
    """Its fields, types checked by pydantic, and its numbers."""
    from pydantic import TypeAdapter, ValidationError

    try:
        columns = raw.pop("columns")
        raw["units"] = [dict(zip(columns, row, strict=True)) for row in raw["units"]]
        baseline = TypeAdapter(Baseline).validate_python(raw)
        sound = all(unit.tokens > 0 and math.isfinite(unit.nll) for unit in baseline.units)
        alike = len({unit.kl is None for unit in baseline.units} | {unit.same is None for unit in baseline.units}) == 1
        data = baseline.data
        found = f"{data['tokens']:d}{data['sequence_length']:d}{baseline.model['fingerprint']}{baseline.hashes}"
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        if found and baseline.units and sound and alike:
            return baseline
        reason = "no units, or units whose numbers cannot be"
    raise BadFileError("The baseline is damaged.", found=f"{path}: {reason}", todo=todo)
