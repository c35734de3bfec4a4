"""Train the demo's teacher: `python -m nano.demo.train_teacher --out DIR`.

The weights that ship in `nano/demo/teacher/` were made by this file and by nothing else: a byte-level BPE
tokenizer trained on the demo's own text, then a small Llama trained from random weights on the same text with
AdamW and a cosine schedule. Everything is drawn from one seed; `training.json` in the output records the text's
hash, the settings and the measured quality, so that weights and text can be seen to belong together.

One page is one sequence `<s> page </s>`. Pages of like length share a batch, so that little padding is computed.

Legend: B sequences of a batch, T positions, V vocabulary, D hidden width, F feed-forward width.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from nano.demo.text import SEED, Question, documents, questions, text_hash
from nano.errors import NanokitError
from nano.folder import check_output, staged_folder
from nano.manifest import library_versions
from nano.progress import say, track
from nano.quiet import hush

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")
RECORD = "training.json"
TOKENIZER_PAGES = 4000
POOL_BATCHES = 8
IGNORE = -100


@dataclass(frozen=True)
class TeacherOptions:
    """How the teacher is built and trained.

    Attributes:
        seed: of text, weights and order.
        vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads, context: its dimensions; a head is
            hidden_size / heads wide.
        steps: optimizer steps.
        batch_tokens: about this many positions a step.
        learning_rate: the peak; warmed up over `warmup` steps, then a cosine to a twentieth of it.
        warmup: steps.
        weight_decay: on matrices only.
        answer_weight: how much an id of an answer counts in the loss, against 1 for the others. Most ids are either
            trivial or a throw of the dice; the answers are what there is to learn.
        short_share: share of the steps, at the beginning, that see single passages instead of pages.
        probe_every: steps between measurements on questions of the calibration split.
        threads: CPU threads.
        heldout_pages, questions: how much unseen text the result is measured on.
    """

    seed: int = SEED
    vocab_size: int = 960
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    context: int = 512
    steps: int = 3000
    batch_tokens: int = 1024
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    answer_weight: float = 4.0
    short_share: float = 0.4
    probe_every: int = 250
    threads: int = 1
    heldout_pages: int = 300
    questions: int = 400


def make_tokenizer(pages: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on some text: any input can be encoded, none is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(pages, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A",
        pair=f"{SPECIAL[BOS]} $A {SPECIAL[BOS]} $B",
        special_tokens=[(SPECIAL[BOS], BOS)],
    )
    return tokenizer


def make_model(options: TeacherOptions) -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.hidden_size // options.heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=round(options.hidden_size**-0.5, 4),
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


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


def surprise(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each id given those before it, (B, T - 1); 0 where it is padding."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    target_BT = ids_BT[:, 1:].masked_fill(ids_BT[:, 1:] == PAD, IGNORE)
    flat = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view(target_BT.shape)


def in_answers(ids_BT: torch.Tensor, starts: Sequence[int], end: int) -> torch.Tensor:
    """Which of the predicted ids, (B, T - 1), stand between a starting id ("Answer", "=") and the full stop."""
    at = torch.arange(1, ids_BT.shape[1] + 1)
    started = torch.where(torch.isin(ids_BT, torch.tensor(starts)), at, 0).cummax(1).values
    ended = torch.where(ids_BT == end, at, 0).cummax(1).values
    return (started > ended)[:, :-1]


def _id_of(tokenizer: Tokenizer, word: str) -> int:
    """The last id of a word: its only one, where the vocabulary is large enough to hold it."""
    return int(tokenizer.encode(word, add_special_tokens=False).ids[-1])


def predicted(ids_BT: torch.Tensor) -> int:
    """How many ids of a batch are predicted."""
    return int((ids_BT[:, 1:] != PAD).sum())


def learning_rate(step: int, options: TeacherOptions) -> float:
    """Linear warm-up, then a cosine from the peak to a twentieth of it."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: Any, tokenizer: Tokenizer, pages: Sequence[str], options: TeacherOptions
) -> tuple[int, list[dict[str, Any]]]:
    """Train in place: single passages first, whole pages after.

    Returns:
        How many tokens were predicted on the way, and the quality measured every `probe_every` steps.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
    )
    starts, end = [_id_of(tokenizer, "Answer"), _id_of(tokenizer, " =")], _id_of(tokenizer, ".")
    asked = questions(options.seed, 80, "calibration")
    total, recent, history = 0, 0.0, []
    with track("train the teacher", options.steps, "steps") as progress:
        for step, ids_BT in enumerate(lessons(tokenizer, pages, options)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options)
            weight_BT = 1 + (options.answer_weight - 1) * in_answers(ids_BT, starts, end)
            weight_BT = weight_BT * (ids_BT[:, 1:] != PAD)
            surprise_BT = surprise(model.train(), ids_BT)
            ((surprise_BT * weight_BT).sum() / weight_BT.sum()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            count = predicted(ids_BT)
            total += count
            loss = surprise_BT.detach().sum().item() / count
            recent = loss if step == 0 else 0.98 * recent + 0.02 * loss
            progress.advance(note=f"loss {recent:.4f}")
            if (step + 1) % options.probe_every == 0:
                right = answers_right(model, tokenizer, asked)
                history.append({"step": step + 1, "loss": round(recent, 4), "answers_right": right})
                say(f"step {step + 1}: loss {recent:.4f}, right " + _shares(right))
    return total, history


def lessons(tokenizer: Tokenizer, pages: Sequence[str], options: TeacherOptions) -> Iterator[torch.Tensor]:
    """The batches of all steps. Looking things up in a text is learned sooner where the text is short, so the
    first `short_share` of the steps see each passage alone."""
    rng = random.Random(options.seed)
    first = round(options.steps * options.short_share)
    passages = [passage for page in pages for passage in page.split("\n\n")]
    short, long = (sequences(tokenizer, texts, options.context) for texts in (passages, pages))
    yield from islice(batches(short, options.batch_tokens, rng), first)
    yield from islice(batches(long, options.batch_tokens, rng), options.steps - first)


def _shares(right: dict[str, float]) -> str:
    return ", ".join(f"{group} {share:.0%}" for group, share in right.items())


@torch.inference_mode()
def perplexity(model: Any, rows: Sequence[list[int]]) -> float:
    """exp of the mean cross-entropy over all ids but each row's first."""
    model.eval()
    total, count = 0.0, 0
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), 8):
        ids_BT = pad(rows[start : start + 8])
        total += surprise(model, ids_BT).sum().item()
        count += predicted(ids_BT)
    return math.exp(total / count)


@torch.inference_mode()
def answers_right(model: Any, tokenizer: Tokenizer, asked: Sequence[Question]) -> dict[str, float]:
    """Share of questions answered exactly, by greedy continuation, for each capability."""
    right: dict[str, list[bool]] = {}
    model.eval()
    for question in asked:
        prompt = [BOS, *tokenizer.encode(question.prompt, add_special_tokens=False).ids]
        answer = tokenizer.encode(f" {question.answer}.", add_special_tokens=False).ids
        # Greedy decoding gives the answer exactly when every id of it is the most likely one after those before it.
        logits_TV = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        chosen = logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist()
        right.setdefault(question.group, []).append(chosen == answer)
    return {group: sum(found) / len(found) for group, found in sorted(right.items())}


def save_teacher(folder: Path, model: Any, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Write the HF folder: bfloat16 weights, configs, tokenizer, and the record of how it was trained."""
    model.generation_config.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def run_training(out: Path, options: TeacherOptions, *, force: bool = False) -> dict[str, Any]:
    """Make text and tokenizer, train, measure, write `out`; gives the record written as training.json.

    Raises:
        OutputExistsError: `out` exists and `force` is not set; found before any work.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_output(out, force=force)
    if options.threads:
        torch.set_num_threads(options.threads)
    begun = time.monotonic()
    # More pages than the steps can take at 100 tokens a page: none is seen again before all were seen.
    pages = documents(options.seed, min(40_000, max(500, options.steps * options.batch_tokens // 100)))
    tokenizer = make_tokenizer(pages[:TOKENIZER_PAGES], options.vocab_size)
    heldout = sequences(tokenizer, documents(options.seed, options.heldout_pages, "heldout"), options.context)
    model = make_model(options)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pages):,} pages")
    tokens, history = train(model, tokenizer, pages, options)
    seconds = time.monotonic() - begun
    rounded = model.to(torch.bfloat16).float()
    record = {
        "options": asdict(options),
        "text_sha256": text_hash(options.seed),
        "tokens": tokens,
        "seconds": round(seconds),
        "heldout_perplexity": round(perplexity(rounded, heldout), 4),
        "heldout_answers_right": answers_right(rounded, tokenizer, questions(options.seed, options.questions)),
        "history": history,
        "versions": library_versions(),
    }
    with staged_folder(out, force=force) as folder:
        save_teacher(folder, model, tokenizer, record)
    return record


def main(
    *, out: Path, options: Annotated[TeacherOptions | None, cyclopts.Parameter(name="*")] = None, force: bool = False
) -> None:
    """Train the demo's teacher on the demo's text.

    Args:
        out: folder to write: config.json, model.safetensors, tokenizer, training.json.
        options: dimensions and training.
        force: replace `out` if it exists.
    """
    try:
        record = run_training(out, options or TeacherOptions(), force=force)
    except NanokitError as error:
        print(f"train_teacher: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    hush()
    cyclopts.run(main)
