"""Questions put to any stage's model: the likelihood of a continuation, and greedy text up to a stop.

A continuation's ids are those that the whole text has beyond its prompt's, so that a token that straddles the border
counts as lm-evaluation-harness counts it. What does not fit the context is cut from the prompt's beginning.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nano.errors import RequestError
from nano.lm import BatchedModel, LanguageModel, Logits, common_length
from nano.tokens import TextTokenizer

Done = Callable[[int], None]
"""Told how many requests are finished."""
FAR_FEWER = 1.5
"""How many times fewer ids are worth the smaller batches."""
_TAIL = 8
"""Ids of a prompt that are decoded before an answer, so that its first token has its space."""


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation after its prompt.

    Attributes:
        total: log-probability, nats.
        tokens: how many ids it has.
        greedy: whether each of them was the most likely one.
        cut: ids of the prompt that did not fit.
    """

    total: float
    tokens: int
    greedy: bool
    cut: int = 0


@dataclass(frozen=True)
class Said:
    """What was generated after a prompt.

    Attributes:
        text: up to the stop text, which is no part of it.
        tokens: ids that were generated.
        cut: ids of the prompt that did not fit.
    """

    text: str
    tokens: int
    cut: int = 0


def likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[str, str]], done: Done = lambda count: None
) -> list[Likelihood]:
    """Log-probability of each (prompt, continuation).

    Raises:
        RequestError: a continuation is longer than the context, or nothing stands before it.
    """
    return likelihoods_of_ids(model, [split(model, prompt, continuation) for prompt, continuation in pairs], done)


def likelihoods_of_ids(
    model: LanguageModel, requests: Sequence[tuple[list[int], list[int], int]], done: Done = lambda count: None
) -> list[Likelihood]:
    """Log-probability of each (ids of a context, ids after it, ids that were cut).

    Requests that the same logits answer, such as choices of one token, cost one call.
    """
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for number, (context, ids, _cut) in enumerate(requests):
        alike.setdefault((tuple(context), tuple(ids[:-1])), []).append(number)
    keys = list(alike)
    found: dict[int, Likelihood] = {}
    asked = [requests[alike[key][0]][:2] for key in keys]
    for key_number, rows_TV in _batched(model, asked) if isinstance(model, BatchedModel) else _one_by_one(model, asked):
        numbers = alike[keys[key_number]]
        for number in numbers:
            _context, ids, cut = requests[number]
            found[number] = _likelihood(rows_TV, ids, cut)
        done(len(numbers))
    return [found[number] for number in range(len(requests))]


def _batched(model: BatchedModel, asked: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Logits]]:
    """All in one call, which computes what all contexts begin with once; or a call for each context, where that makes
    far fewer ids (long questions with many choices)."""
    if not asked:
        return
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _ids) in enumerate(asked):
        groups.setdefault(tuple(context), []).append(number)
    shared = common_length([context for context, _ids in asked])
    together = sum(len(context) - shared + len(ids) for context, ids in asked)
    apart = sum(map(len, groups)) + sum(len(ids) for _context, ids in asked)
    if together < FAR_FEWER * apart:
        yield from model.followed(asked)
        return
    for numbers in groups.values():
        for number, rows_TV in model.followed([asked[number] for number in numbers]):
            yield numbers[number], rows_TV


def _one_by_one(model: LanguageModel, asked: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Logits]]:
    held = _Held(model)
    for number, (context, ids) in enumerate(asked):
        first_1V = held.after(context)[None]
        yield number, np.concatenate([first_1V, held.take(ids[:-1])]) if len(ids) > 1 else first_1V


class _Held:
    """The ids that a model's caches hold, so that what the next text shares with them is not computed again."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.ids: list[int] = []
        self._context: list[int] = []
        self._row: Logits | None = None

    def after(self, context: list[int]) -> Logits:
        """Hold these ids; logits (V,) after the last."""
        if self._row is not None and context == self._context and self.model.rewind(len(context)):
            self.ids = list(context)
            return self._row
        same = min(common_length([self.ids, context]), len(context) - 1)
        kept = same > 0 and self.model.rewind(same)
        row = self.model.extend(context[same:]) if kept else self.model.prefill(context)
        # copied: some runtimes give a view of memory that the next call writes to
        self.ids, self._context, self._row = list(context), context, row.copy()
        return self._row

    def take(self, ids: Sequence[int]) -> Logits:
        """Hold more ids; logits (T, V) after each."""
        rows_TV = self.model.extend_all(ids)
        self.ids += ids
        return rows_TV

    def decode(self, token: int) -> Logits:
        """Hold one more id; logits (V,) after it."""
        self.ids.append(token)
        return self.model.decode(token)


def split(model: LanguageModel, prompt: str, continuation: str) -> tuple[list[int], list[int], int]:
    """(ids of the prompt, ids of the continuation, how many of the prompt's were cut so that both fit)."""
    tokenizer = model.tokenizer
    context = tokenizer.prompt(prompt)
    ids = tokenizer.prompt(prompt + continuation)[len(context) :] or tokenizer.encode(continuation)
    if not context or not ids:
        raise RequestError(
            "A choice's likelihood needs something before it and something in it.",
            found=f"prompt {prompt[-40:]!r}, choice {continuation[:40]!r}",
        )
    context, cut = fitted(context, model.context - len(ids), tokenizer)
    return context, ids, cut


def fitted(ids: list[int], room: int, tokenizer: TextTokenizer, *, cut_middle: bool = False) -> tuple[list[int], int]:
    """What fits of a prompt's ids, and how many were cut: behind the beginning id, or in the middle."""
    cut = len(ids) - room
    if cut <= 0:
        return ids, 0
    head = ids[:1] if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id] else []
    if room <= len(head):
        raise RequestError(
            "The model's context is too short for this task.", found=f"room for {max(room, 0)} tokens of the prompt",
            todo="leave the task out, or lower its max_new_tokens",
        )  # fmt: skip
    if cut_middle:
        head = ids[: room // 2]
    return [*head, *ids[len(ids) - (room - len(head)) :]], cut


def _likelihood(rows_TV: Logits, ids: Sequence[int], cut: int) -> Likelihood:
    top_T1 = rows_TV.max(-1, keepdims=True)
    sums_T = np.exp(rows_TV - top_T1).sum(-1, dtype=np.float64)
    picked_T = (rows_TV[np.arange(len(ids)), list(ids)] - top_T1[:, 0]).astype(np.float64) - np.log(sums_T)
    return Likelihood(float(picked_T.sum()), len(ids), bool((rows_TV.argmax(-1) == np.array(ids)).all()), cut)


def continuations(
    model: LanguageModel,
    prompts: Sequence[str],
    stop: Sequence[str],
    max_new_tokens: int,
    done: Done = lambda count: None,
    *,
    cut_middle: bool = False,
) -> list[Said]:
    """The greedy continuation of each prompt, up to a stop text, an end id or so many tokens.

    Raises:
        RequestError: a prompt is empty where the model has no beginning id, or the context is too short.
    """
    tokenizer = model.tokenizer
    room = model.context - max_new_tokens
    fits = [fitted(tokenizer.prompt(prompt), room, tokenizer, cut_middle=cut_middle) for prompt in prompts]
    if not all(ids for ids, _cut in fits):
        raise RequestError("A prompt is empty, and this model has no beginning id.")

    def ended(number: int, new: list[int]) -> bool:
        end = new[-1] in tokenizer.eos_ids or len(new) == max_new_tokens
        if not end and stop:
            text = new_text(tokenizer, fits[number][0], new)
            end = any(word in text for word in stop)
        if end:
            done(1)
        return end

    asked = [ids for ids, _cut in fits]
    found = greedy_ids(model, asked, max_new_tokens, ended)
    said = []
    for (ids, cut), new in zip(fits, found, strict=True):
        kept = new[:-1] if new[-1] in tokenizer.eos_ids else new
        said.append(Said(before_stop(new_text(tokenizer, ids, kept), stop), len(new), cut))
    return said


def greedy_ids(
    model: LanguageModel, prompts: Sequence[list[int]], limit: int, ended: Callable[[int, list[int]], bool]
) -> list[list[int]]:
    """The likeliest ids after each prompt's ids: `limit`, or until `ended` (prompt's number, its new ids so far)."""
    if isinstance(model, BatchedModel):
        return model.greedy(prompts, limit, ended)
    held = _Held(model)
    found = []
    for number, ids in enumerate(prompts):
        new = [int(held.after(ids).argmax())]
        while not ended(number, new) and len(new) < limit:
            new.append(int(held.decode(new[-1]).argmax()))
        found.append(new)
    return found


def new_text(tokenizer: TextTokenizer, ids: Sequence[int], new: Sequence[int]) -> str:
    """The difference that new ids make to the decoded text; decoded alone they would lose a leading space."""
    tail = list(ids[-_TAIL:])
    return tokenizer.decode([*tail, *new])[len(tokenizer.decode(tail)) :]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """What stands before the first stop text."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]
