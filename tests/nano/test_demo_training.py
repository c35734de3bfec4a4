"""The training script: the same run twice gives the same weights, its loss is the textbook's, bad input is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from nano.checkpoint import Checkpoint
from nano.demo.text import documents
from nano.demo.train_teacher import (
    BOS,
    EOS,
    PAD,
    TeacherOptions,
    batches,
    in_answers,
    learning_rate,
    lessons,
    main,
    make_model,
    make_tokenizer,
    pad,
    run_training,
    sequences,
    surprise,
)
from nano.errors import OutputExistsError
from nano.lm import open_model

SMALL = TeacherOptions(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=64,
    layers=1,
    heads=2,
    kv_heads=1,
    steps=30,
    batch_tokens=512,
    warmup=1,
    learning_rate=3e-3,
    probe_every=15,
    heldout_pages=20,
    questions=10,
)


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_can_be_repeated_and_its_output_opened(tmp_path: Path) -> None:
    records = [run_training(tmp_path / name, SMALL) for name in ("a", "b")]
    with Checkpoint(tmp_path / "a") as a, Checkpoint(tmp_path / "b") as b:
        assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.names())
    assert records[0]["heldout_perplexity"] == records[1]["heldout_perplexity"]
    assert records[0]["heldout_perplexity"] < 320  # a few steps already beat an even guess over the vocabulary
    assert [entry["step"] for entry in records[0]["history"]] == [15, 30]
    assert json.loads((tmp_path / "a" / "training.json").read_text()).keys() == records[0].keys()
    model = open_model(tmp_path / "a")
    assert (model.vocab_size, model.context) == (320, 512)


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    with pytest.raises(OutputExistsError):
        run_training(tmp_path, SMALL)
    with pytest.raises(SystemExit) as left:
        main(out=tmp_path, options=SMALL)
    assert left.value.code == OutputExistsError.exit_status
    assert "--force" in capsys.readouterr().err
    assert kept.read_text() == "mine"


def test_loss_is_the_mean_surprise_of_each_row_alone() -> None:
    tokenizer = make_tokenizer(documents(7, 100), 320)
    rows = sequences(tokenizer, documents(7, 3), 64)
    rows[1] = rows[1][:40]
    model = make_model(SMALL).eval()
    alone = 0.0
    for row in rows:
        log_p = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        alone -= sum(log_p[i, row[i + 1]].item() for i in range(len(row) - 1))
    assert surprise(model, pad(rows)).sum().item() == pytest.approx(alone, rel=1e-5)


def test_answers_are_found_from_their_word_to_the_full_stop() -> None:
    text = "2 + 3 = 5. He said: no.\nQuestion: Who?\nAnswer: the old fox.\nQuestion: Why?"
    tokenizer = make_tokenizer(documents(7, 100), 320)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    starts = [tokenizer.encode(word, add_special_tokens=False).ids[-1] for word in ("Answer", " =")]
    inside = in_answers(torch.tensor([ids]), starts, tokenizer.token_to_id("."))[0].tolist()
    found = tokenizer.decode([i for i, chosen in zip(ids[1:], inside, strict=True) if chosen])
    assert found == " 5.: the old fox."


def test_passages_come_before_pages() -> None:
    options = replace(SMALL, steps=10, short_share=0.6)
    pages = [page for page in documents(7, 400) if page.count("\n\n") > 3]
    tokenizer = make_tokenizer(pages[:100], 320)
    seen = list(lessons(tokenizer, pages, options))
    assert len(seen) == 10
    breaks = ["\n\n" in tokenizer.decode(row) for ids in seen[:6] for row in ids.tolist()]
    assert not any(breaks)
    assert all("\n\n" in tokenizer.decode(row) for ids in seen[6:] for row in ids.tolist())


def test_sequences_begin_end_and_fit() -> None:
    tokenizer = make_tokenizer(documents(7, 100), 320)
    pages = documents(7, 40)
    for page, row in zip(pages, sequences(tokenizer, pages, 512), strict=True):
        assert row[0] == BOS
        assert len(row) <= 512
        assert (row[-1] == EOS) == (len(tokenizer.encode(page, add_special_tokens=False).ids) <= 510)
        assert page.startswith(tokenizer.decode(row))


def test_batches_use_each_row_once_before_any_twice() -> None:
    rows = [[BOS, 10 + i, *[5] * (i % 30), EOS] for i in range(300)]
    stream = batches(rows, 200, random.Random(0))
    seen = [row[1].item() for batch in islice(stream, 20) for row in batch]
    assert len(seen) == len(set(seen))
    batch = next(stream)
    assert (batch[:, 0] == BOS).all()
    assert len(batch) > 1
    assert (batch == PAD).float().mean() < 0.3


def test_learning_rate_rises_then_falls_to_a_twentieth() -> None:
    options = TeacherOptions(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate(step, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[100] == pytest.approx(0.05)
    assert rates[10:] == sorted(rates[10:], reverse=True)
