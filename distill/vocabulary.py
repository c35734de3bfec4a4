"""Whether two tokenizers mean the same by their ids."""

from __future__ import annotations

import hashlib
import json

from nano.tokens import TextTokenizer


def vocabulary_hash(tokenizer: TextTokenizer) -> str:
    """Hex sha256 over all tokens with their ids, and the id that begins a text."""
    tokens = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps([tokens, tokenizer.bos_id]).encode()).hexdigest()


def vocabulary_difference(ours: TextTokenizer, theirs: TextTokenizer) -> str | None:
    """What differs between two vocabularies, in words for people; None where every id is the same token."""
    a, b = ({i: t for t, i in x.backend.get_vocab(with_added_tokens=True).items()} for x in (ours, theirs))
    differing = sorted(i for i in {*a, *b} if a.get(i) != b.get(i))
    if not differing:
        return None
    first = differing[0]
    tokens = " and ".join(repr(x[first]) if first in x else "no token" for x in (a, b))
    return f"{len(differing):,} of {len({*a, *b}):,} ids differ; the first is {first}: {tokens}"
