"""The cache-teacher stage: run the teacher over the training text once and keep its answers; and how they are read.

Legend: B rows, T positions, N positions that carry a loss, E hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill.cache import (
    ROWS_AT_ONCE,
    Cache,
    CacheFacts,
    check_facts,
    is_cache,
    row_windows,
    windows_of,
    write_cache_json,
)
from distill.data import Batch, Rows, make_batch
from distill.options import CacheOptions
from distill.records import smallest_record
from distill.state import catch_interrupt
from distill.text import load_text
from distill.vocabulary import vocabulary_hash
from nano.bits import Bytes
from nano.errors import NoSpaceError, RequestError
from nano.folder import check_output, human_bytes, is_no_space, require_space
from nano.manifest import fingerprint, library_versions
from nano.progress import say, track
from nano.shapes import ModelShape, read_config
from nano.sources import open_sources
from nano.tokens import load_tokenizer

if TYPE_CHECKING:
    from distill.sampling import SparseAnswers
    from distill.teacher import LiveTeacher

Windows = list[tuple[bytes, Bytes]]


@dataclass(frozen=True)
class Made:
    """What a run of the stage did.

    Attributes:
        cache: the cache as it is now.
        tokens: positions that were added.
        seconds: spent on them.
    """

    cache: Cache
    tokens: int
    seconds: float


def run_cache_teacher(
    teacher: Path, data: Sequence[str | Path], out: Path, options: CacheOptions, force: bool = False
) -> Made:
    """Keep a teacher's answers to all training text that is not in the cache yet.

    Args:
        teacher: a float HF folder.
        data: text, see `nano.sources`.
        out: the cache; one of the same teacher and options is gone on with, whether it was interrupted or complete.
        options: what is kept.
        force: replace what is there, once the new cache is complete.

    Raises:
        RequestError and its kinds: the request is wrong, or `out` is something else.
        NoSpaceError: the disk filled up; the shards before are kept.
        KeyboardInterrupt: the user stopped it; what was done is kept.
    """
    going_on = is_cache(out) and not force
    if not going_on:
        check_output(out, force=force, made_from=(teacher,))
    config = read_config(teacher)
    shape = ModelShape.from_hf(config)
    if options.length > shape.max_positions:
        raise RequestError(
            "The sequences are longer than the teacher's positions.",
            found=f"--length {options.length}", expected=f"at most {shape.max_positions}",
        )  # fmt: skip
    tokenizer = load_tokenizer(teacher, shape.vocab_size)
    if options.bytes_per_token < smallest_record(tokenizer.size):
        raise RequestError(
            "The records are too small for this vocabulary.",
            found=f"--bytes-per-token {options.bytes_per_token}, {tokenizer.size:,} ids",
            expected=f"at least {smallest_record(tokenizer.size)}",
        )
    from nano.torch_lm import check_float_folder

    check_float_folder(teacher)
    text = f"{', '.join(map(str, data))} (--length {options.length}, --held-out {options.held_out}, --seed {options.seed})"  # noqa: E501  # fmt: skip
    facts = CacheFacts(
        fingerprint(teacher), vocabulary_hash(tokenizer), tokenizer.size, options.form, options.bytes_per_token,
        options.temperature, options.dtype, options.seed,
    )  # fmt: skip
    earlier = Cache(out) if going_on else None
    if earlier is not None:
        problem = "The cache in --out is of another {}, so nothing can be added to it."
        check_facts(earlier, vars(facts), problem, "", "choose another --out, or --force to replace it")
        if text not in earlier.made["text"]:
            earlier.made = {**earlier.made, "text": [*earlier.made["text"], text]}
    rows = load_text(open_sources(data), tokenizer, options.run_options()).rows
    require_space(out, rows.tokens * options.bytes_per_token if earlier is None else 0)
    with _replacing(out, force):
        cache = earlier or _begin(out, facts, {"teacher": str(teacher), "text": [text]})
        return _fill(cache, rows, teacher, shape, options)


def _begin(out: Path, facts: CacheFacts, made: dict[str, Any]) -> Cache:
    out.mkdir(parents=True, exist_ok=True)
    about = {"command": ["nanokit", *sys.argv[1:]], "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    write_cache_json(out, facts, {**made, **about, "versions": library_versions()}, [])
    return Cache(out)


@contextlib.contextmanager
def _replacing(out: Path, force: bool) -> Iterator[None]:
    """What was at `out` comes back unless the block ends well; only where it is to be replaced."""
    if not (force and out.exists()):
        yield
        return
    old = out.absolute().with_name(out.absolute().name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(cache: Cache, rows: Rows, teacher: Path, shape: ModelShape, options: CacheOptions) -> Made:
    """Run the teacher over all rows with a window that the cache does not have."""
    wanted = _rows_to_run(cache, rows)
    if not len(wanted):
        say("the cache holds all of this text already")
        return Made(cache, 0, 0.0)
    import torch

    from distill.teacher import open_teacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    live = open_teacher(teacher, shape, options.dtype, device)
    pending: Windows = []
    began, before, waiting = time.monotonic(), cache.tokens, 0
    with catch_interrupt() as stop, track("cache", len(wanted), "sequences") as progress:
        for start in range(0, len(wanted), options.batch):
            batch = make_batch(rows, wanted[start : start + options.batch], device)
            fresh = _new_windows(cache, batch, live, pending)
            pending += fresh
            waiting += sum(len(records) for _key, records in fresh)
            done = cache.tokens + waiting - before
            progress.advance(batch.ids_BT.shape[0], f"{done / max(time.monotonic() - began, 1e-9):,.0f} tokens/s")
            if waiting >= options.shard_tokens or stop.requested or start + options.batch >= len(wanted):
                _commit(cache, pending)
                pending, waiting = [], 0
            if stop.requested and start + options.batch < len(wanted):
                say(f"stopped; {cache.tokens:,} tokens are kept in {cache.folder}: the same command goes on")
                raise KeyboardInterrupt
    return Made(cache, cache.tokens - before, time.monotonic() - began)


def _rows_to_run(cache: Cache, rows: Rows) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    wanted = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        for row in range(start, min(start + ROWS_AT_ONCE, len(rows))):
            if any(count and cache.find(key) is None for key, count in row_windows(rows, np.array([row]))):
                wanted.append(row)
    return np.array(wanted, np.int64)


def _new_windows(cache: Cache, batch: Batch, live: LiveTeacher, pending: Windows) -> Windows:
    """Records of a batch's windows that neither the cache nor what waits for it has."""
    known = {key for key, _records in pending}
    records, fresh, at = answer_records(cache.facts, batch, live), [], 0
    for key, count in batch_windows(batch):
        if count and key not in known and cache.find(key) is None:
            fresh.append((key, records[at : at + count]))
            known.add(key)
        at += count
    return fresh


def _commit(cache: Cache, pending: Windows) -> None:
    if not pending:
        return
    try:
        cache.add(pending)
    except OSError as error:
        if not is_no_space(error):
            raise
        raise NoSpaceError(
            "The disk is full; the cache could not grow.",
            found=f"{error}; {cache.tokens:,} tokens ({human_bytes(cache.size)}) are kept in {cache.folder}",
            todo="free some space, then run the same command: it goes on",
        ) from None


def batch_windows(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """(key, positions with a loss) of a batch's windows, in the order of its positions."""
    learn_BT = np.zeros(batch.ids_BT.shape, bool)
    learn_BT.reshape(-1)[batch.real_N.cpu().numpy()] = True
    return windows_of(batch.ids_BT.cpu().numpy(), batch.segment_BT.cpu().numpy(), learn_BT)


def answer_records(facts: CacheFacts, batch: Batch, live: LiveTeacher) -> Bytes:
    """(N, bytes): what is kept of a running teacher's answers to a batch."""
    import torch
    import torch.nn.functional as F

    from distill.losses import chunk_length
    from distill.sampling import draws_for, make_records

    draws = [draws_for(key, count, facts.seed) for key, count in batch_windows(batch)]
    draw_N2 = torch.from_numpy(np.concatenate(draws)).to(batch.ids_BT.device)
    with torch.inference_mode():
        answers = live.answers(batch)
        step = chunk_length(len(answers.head_VE))
        parts = [
            make_records(
                facts.layout,
                F.linear(answers.hidden_NE[at : at + step], answers.head_VE).float() / facts.temperature,
                draw_N2[at : at + step],
            )
            for at in range(0, len(draw_N2), step)
        ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that is read from disk; see `distill.teacher.Teacher`."""

    cache: Cache

    def answers(self, batch: Batch) -> SparseAnswers:
        """See `Teacher.answers`.

        Raises:
            BadFileError: the cache was damaged.
        """
        import torch

        from distill.records import unpack_records
        from distill.sampling import SparseAnswers

        places = [self.cache.find(key) for key, count in batch_windows(batch) if count]
        assert None not in places  # check_cache has looked for all of them
        records = np.concatenate([self.cache.read(at) for at in places if at is not None])
        device = batch.ids_BT.device
        ids, weights, entropies = unpack_records(self.cache.facts.layout, records)
        id_NK, weight_NK, entropy_N = (torch.from_numpy(part).to(device) for part in (ids, weights, entropies))
        return SparseAnswers(id_NK, weight_NK, entropy_N)
