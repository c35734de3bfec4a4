"""Tokens kept by content: made once, whole or not there, the same whatever the threads; answers learnt, prompts not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distill.tokenized as tokenized
from distill.data import NO_TARGET, make_batch
from distill.options import DistillOptions
from distill.text import load_text
from distill.tokenized import Shard, tokenize_sources
from nano.corpus import read_documents
from nano.errors import BadFileError, RequestError
from nano.sources import open_sources
from nano.tokens import TextTokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(stories: Path) -> TextTokenizer:
    return load_tokenizer(stories, 512)


def made(path: Path, tokenizer: TextTokenizer, cache: Path) -> list[Shard]:
    return tokenize_sources(open_sources([path]), tokenizer, cache)[0]


def refuse(*_: Any) -> Any:
    raise AssertionError("the text was tokenised again")


def test_tokens_are_the_tokenizers_own(tinystories: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    shards = made(tinystories, tokenizer, tmp_path)
    documents = [d for d in read_documents([tinystories]) if isinstance(d, str)]
    lengths = np.concatenate([s.documents["length"] for s in shards])
    assert len(lengths) == len(documents)
    assert shards[0].ids.dtype == np.uint16
    assert isinstance(shards[0].ids, np.memmap)
    start = 0
    for text, length in zip(documents[:50], lengths[:50], strict=True):
        assert shards[0].ids[start : start + length].tolist() == tokenizer.encode(text)
        start += length


def test_a_second_run_tokenises_nothing(
    tinystories: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tinystories, tokenizer, tmp_path)
    moved = tmp_path / "elsewhere"
    shutil.copyfile(tinystories, moved)
    monkeypatch.setattr(tokenized, "_encode", refuse)
    second = made(moved, tokenizer, tmp_path)
    assert (first[0].ids == second[0].ids).all()
    with moved.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(AssertionError, match="again"):
        made(moved, tokenizer, tmp_path)
    assert len(list(tmp_path.glob("tokens-*"))) == 1


def test_shards_and_threads_change_nothing(
    tinystories: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tinystories, tokenizer, tmp_path)
    monkeypatch.setattr(tokenized, "SHARD_TOKENS", 50_000)
    monkeypatch.setattr(tokenized, "BATCH_CHARACTERS", 10_000)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    many = made(tinystories, tokenizer, tmp_path)
    assert len(many) > 3
    assert (np.concatenate([s.ids for s in many]) == np.concatenate([s.ids for s in whole])).all()
    assert (np.concatenate([s.documents for s in many]) == np.concatenate([s.documents for s in whole])).all()
    for shard in many:
        assert shard.documents["length"].sum() == len(shard.ids)


def test_damage_is_seen_and_mended(
    tinystories: Path, tokenizer: TextTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = np.array(made(tinystories, tokenizer, tmp_path)[0].ids)
    file = next(tmp_path.glob("tokens-*/*-ids.npy"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert (made(tinystories, tokenizer, tmp_path)[0].ids == before).all()
    assert "damaged" in capsys.readouterr().err
    next(tmp_path.glob("tokens-*/*-documents.npy")).unlink()
    assert (made(tinystories, tokenizer, tmp_path)[0].ids == before).all()


def test_a_killed_run_leaves_nothing_in_the_way(tinystories: Path, stories: Path, tmp_path: Path) -> None:
    """SIGKILL while shards are written; the next run of the same text clears what is left and ends well."""
    cache = tmp_path / "cache"
    program = f"""
import sys, time
from pathlib import Path
import distill.tokenized as t
from nano.sources import open_sources
from nano.tokens import load_tokenizer
t.SHARD_TOKENS, t.BATCH_CHARACTERS = 20_000, 10_000
save = t._save_shard
t._save_shard = lambda *a: (save(*a), time.sleep({{pause}}))
t.tokenize_sources(open_sources([{str(tinystories)!r}]), load_tokenizer(Path({str(stories)!r})), Path({str(cache)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program.format(pause=30)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while time.monotonic() < end and not list(cache.glob("*.partial/000000-documents.npy")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [p.suffix for p in cache.iterdir()] == [".partial"]
    subprocess.run([sys.executable, "-c", program.format(pause=0)], check=True, capture_output=True)
    assert len(list(cache.iterdir())) == 1
    assert not list(cache.glob("*.partial"))


def test_broken_text_leaves_nothing(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "text").write_text('{"text": "fine"}\n' * 50 + '{"text": \n')
    with pytest.raises(BadFileError, match="line 51"):
        made(tmp_path / "text", tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_said(tinystories: Path, stories: Path, tmp_path: Path) -> None:
    """The kernel's own refusal: no file may grow beyond 64 KiB."""
    program = f"""
import resource, signal, sys
from pathlib import Path
from distill.tokenized import tokenize_sources
from nano.sources import open_sources
from nano.tokens import load_tokenizer
from nano.errors import NoSpaceError
tokenizer = load_tokenizer(Path({str(stories)!r}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    tokenize_sources(open_sources([{str(tinystories)!r}]), tokenizer, Path({str(tmp_path / "cache")!r}))
except NoSpaceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "The disk is full" in done.stdout, done.stderr
    assert "NANOKIT_CACHE" in done.stdout
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tinystories: Path, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="NANOKIT_CACHE"):
        made(tinystories, tokenizer, tmp_path / "cache")


def talks(path: Path, count: int = 60) -> Path:
    """Conversations of one or two turns."""
    lines = []
    for i in range(count):
        turns = [
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]
        lines.append(json.dumps({"messages": turns * (1 + i % 2)}))
    path.write_text("\n".join(lines))
    return path


def test_only_answers_are_learnt(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_model("qwen3"), folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(folder)
    options = DistillOptions(length=160, batch=4, held_out=0.2)
    text = load_text(open_sources([talks(tmp_path / "talks")]), tokenizer, options, tmp_path / "cache")
    batch = make_batch(text.rows, slice(None))
    assert not batch.whole
    assert (batch.target_N != NO_TARGET).all()
    flat, segment = batch.ids_BT.flatten(), batch.segment_BT.flatten()
    runs: dict[tuple[int, int], list[int]] = {}
    for at, target in zip(batch.real_N.tolist(), batch.target_N.tolist(), strict=True):
        assert flat[at + 1] == target
        runs.setdefault((at // 160, int(segment[at])), []).append(target)
    said = {tokenizer.backend.decode(ids, skip_special_tokens=False) for ids in runs.values()}
    assert said <= {f"It is {2 * i}.</s>" * (1 + i % 2) for i in range(60)}
    assert len(runs) == len(said) > 30
    first = flat[: int((segment[:160] == 0).sum())].tolist()
    shown = tokenizer.backend.decode(first, skip_special_tokens=False)
    assert shown.startswith("<s>user\nWhat is ")  # the template's own beginning, no second one in front
    assert not shown.startswith("<s><s>")


def test_a_conversation_too_long_is_cut_and_one_without_room_left_out(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_model("qwen3"), folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    path = talks(tmp_path / "talks")
    long = [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "never seen"}]
    partly = [{"role": "user", "content": "short"}, {"role": "assistant", "content": "y" * 300}]
    with path.open("a") as file:
        file.write("\n" + json.dumps({"messages": long}) + "\n" + json.dumps({"messages": partly}))
    options = DistillOptions(length=160, batch=4, held_out=0.0001)
    text = load_text(open_sources([path]), load_tokenizer(folder), options, tmp_path / "cache")
    said = capsys.readouterr().err
    assert "2 conversations are longer than --length 160" in said
    ids = np.asarray(text.rows.ids_RT[:])
    assert not (ids == load_tokenizer(folder).encode("x")[0]).sum() > 100
    assert (ids == load_tokenizer(folder).encode("y")[0]).sum() > 100


def test_conversations_need_a_template(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template") as error:
        made(talks(tmp_path / "talks"), tokenizer, tmp_path / "cache")
    assert "line 1" in str(error.value)
