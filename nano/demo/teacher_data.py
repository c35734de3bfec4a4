"""What the demo's teacher is trained by: its options, its tokenizer, and the batches of a run in order.

One page is one sequence `<s> page </s>`. Sequences of like length share a batch, so that little padding is computed.

Legend: B sequences of a batch, T positions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nano.demo.text import SEED, late_pages

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")
POOL_BATCHES = 8

Taken = tuple[int, int]
"""Batches of single passages and of pages."""


@dataclass(frozen=True)
class TeacherOptions:
    """How the teacher is built and trained.

    Attributes:
        seed: of text, weights and order.
        vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, context: its dimensions; a head is
            hidden_size / heads wide.
        steps: optimizer steps.
        batch_tokens: about this many positions a step.
        learning_rate: the peak; warmed up over `warmup` steps, at the end falling to a twentieth of it.
        warmup: steps.
        decay: share of the steps over which it falls.
        weight_decay: on matrices only.
        answer_weight: how much an id of an answer counts in the loss, against 1 for the others. Most ids are either
            trivial or a throw of the dice; the answers are what there is to learn.
        rope_theta: base of the rotary wavelengths.
        short_share: share of the steps, at the beginning, that see single passages instead of pages.
        probe_every: steps between measurements on questions of the calibration split; the run as it is then is kept in
            OUT.snapshot, from which `--resume` goes on.
        threads: CPU threads.
        heldout_pages, questions: how many unseen pages, and questions of each capability, the result is measured on.
    """

    seed: int = SEED
    vocab_size: int = 1216
    hidden_size: int = 192
    intermediate_size: int = 384
    layers: int = 5
    heads: int = 6
    kv_heads: int = 3
    context: int = 512
    steps: int = 9000
    batch_tokens: int = 1024
    learning_rate: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.5
    weight_decay: float = 0.1
    answer_weight: float = 5.0
    short_share: float = 0.55
    rope_theta: float = 10_000.0
    probe_every: int = 250
    threads: int = 1
    heldout_pages: int = 300
    questions: int = 60


def learning_rate(step: int, options: TeacherOptions) -> float:
    """Linear warm-up, the peak, then linearly to a twentieth of it over the last `decay` of the steps."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    left = (options.steps - step) / (options.steps * options.decay)
    return options.learning_rate * (0.05 + 0.95 * min(1.0, left))


def make_tokenizer(pages: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on some text: any input can be encoded, none is unknown.

    It never sees two digits together while it is trained, so numbers are taken digit by digit.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator((re.sub(r"\d", "", page) for page in pages), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A",
        pair=f"{SPECIAL[BOS]} $A {SPECIAL[BOS]} $B",
        special_tokens=[(SPECIAL[BOS], BOS)],
    )
    return tokenizer


def sequences(tokenizer: Tokenizer, pages: Sequence[str], context: int) -> list[list[int]]:
    """Ids of each page between its beginning and end ids, cut to the context."""
    encoded = tokenizer.encode_batch(list(pages), add_special_tokens=False)
    return [[BOS, *e.ids, EOS][:context] for e in encoded]


def batches(rows: list[list[int]], batch_tokens: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """Endless (B, T) batches of about `batch_tokens` positions; rows of like length together, PAD on the right."""
    while True:
        order = list(rows)
        rng.shuffle(order)
        pool: list[list[int]] = []
        for row in order:
            pool.append(row)
            if sum(map(len, pool)) >= POOL_BATCHES * batch_tokens:
                cut = list(_cut_pool(sorted(pool, key=len), batch_tokens))
                rng.shuffle(cut)
                yield from map(pad, cut)
                pool = []


def _cut_pool(pool: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for row in pool:
        batch.append(row)
        if len(batch) * len(row) >= batch_tokens:
            yield batch
            batch = []


def pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows as one (B, T) tensor, PAD on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


def passages_of(pages: Sequence[str]) -> list[str]:
    """Each passage as a page of its own."""
    return [passage.rstrip("\n") + "\n" for page in pages for passage in page.split("\n\n")]


def lessons(
    tokenizer: Tokenizer, pages: Sequence[str], options: TeacherOptions, taken: Taken = (0, 0)
) -> Iterator[tuple[torch.Tensor, Taken]]:
    """A batch for each step that is left, with how many of either kind were taken by then.

    Looking things up in a text is learned sooner where the text is short, so the first `short_share` of the run sees
    each passage alone. The rest has more of what is learned last, and of that every third page as a whole.

    Args:
        tokenizer, pages, options: what to cut into batches, and how.
        taken: how many batches of either kind an earlier run has taken.
    """
    early, late = passages_of(pages), late_pages(options.seed, len(pages))
    late = passages_of([page for number, page in enumerate(late) if number % 3]) + late[::3]
    streams = [
        islice(
            batches(sequences(tokenizer, texts, options.context), options.batch_tokens, random.Random(seed)), done, None
        )
        for seed, (texts, done) in enumerate(zip((early, late), taken, strict=True), options.seed)
    ]
    for step in range(sum(taken), options.steps):
        alone = step < options.steps * options.short_share
        taken = (taken[0] + alone, taken[1] + (not alone))
        yield next(streams[0 if alone else 1]), taken
