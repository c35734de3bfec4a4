"""Which tokens of two vocabularies are the same text.

A token is compared by the bytes that it stands for: "Ġthe" of a byte-level tokenizer, "▁the" of a SentencePiece one
and " the" are one text, and so are "<0x0A>", "Ċ" and a line break. Special tokens are compared by name, apart from
text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distill.vocabulary import vocabulary_hash
from nano.errors import RequestError, UnsupportedError
from nano.tokens import TextTokenizer

Ids = npt.NDArray[np.int64]
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Matched:
    """Tokens that student and teacher both have, and the rest.

    Attributes:
        ours_M, theirs_M: ids of the same text in the student's and the teacher's vocabulary.
        our_rest, their_rest: the ids of each that the other has no token for.
    """

    ours_M: Ids
    theirs_M: Ids
    our_rest: Ids
    their_rest: Ids

    @property
    def share(self) -> float:
        """Of the teacher's vocabulary, what the student has too."""
        return len(self.theirs_M) / (len(self.theirs_M) + len(self.their_rest))


def match_vocabularies(ours: TextTokenizer, theirs: TextTokenizer) -> Matched:
    """The tokens that two tokenizers share, by the bytes that they stand for."""
    mine, other = token_texts(ours), token_texts(theirs)
    both = sorted((mine[text], other[text]) for text in mine.keys() & other.keys())
    ours_M, theirs_M = (np.array([pair[side] for pair in both], np.int64) for side in (0, 1))
    rest = (np.setdiff1d(np.arange(t.size), ids) for t, ids in ((ours, ours_M), (theirs, theirs_M)))
    return Matched(ours_M, theirs_M, *rest)


def token_texts(tokenizer: TextTokenizer) -> dict[tuple[str, bytes], int]:
    """Id by ("text" or "special", bytes); of two tokens of one text, the one that is no single byte's stand-in."""
    backend = tokenizer.backend
    added = backend.get_added_tokens_decoder()
    kinds = _decoders(json.loads(backend.to_str()).get("decoder"))
    found: dict[tuple[str, bytes], int] = {}
    stand_ins: dict[tuple[str, bytes], int] = {}
    for token, number in sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        if number in added:
            found.setdefault(("special" if added[number].special else "text", token.encode()), number)
            continue
        byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
        into = stand_ins if byte else found
        into.setdefault(("text", bytes([int(byte[1], 16)]) if byte else _bytes(token, kinds)), number)
    return {**stand_ins, **found}


def _decoders(decoder: dict[str, Any] | None) -> set[str]:
    """The kinds of a tokenizer's decoder, whatever it is nested in."""
    if decoder is None:
        return set()
    inner = [_decoders(each) for each in decoder.get("decoders", ())]
    return {str(decoder["type"])}.union(*inner)


def _bytes(token: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds:
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode()
    return (token.replace("▁", " ") if kinds & {"Metaspace", "Replace"} else token).encode()


def _byte_level() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


_BYTE_OF = _byte_level()


def check_different(teacher: TextTokenizer, students: list[TextTokenizer]) -> None:
    """What a loss across tokenizers needs of them.

    Raises:
        RequestError: the tokenizers are the same.
        UnsupportedError: the students differ among each other.
    """
    hashes = {vocabulary_hash(each) for each in students}
    if vocabulary_hash(teacher) in hashes:
        raise RequestError(
            "Teacher and student have one tokenizer, so their tokens can be compared themselves.",
            found="--cross-tokenizer",
            todo="leave it out",
        )
    if len(hashes) > 1:
        raise UnsupportedError(
            "The students of one pass have different tokenizers.",
            found=f"{len(hashes)} tokenizers",
            expected="one: the text is packed in the students' tokens",
            todo="train them one by one",
        )
