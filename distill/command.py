"""`nanokit distill`: check the request, run the stage, say what was made."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from distill.options import BEFORE, MEASURES, CacheOptions, DistillOptions, measure_of

DEFAULT = DistillOptions()
CACHE_DEFAULT = CacheOptions()


def distill(
    *,
    teacher: str,
    student: Annotated[tuple[str, ...], Parameter(negative=())],
    data: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())],
    out: Annotated[tuple[Path, ...], Parameter(negative=())],
    teacher_cache: Path | None = None,
    options: Annotated[DistillOptions, Parameter(name="*")] = DEFAULT,
    resume: Annotated[bool, Parameter(negative=())] = False,
    force: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Prune a teacher to a student's size, then train the student against the teacher's logits.

    The student is an ordinary Hugging Face folder. Ctrl-C keeps the state beside the output (OUT.checkpoint):
    the same command with --resume ends with the same weights as if nothing had happened.

    Parameters
    ----------
    teacher
        A float model: a folder, or a hub id (Llama, Qwen3, Gemma 3 text).
    student
        nano-1, nano-2, a number of parameters like 1.2B, 40M, 150k, or the folder of a model, whose weights are then
        trained on; of another tokenizer than the teacher's with --cross-tokenizer. Several (--student A --student B,
        each with its --out) are trained in one pass of the teacher.
    data
        Text to train on, several if wished: a file (plain text, JSONL, parquet), a folder of files, a dataset saved by
        `datasets`, or a hub id as ORG/NAME:SPLIT. Records hold "text" or a conversation's "messages", of which the
        answers are learnt. --data a.jsonl=0.7 b.jsonl=0.3 mixes by weight. A share is held out and measured.
    out
        The folder to make; one for each student.
    teacher_cache
        Train from the answers that nanokit cache-teacher kept; the teacher runs only to be cut and compared with.
    resume
        Go on with an interrupted run.
    force
        Replace the output folder if it exists, once the new one is complete; drop an interrupted run's state.
    json
        Print one JSON object on stdout; everything for people goes to stderr.
    """
    from distill.request import check_request
    from distill.run import run_distill_many
    from nano.errors import RequestError
    from nano.hub import resolve_model
    from nano.progress import emit_json

    if len(student) != len(out):
        raise RequestError(
            "Every student needs an output of its own.", found=f"{len(student)} --student, {len(out)} --out"
        )
    check_request(data, out, force=force, resume=resume)
    wanted = list(zip(student, out, strict=True))
    source = resolve_model(teacher)
    made = run_distill_many(source, wanted, data, options, force, resume=resume, teacher_cache=teacher_cache)
    records = [
        {"out": str(folder), "bytes": sum(entry["bytes"] for entry in manifest.files.values()),
         "shape": manifest.shape, **manifest.results}
        for folder, manifest in zip(out, made, strict=True)
    ]  # fmt: skip
    if json:
        emit_json(records[0] if len(records) == 1 else {"students": records})
    else:
        for record in records:
            _show(record)


def cache_teacher(
    teacher: str,
    *,
    data: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())],
    out: Path,
    options: Annotated[CacheOptions, Parameter(name="*")] = CACHE_DEFAULT,
    force: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Keep a teacher's answers to a text, so that any number of students can be trained without running it again.

    The same command goes on where it was interrupted, and adds more text to a cache that is complete.

    Parameters
    ----------
    teacher
        A float model: a folder, or a hub id (Llama, Qwen3, Gemma 3 text).
    data
        The text that students will be trained on, as for nanokit distill.
    out
        The cache's folder.
    force
        Replace what is there, once the new cache is complete.
    json
        Print one JSON object on stdout; everything for people goes to stderr.
    """
    from distill.caching import run_cache_teacher
    from nano.folder import human_bytes
    from nano.hub import resolve_model
    from nano.progress import emit_json, say

    made = run_cache_teacher(resolve_model(teacher), data, out, options, force)
    cache = made.cache
    if json:
        record = {"out": str(out), "tokens": cache.tokens, "bytes": cache.size, "bytes_per_token": cache.size / max(cache.tokens, 1)}  # noqa: E501  # fmt: skip
        emit_json({**record, "added_tokens": made.tokens, "seconds": made.seconds, "shards": len(cache.shards)})
        return
    say(
        f"{out}: {cache.tokens:,} tokens, {human_bytes(cache.size)}, "
        f"{cache.size / max(cache.tokens, 1):.1f} bytes a token"
    )


def _show(results: Mapping[str, Any]) -> None:
    """A table of a student's held-out figures."""
    from rich.table import Table

    from nano.folder import human_bytes
    from nano.progress import say, show

    held_out = results["held_out"]
    table = Table(title=f"{results['out']}: on {held_out['tokens']:,} held-out tokens")
    apart = measure_of(held_out["trained"])
    for heading in ("", "cross-entropy", "perplexity", MEASURES[apart], "same top token"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, key in (("teacher", "teacher"), ("student", "start"), ("student trained", "trained")):
        row = held_out[key]
        figures = (f"{row['cross_entropy']:.4f}", f"{row['perplexity']:.3f}")
        compared = (f"{row[apart]:.4f}", f"{row['top1']:.1%}") if apart in row else ("", "")
        table.add_row(name if key != "start" else f"student {BEFORE[results['start']]}", *figures, *compared)
    show(table)
    parts = f"{results['parameters']:,} of the teacher's {results['teacher_parameters']:,} parameters"
    speed = f"{results['train_seconds']:.0f} s ({results['tokens_per_second']:,.0f}/s)"
    say(f"{parts}, {human_bytes(results['bytes'])}; trained on {results['train_tokens']:,} tokens in {speed}")


if __name__ == "__main__":  # torchrun -m distill.command
    from nano.cli import main

    main(["distill", *sys.argv[1:]])
