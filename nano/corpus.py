"""Text for training, calibration and evaluation: documents from files, windows of token ids from documents.

What may be given is said in `nano.sources`, the formats in `nano.documents`. A conversation is rendered with the
tokenizer's chat template (`nano.chat`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nano.chat import render_chat
from nano.documents import Document
from nano.errors import RequestError
from nano.sources import Source, open_sources
from nano.tokens import TextTokenizer

Ids = npt.NDArray[np.int64]
MIN_WINDOW = 8


def read_documents(paths: Sequence[str | Path]) -> list[Document]:
    """All documents of some sources, in order; each a text or a conversation.

    Raises:
        BadFileError: a file is missing, empty, binary, or a record holds no text.
        RequestError: no file was given.
    """
    return [document for source in open_sources(paths) for part in source.parts for document in part.read()]


def encode_document(document: Document, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """(ids that begin a window of it, its own ids): a conversation's template writes its own beginning."""
    if isinstance(document, str):
        return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]), tokenizer.encode(document)
    texts = render_chat(document, tokenizer.template, tokenizer.special_tokens())
    return [], tokenizer.encode(texts[-1].text)


@dataclass(frozen=True)
class Windows:
    """Token windows cut from documents, none crossing a document's end.

    Attributes:
        ids: each a 1-D array; begins with the tokenizer's beginning id where it has one.
        documents: which of the documents each was cut from, counted from 0; empty where that is not kept.
        tokens: ids in all windows that are predicted (all but each window's first).
    """

    ids: tuple[Ids, ...]
    documents: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(len(window) - 1 for window in self.ids)


def cut_windows(
    documents: Iterable[Document], tokenizer: TextTokenizer, length: int, max_tokens: int | None = None
) -> Windows:
    """Consecutive windows of at most `length` ids from each document, until `max_tokens` are to be predicted.

    Every window of a text starts with the beginning id, so each is a text of its own to the model; a document's
    tail shorter than MIN_WINDOW is dropped.

    Raises:
        RequestError: the text is too short to give one window.
    """
    windows: list[Ids] = []
    origins: list[int] = []
    total = 0
    for number, document in enumerate(documents):
        if max_tokens is not None and total >= max_tokens:
            break
        head, ids = encode_document(document, tokenizer)
        step = length - len(head)
        for start in range(0, len(ids), step):
            piece = head + ids[start : start + step]
            if max_tokens is not None:
                piece = piece[: max_tokens - total + 1]
            if len(piece) < MIN_WINDOW:
                break
            windows.append(np.asarray(piece, dtype=np.int64))
            origins.append(number)
            total += len(piece) - 1
    if not windows:
        raise RequestError(
            "The text is too short.", found=f"no document of {MIN_WINDOW} tokens or more", todo="give more text"
        )
    return Windows(tuple(windows), tuple(origins))


def sample_windows(
    documents: Sequence[Document], tokenizer: TextTokenizer, length: int, count: int, seed: int
) -> Windows:
    """`count` windows for calibration: the documents shuffled by `seed`, full-length windows first.

    Fewer come back when the text does not hold that many; the caller says so to the user.
    """
    order = list(documents)
    random.Random(seed).shuffle(order)
    cut = cut_windows(order, tokenizer, length, max_tokens=None if len(order) < 4 * count else 4 * count * length)
    ranked = sorted(cut.ids, key=len, reverse=True)[:count]
    return Windows(tuple(ranked))


def describe_data(paths: Sequence[str | Path], *, tokens: int, seed: int | None = None) -> dict[str, Any]:
    """What a manifest records of the text that was used."""
    return describe_sources(open_sources(paths) if paths else (), tokens=tokens, seed=seed)


def describe_sources(sources: Sequence[Source], *, tokens: int, seed: int | None = None) -> dict[str, Any]:
    """The same of sources that are open."""
    files: list[dict[str, Any]] = []
    for source in sources:
        weight = {} if source.weight is None else {"weight": source.weight}
        files.append({"path": source.name, "sha256": source.fingerprint(), **weight})
    return {"files": files, "tokens": tokens, "seed": seed}
