"""Text for training, calibration and evaluation: documents from files, windows of token ids from documents.

A file is JSON Lines when its first line is a JSON object (its "text" field is one document), else plain text
(the whole file is one document): decided by content, never by name.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nano.errors import BadFileError, RequestError
from nano.folder import sha256_file
from nano.tokens import TextTokenizer

Ids = npt.NDArray[np.int64]
MIN_WINDOW = 8


def read_documents(paths: Sequence[Path]) -> list[str]:
    """All documents of some files, in order.

    Raises:
        BadFileError: a file is missing, empty, binary, or a JSON line has no "text".
        RequestError: no file was given.
    """
    if not paths:
        raise RequestError("This needs text.", expected="--data FILE, a text or JSONL file (may be repeated)")
    documents: list[str] = []
    for path in paths:
        documents += _read_file(path)
    return documents


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise BadFileError("There is no such text file.", found=str(path), todo="check the path")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFileError(
            "A data file is not text.", found=f"{path}: {error}", expected="UTF-8 text or JSONL"
        ) from None
    if "\0" in text:
        raise BadFileError(
            "A data file is not text.", found=f"{path} contains NUL bytes", expected="UTF-8 text or JSONL"
        )
    if not text.strip():
        raise BadFileError("A data file is empty.", found=str(path), expected="UTF-8 text or JSONL")
    return _json_lines(path, text) if _is_json_object(text.lstrip().split("\n", 1)[0]) else [text]


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _json_lines(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadFileError("A JSONL file has a broken line.", found=f"{path}, line {number}: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise BadFileError(
                "A JSONL record has no text.", found=f"{path}, line {number}", expected='an object with a string "text"'
            )
        if record["text"].strip():
            documents.append(record["text"])
    if not documents:
        raise BadFileError("A JSONL file holds no text.", found=str(path))
    return documents


@dataclass(frozen=True)
class Windows:
    """Token windows cut from documents, none crossing a document's end.

    Attributes:
        ids: each a 1-D array; begins with the tokenizer's beginning id where it has one.
        tokens: ids in all windows that are predicted (all but each window's first).
    """

    ids: tuple[Ids, ...]

    @property
    def tokens(self) -> int:
        return sum(len(window) - 1 for window in self.ids)


def cut_windows(
    documents: Iterable[str], tokenizer: TextTokenizer, length: int, max_tokens: int | None = None
) -> Windows:
    """Consecutive windows of at most `length` ids from each document, until `max_tokens` are to be predicted.

    Every window starts with the beginning id, so each is a text of its own to the model; a document's tail
    shorter than MIN_WINDOW is dropped.

    Raises:
        RequestError: the text is too short to give one window.
    """
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    windows: list[Ids] = []
    total = 0
    for document in documents:
        if max_tokens is not None and total >= max_tokens:
            break
        ids = tokenizer.encode(document)
        step = length - len(head)
        for start in range(0, len(ids), step):
            piece = head + ids[start : start + step]
            if max_tokens is not None:
                piece = piece[: max_tokens - total + 1]
            if len(piece) < MIN_WINDOW:
                break
            windows.append(np.asarray(piece, dtype=np.int64))
            total += len(piece) - 1
    if not windows:
        raise RequestError(
            "The text is too short.", found=f"no document of {MIN_WINDOW} tokens or more", todo="give more text"
        )
    return Windows(tuple(windows))


def sample_windows(documents: Sequence[str], tokenizer: TextTokenizer, length: int, count: int, seed: int) -> Windows:
    """`count` windows for calibration: the documents shuffled by `seed`, full-length windows first.

    Fewer come back when the text does not hold that many; the caller says so to the user.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    cut = cut_windows(order, tokenizer, length, max_tokens=None if len(order) < 4 * count else 4 * count * length)
    ranked = sorted(cut.ids, key=len, reverse=True)[:count]
    return Windows(tuple(ranked))


def describe_data(paths: Sequence[Path], *, tokens: int, seed: int | None = None) -> dict[str, Any]:
    """What a manifest records of the text that was used."""
    files = [{"path": str(path), "sha256": sha256_file(path)} for path in paths]
    return {"files": files, "tokens": tokens, "seed": seed}
