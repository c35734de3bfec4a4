"""A student from a cached teacher beside one from the live teacher: held-out loss, CPU seconds, bytes a token.

    python benchmarks/teacher_cache.py --teacher DIR --data FILE [--student 150k] [--steps 120] [--bytes 60 24 14]

Each size of record is tried as an unbiased sample and as top-k, all runs with the same text, order and start. CPU
seconds are the process's own (user and system) of the steps alone: a run less one of no steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from distill.caching import run_cache_teacher
from distill.options import CacheOptions, DistillOptions
from distill.run import run_distill


def timed_run(args: argparse.Namespace, out: Path, steps: int, cache: Path | None) -> dict[str, Any]:
    """Held-out figures of a run, and its CPU seconds."""
    options = DistillOptions(steps=steps, batch=args.batch, length=args.length, kd=args.kd)
    begun = time.process_time()
    manifest = run_distill(args.teacher, args.student, [args.data], out, options, teacher_cache=cache)
    seconds = time.process_time() - begun
    return {**manifest.results["held_out"]["trained"], "cpu_seconds": seconds, "tokens": manifest.results["train_tokens"]}  # noqa: E501  # fmt: skip


def main() -> None:
    """Run everything; print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--student", default="150k")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--kd", type=float, default=1.0)
    parser.add_argument("--bytes", type=int, nargs="+", default=[60, 24, 14])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        base = timed_run(args, home / "base", 0, None)["cpu_seconds"]
        live = timed_run(args, home / "live", args.steps, None)
        rows.append({"teacher": "live", **live})
        for size in args.bytes:
            for form in ("sampled", "top"):
                name = f"{form}-{size}"
                begun = time.process_time()
                kept = CacheOptions(form=form, bytes_per_token=size, length=args.length)
                made = run_cache_teacher(args.teacher, [args.data], home / name, kept)
                cost = {"bytes_per_token": made.cache.size / made.cache.tokens, "cache_cpu_seconds": time.process_time() - begun}  # noqa: E501  # fmt: skip
                rows.append({"teacher": name, **cost, **timed_run(args, home / f"student-{name}", args.steps, home / name)})  # noqa: E501  # fmt: skip
    for row in rows:
        row["cpu_seconds"] -= base
        row["loss_over_live"] = row["cross_entropy"] / live["cross_entropy"] - 1
    print(json.dumps({"steps": args.steps, "student": args.student, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
