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
from nano.demo import train_teacher
from nano.demo.teacher_data import (
    BOS,
    EOS,
    PAD,
    TeacherOptions,
    batches,
    learning_rate,
    lessons,
    make_tokenizer,
    pad,
    sequences,
)
from nano.demo.text import documents
from nano.demo.train_teacher import Run, in_answers, main, make_model, run_training, surprise
from nano.errors import OutputExistsError, RequestError
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
    questions=2,
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


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_training(tmp_path / "whole", SMALL)
    save = train_teacher._save_run

    def save_and_die(folder: Path, run: Run, *rest: object) -> None:
        save(folder, run, *rest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train_teacher, "_save_run", save_and_die)
        run_training(tmp_path / "cut", SMALL)
    assert open_model(tmp_path / "cut.snapshot").vocab_size == 320, "what was reached can be used"
    record = run_training(tmp_path / "cut", SMALL, resume=True)
    assert record["parts"] == [(0, 30), (15, 30)]
    assert record["tokens"] == whole["tokens"]
    assert [entry["step"] for entry in record["history"]] == [15, 30]
    assert not (tmp_path / "cut.snapshot").exists()
    with Checkpoint(tmp_path / "whole") as a, Checkpoint(tmp_path / "cut") as b:
        assert all(torch.equal(a.tensor(name), b.tensor(name)) for name in a.names())


def test_there_must_be_a_run_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no run to go on with"):
        run_training(tmp_path / "none", SMALL, resume=True)


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


def test_answers_are_found_from_their_word_to_the_end_of_the_line() -> None:
    text = "He said: no.\nQuestion: Who?\nAnswer: the old fox\nQuestion: Why?\nAnswer: 17, 3"
    tokenizer = make_tokenizer(documents(7, 100), 320)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    start, end = (tokenizer.encode(word, add_special_tokens=False).ids[-1] for word in ("Answer", "\n"))
    inside = in_answers(torch.tensor([ids]), start, end)[0].tolist()
    found = tokenizer.decode([i for i, chosen in zip(ids[1:], inside, strict=True) if chosen])
    assert found == ": the old fox\n: 17, 3"


def test_numbers_are_taken_digit_by_digit() -> None:
    tokenizer = make_tokenizer(documents(7, 300), 600)
    pieces = tokenizer.encode("What is 47 + 112?", add_special_tokens=False).tokens
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("47112")


def test_passages_come_before_pages() -> None:
    options = replace(SMALL, steps=40, short_share=0.5)
    pages = [page for page in documents(7, 400) if page.count("\n\n") > 3]
    tokenizer = make_tokenizer(pages[:100], 320)
    seen = list(lessons(tokenizer, pages, options))
    assert seen[-1][1] == (20, 20)
    texts = ["".join(tokenizer.decode(row) for row in ids.tolist()) for ids, _ in seen]
    assert not any("\n\n" in text for text in texts[:20])
    assert any("\n\n" in text for text in texts[20:])
    sums = [sum(text.count("in two steps?") for text in part) for part in (texts[:20], texts[20:])]
    assert sums[1] > 1.3 * sums[0], "more of what is learned last"


def test_lessons_go_on_where_they_stopped() -> None:
    options = replace(SMALL, steps=10, short_share=0.6)
    pages = documents(7, 200)
    tokenizer = make_tokenizer(pages[:100], 320)
    whole = list(lessons(tokenizer, pages, options))
    rest = list(lessons(tokenizer, pages, options, whole[4][1]))
    assert len(rest) == 5
    assert all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(whole[5:], rest, strict=True))


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


def test_learning_rate_rises_stays_and_falls_to_a_twentieth() -> None:
    options = TeacherOptions(steps=100, warmup=10, learning_rate=1.0, decay=0.4)
    rates = [learning_rate(step, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == [1.0] * 52
    assert rates[80] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[100] == pytest.approx(0.05)
    assert rates[60:] == sorted(rates[60:], reverse=True)
