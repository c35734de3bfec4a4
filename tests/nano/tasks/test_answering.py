"""Likelihoods and greedy answers against transformers alone, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nano.errors import RequestError
from nano.families import FAMILIES
from nano.lm import BatchedModel, LanguageModel, Logits, open_model
from nano.tasks.answering import before_stop, continuations, fitted, likelihoods, split

SHOTS = "Tom saw a dog. The dog was big. Tom ran to the dog. "
"""Longer than what is worth sharing, whatever the tokenizer."""
PAIRS = [
    *((SHOTS + "Lily had a red", choice) for choice in (" ball", " ball and a hat", " sky that", " b")),
    *((SHOTS + "Mom said", choice) for choice in (' "hi".', " no")),
    ("Once upon a", " time"),
]


class Single:
    """A torch model without its batches, as a runtime's is."""

    def __init__(self, model: Any, rewinds: bool = True) -> None:
        self.model, self.tokenizer, self.context, self.rewinds = model, model.tokenizer, model.context, rewinds
        self.taken = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        self.taken += len(ids)
        row: Logits = self.model.prefill(ids)
        return row

    def extend(self, ids: Sequence[int]) -> Logits:
        self.taken += len(ids)
        row: Logits = self.model.extend(ids)
        return row

    decode = lambda self, token: self.extend([token])  # noqa: E731

    def extend_all(self, ids: Sequence[int]) -> Logits:
        self.taken += len(ids)
        rows: Logits = self.model.extend_all(ids)
        return rows

    def rewind(self, length: int) -> bool:
        done: bool = self.rewinds and self.model.rewind(length)
        return done


def reference(folder: Path, model: LanguageModel, prompt: str, continuation: str) -> tuple[float, int, bool]:
    """Sum of log-probabilities of what the whole text has beyond the prompt, from transformers' own logits."""
    peer = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float64)
    begin, whole = model.tokenizer.prompt(prompt), model.tokenizer.prompt(prompt + continuation)
    with torch.no_grad():
        table = peer(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(begin), len(whole))
    total = sum(float(table[place - 1, whole[place]]) for place in places)
    return total, len(places), all(int(table[place - 1].argmax()) == whole[place] for place in places)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batched", [True, False])
def test_likelihoods_are_those_of_transformers(family: str, batched: bool, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    model: Any = open_model(folder)
    assert isinstance(model, BatchedModel)
    found = likelihoods(model if batched else Single(model), PAIRS)
    for pair, one in zip(PAIRS, found, strict=True):
        total, tokens, greedy = reference(folder, model, *pair)
        assert (one.tokens, one.greedy, one.cut) == (tokens, greedy, 0)
        assert one.total == pytest.approx(total, abs=2e-4)


def test_a_real_models_continuation_is_greedy(stories: Path) -> None:
    model = open_model(stories)
    (one, other) = likelihoods(model, [("Once upon a", " time"), ("Once upon a", " dog")])
    assert one.greedy
    assert not other.greedy
    assert one.total > other.total + 5


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    model: Any = open_model(folder)
    peer = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    prompts = [SHOTS + "Lily", SHOTS + "The big dog ran", "x", SHOTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([model.tokenizer.prompt(prompt)])
        new = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        text: str = model.tokenizer.continued(prompt, new[0, ids.shape[1] :].tolist())
        expected.append(text[len(prompt) :])
    for asked in (model, Single(model), Single(model, rewinds=False)):
        assert [one.text for one in continuations(asked, prompts, (), 12)] == expected
    stop = expected[0][3:5]
    found = continuations(model, prompts, (stop,), 12)
    assert [one.text for one in found] == [before_stop(text, [stop]) for text in expected]
    assert found[0].tokens < 12


def test_a_real_models_answers_in_a_batch_and_alone(stories: Path) -> None:
    model: Any = open_model(stories)
    prompts = ["Once upon a time, there was a little girl named", "Tom had a red", "The sun was", "One day, a big dog"]
    together = continuations(model, prompts, (".",), 40)
    alone = [continuations(Single(model), [prompt], (".",), 40)[0] for prompt in prompts]
    assert together == alone
    assert together[0].text == " Lily"[: len(together[0].text)] or together[0].text.startswith(" Lily")
    assert all("." not in one.text for one in together)


def test_what_texts_share_is_computed_once(tiny_model: Callable[..., Path]) -> None:
    model: Any = open_model(tiny_model("llama"))
    single = Single(model)
    likelihoods(single, PAIRS[:4])
    context, first, _cut = split(model, *PAIRS[0])
    every = sum(len(split(model, *pair)[1]) - 1 for pair in PAIRS[1:4])
    assert single.taken == len(context) + len(first) - 1 + every
    before = single.taken
    likelihoods(single, PAIRS[:1])
    assert single.taken - before == len(context) + len(first) - 1, "what is held is not known from before"


def test_choices_of_one_token_cost_one_call(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = open_model(tiny_model("llama"))
    asked: list[int] = []
    followed = model.followed
    monkeypatch.setattr(model, "followed", lambda requests: (asked.append(len(requests)), followed(requests))[1])
    found = likelihoods(model, [("Is it a", choice) for choice in "bcd"])
    assert asked == [1]
    logits = model.logits([np.array(model.tokenizer.prompt("Is it a"))])[0][-1].astype(np.float64)
    table = logits - np.log(np.exp(logits).sum())
    expected = [table[model.tokenizer.encode(choice)[0]] for choice in "bcd"]
    np.testing.assert_allclose([one.total for one in found], expected, atol=1e-4)


def test_a_prompt_that_does_not_fit_loses_its_beginning(tiny_model: Callable[..., Path]) -> None:
    model = open_model(tiny_model("llama"))
    context, ids, cut = split(model, "x" * 400, " yz")
    assert len(context) + len(ids) == model.context == 256
    assert (context[0], cut) == (1, 401 - 253)
    (one,) = likelihoods(model, [("x" * 400, " yz")])
    assert one.cut == cut
    (said,) = continuations(model, ["x" * 400], (), 6)
    assert (said.tokens, said.cut) == (6, 401 - 250)
    with pytest.raises(RequestError, match="context is too short"):
        fitted([1, 5, 6, 7], 1, model.tokenizer)
    with pytest.raises(RequestError, match="something in it"):
        likelihoods(model, [("x", "")])


def test_before_stop() -> None:
    assert before_stop(" 12\nQ: 3", ["\n", "Q:"]) == " 12"
    assert before_stop("abc", ["x"]) == "abc"
