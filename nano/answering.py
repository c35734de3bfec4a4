"""Questions put to any stage's model: the likelihood of a continuation, and greedy text up to a stop.

A continuation's ids are those that the whole text has beyond its prompt's, so that a token that straddles the border
counts as lm-evaluation-harness counts it. What does not fit the context is cut from the prompt's beginning.

Legend: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nano.divergence import log_softmax
from nano.errors import RequestError
from nano.lm import LanguageModel, Logits
from nano.tokens import TextTokenizer

Ids = npt.NDArray[np.int64]
Done = Callable[[int], None]
"""Told how many requests are finished."""
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


def likelihoods(model: LanguageModel, pairs: Sequence[tuple[str, str]], done: Done = lambda count: None) -> list[Likelihood]:  # noqa: E501  # fmt: skip
    """Log-probability of each (prompt, continuation).

    Raises:
        RequestError: a continuation is longer than the context, or nothing stands before it.
    """
    found = []
    for prompt, continuation in pairs:
        context, ids, cut = split(model, prompt, continuation)
        window = np.array([*context, *ids], np.int64)
        (rows_TV,) = model.logits([window[:-1]])
        found.append(_likelihood(rows_TV[len(context) - 1 :], ids, cut))
        done(1)
    return found


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


def fitted(ids: list[int], room: int, tokenizer: TextTokenizer) -> tuple[list[int], int]:
    """The end of a prompt's ids that fits, behind the beginning id where there is one; and how many were cut."""
    cut = len(ids) - room
    if cut <= 0:
        return ids, 0
    head = ids[:1] if tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id] else []
    if room <= len(head):
        raise RequestError(
            "The model's context is too short for this task.", found=f"room for {max(room, 0)} tokens of the prompt",
            todo="leave the task out, or lower its max_new_tokens",
        )  # fmt: skip
    return [*head, *ids[len(ids) - (room - len(head)) :]], cut


def _likelihood(rows_TV: Logits, ids: Sequence[int], cut: int) -> Likelihood:
    table_TV = log_softmax(rows_TV)
    picked = table_TV[np.arange(len(ids)), list(ids)]
    greedy = bool((rows_TV.argmax(-1) == np.array(ids)).all())
    return Likelihood(float(picked.sum()), len(ids), greedy, cut)


def continuations(
    model: LanguageModel,
    prompts: Sequence[str],
    stop: Sequence[str],
    max_new_tokens: int,
    done: Done = lambda count: None,
) -> list[Said]:
    """The greedy continuation of each prompt, up to a stop text, an end id or so many tokens.

    Raises:
        RequestError: a prompt is empty where the model has no beginning id, or the context is too short.
    """
    found = []
    for prompt in prompts:
        ids = model.tokenizer.prompt(prompt)
        if not ids:
            raise RequestError("A prompt is empty, and this model has no beginning id.")
        ids, cut = fitted(ids, model.context - max_new_tokens, model.tokenizer)
        new: list[int] = []
        text, logits = "", model.prefill(ids)
        while True:
            token = int(logits.argmax())
            if token in model.tokenizer.eos_ids:
                break
            new.append(token)
            text = new_text(model.tokenizer, ids, new)
            if len(new) == max_new_tokens or any(word in text for word in stop):
                break
            logits = model.decode(token)
        found.append(Said(before_stop(text, stop), len(new), cut))
        done(1)
    return found


def new_text(tokenizer: TextTokenizer, ids: Sequence[int], new: Sequence[int]) -> str:
    """The difference that new ids make to the decoded text; decoded alone they would lose a leading space."""
    tail = list(ids[-_TAIL:])
    return tokenizer.decode([*tail, *new])[len(tokenizer.decode(tail)) :]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """What stands before the first stop text."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]
