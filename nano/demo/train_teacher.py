"""Train the demo's teacher: `python -m nano.demo.train_teacher --out DIR`.

The weights that ship in `nano/demo/teacher/` were made by this file and by nothing else: a byte-level BPE
tokenizer trained on the demo's own text, then a small Llama trained from random weights on the same text with
AdamW at a constant rate that falls at the end. Everything is drawn from one seed; `training.json` in the output
records the text's hash, the settings and the measured quality, so that weights and text can be seen to belong together.
A killed run goes on with `--resume`, also with other `--steps`; the record tells its parts.

Legend: B sequences of a batch, T positions, V vocabulary, D hidden width, F feed-forward width.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from nano.demo.passage import ANSWER
from nano.demo.teacher_data import (
    BOS,
    EOS,
    PAD,
    SPECIAL,
    Taken,
    TeacherOptions,
    learning_rate,
    lessons,
    make_tokenizer,
    pad,
    sequences,
)
from nano.demo.text import Question, documents, questions, text_hash
from nano.errors import NanokitError, RequestError
from nano.folder import check_output, staged_folder
from nano.manifest import library_versions
from nano.progress import say, track
from nano.quiet import hush

RECORD, STATE = "training.json", "state.safetensors"
PAGES, TOKENIZER_PAGES = 25_000, 4000
IGNORE = -100


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
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        initializer_range=round(options.hidden_size**-0.5, 4),
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def surprise(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each id given those before it, (B, T - 1); 0 where it is padding."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    target_BT = ids_BT[:, 1:].masked_fill(ids_BT[:, 1:] == PAD, IGNORE)
    flat = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return flat.view(target_BT.shape)


def in_answers(ids_BT: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Which of the predicted ids, (B, T - 1), stand between the starting id ("Answer") and the end of its line."""
    at = torch.arange(1, ids_BT.shape[1] + 1)
    started = torch.where(ids_BT == start, at, 0).cummax(1).values
    ended = torch.where(ids_BT == end, at, 0).cummax(1).values
    return (started > ended)[:, :-1]


def _id_of(tokenizer: Tokenizer, word: str) -> int:
    """The last id of a word: its only one, where the vocabulary is large enough to hold it."""
    return int(tokenizer.encode(word, add_special_tokens=False).ids[-1])


def predicted(ids_BT: torch.Tensor) -> int:
    """How many ids of a batch are predicted."""
    return int((ids_BT[:, 1:] != PAD).sum())


@dataclass
class Run:
    """A run under way: all that is needed to go on.

    Attributes:
        model, optimizer: as they are.
        taken: batches of single passages and of pages so far; together the steps.
        tokens: how many were predicted.
        seconds: of the clock, of earlier parts of the run.
        history: the quality measured every `probe_every` steps.
        parts: the first step and the planned steps of each part of the run, where it was resumed.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    taken: Taken = (0, 0)
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)


def train(
    run: Run, tokenizer: Tokenizer, pages: Sequence[str], options: TeacherOptions, keep: Callable[[], None]
) -> None:
    """Train in place, to the last step.

    Args:
        run: what is trained and how far it is.
        tokenizer, pages, options: on what, and how.
        keep: called at every probe.
    """
    model, optimizer = run.model, run.optimizer
    start, end = _id_of(tokenizer, ANSWER.rstrip(":")), _id_of(tokenizer, "\n")
    asked = questions(options.seed, 20, "calibration")
    recent, first = 0.0, sum(run.taken)
    run.parts.append((first, options.steps))
    with track("train the teacher", options.steps - first, "steps") as progress:
        for ids_BT, taken in lessons(tokenizer, pages, options, run.taken):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(sum(run.taken), options)
            weight_BT = 1 + (options.answer_weight - 1) * in_answers(ids_BT, start, end)
            weight_BT = weight_BT * (ids_BT[:, 1:] != PAD)
            surprise_BT = surprise(model.train(), ids_BT)
            ((surprise_BT * weight_BT).sum() / weight_BT.sum()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            count = predicted(ids_BT)
            run.tokens, run.taken = run.tokens + count, taken
            loss = surprise_BT.detach().sum().item() / count
            recent = 0.98 * recent + 0.02 * loss if recent else loss
            progress.advance(note=f"loss {recent:.4f}")
            step = sum(taken)
            if step % options.probe_every == 0:
                right = answers_right(model, tokenizer, asked)
                run.history.append({"step": step, "loss": round(recent, 4), "answers_right": right})
                say(f"step {step}: loss {recent:.4f}, right " + _shares(right))
                keep()


def _optimizer(model: Any, options: TeacherOptions) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
    )


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
        answer = tokenizer.encode(f" {question.answer}\n", add_special_tokens=False).ids
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


def _save_run(folder: Path, run: Run, tokenizer: Tokenizer, seconds: float) -> None:
    """The teacher as it would ship now, and beside it what goes on from here."""
    state = {f"model.{name}": value for name, value in run.model.named_parameters()}
    for number, (_, moments) in enumerate(sorted(run.optimizer.state_dict()["state"].items())):
        state |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
    with staged_folder(folder, force=True) as staged:
        kept = {
            "taken": run.taken,
            "tokens": run.tokens,
            "seconds": seconds,
            "history": run.history,
            "parts": run.parts,
        }
        save_teacher(staged, copy.deepcopy(run.model), tokenizer, kept)
        save_file({name: value.detach().contiguous() for name, value in state.items()}, staged / STATE)


def _load_run(folder: Path, run: Run) -> None:
    """Take up what `_save_run` wrote."""
    if not (folder / STATE).is_file():
        raise RequestError("There is no run to go on with.", found=f"no {folder / STATE}", todo="leave --resume out")
    state = load_file(folder / STATE)
    for name, value in run.model.named_parameters():
        value.data.copy_(state[f"model.{name}"])
    whole = run.optimizer.state_dict()
    for name, value in state.items():
        kind, number, moment = name.split(".", 2)
        if kind == "optimizer":
            whole["state"].setdefault(int(number), {})[moment] = value
    run.optimizer.load_state_dict(whole)
    kept = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    run.taken, run.tokens, run.seconds = tuple(kept["taken"]), kept["tokens"], kept["seconds"]
    run.history, run.parts = kept["history"], [tuple(part) for part in kept["parts"]]


def run_training(out: Path, options: TeacherOptions, *, force: bool = False, resume: bool = False) -> dict[str, Any]:
    """Make text and tokenizer, train, measure, write `out`; gives the record written as training.json.

    Raises:
        OutputExistsError: `out` exists and `force` is not set; found before any work.
        RequestError: `resume` is set and there is no snapshot.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_output(out, force=force)
    if options.threads:
        torch.set_num_threads(options.threads)
    begun = time.monotonic()
    # More pages than the steps can take at 100 tokens a page: none is seen again before all were seen.
    pages = documents(options.seed, min(PAGES, max(500, options.steps * options.batch_tokens // 100)))
    snapshot = out.with_name(out.name + ".snapshot")
    tokenizer = make_tokenizer(pages[:TOKENIZER_PAGES], options.vocab_size)
    heldout = sequences(tokenizer, documents(options.seed, options.heldout_pages, "heldout"), options.context)
    model = make_model(options)
    run = Run(model, _optimizer(model, options))
    if resume:
        _load_run(snapshot, run)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pages):,} pages")

    def seconds() -> float:
        return run.seconds + time.monotonic() - begun

    train(run, tokenizer, pages, options, lambda: _save_run(snapshot, run, tokenizer, seconds()))
    took = seconds()
    rounded = model.to(torch.bfloat16).float()
    record = {
        "options": asdict(options),
        "text_sha256": text_hash(options.seed),
        "tokens": run.tokens,
        "seconds": round(took),
        "parts": run.parts,
        "heldout_perplexity": round(perplexity(rounded, heldout), 4),
        "heldout_answers_right": answers_right(rounded, tokenizer, questions(options.seed, options.questions)),
        "history": run.history,
        "versions": library_versions(),
    }
    with staged_folder(out, force=force) as folder:
        save_teacher(folder, model, tokenizer, record)
    shutil.rmtree(snapshot, ignore_errors=True)
    return record


def main(
    *,
    out: Path,
    options: Annotated[TeacherOptions | None, cyclopts.Parameter(name="*")] = None,
    force: bool = False,
    resume: bool = False,
) -> None:
    """Train the demo's teacher on the demo's text.

    Args:
        out: folder to write: config.json, model.safetensors, tokenizer, training.json.
        options: dimensions and training.
        force: replace `out` if it exists.
        resume: go on from OUT.snapshot; other --steps begin or end the falling of the learning rate sooner or later.
    """
    try:
        record = run_training(out, options or TeacherOptions(), force=force, resume=resume)
    except NanokitError as error:
        print(f"train_teacher: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    hush()
    cyclopts.run(main)
