"""Loss against the teacher's size: students of 25%, 50% and 75% of it, cut in one step, in rounds, or begun at random.

    python benchmarks/shrink.py --teacher DIR --data FILE [--shares 25 50 75] [--rounds 1 2] [--heal 0.1] [--steps 120]

All runs see the same text in the same order for the same number of steps; in rounds the steps are shared out, so the
last shape is trained for fewer. Seeds change the held-out documents, the order of the text and random starts. CPU
seconds are the process's own (user and system) over the whole stage. One line on stderr a run, one JSON object at the
end.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distill.options import DistillOptions
from distill.run import run_distill
from nano.errors import RequestError
from nano.shapes import ModelShape, read_config


def run_one(args: argparse.Namespace, share: float, start: str, rounds: int, heal: float, seed: int) -> dict[str, Any]:
    """One student: what it was cut to and its held-out figures; or why there is none."""
    parameters = round(ModelShape.from_hf(read_config(args.teacher)).num_parameters * share / 100)
    row: dict[str, Any] = {"share": share, "start": start, "rounds": rounds, "heal": heal, "seed": seed}
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        try:
            options = DistillOptions(
                steps=args.steps, batch=args.batch, length=args.length, start=start,  # type: ignore[arg-type]
                rounds=rounds, heal=heal, seed=seed, curves=False,
            )  # fmt: skip
            made = run_distill(args.teacher, str(parameters), [args.data], Path(place) / "student", options)
        except RequestError as error:
            return {**row, "refused": str(error).splitlines()[0]}
    found = made.results
    held_out = found["held_out"]
    cut = found["rounds"][-1]["held_out"]["cut"] if found["rounds"] else held_out["start"]
    return {
        **row,
        "parameters": found["parameters"],
        "on_the_way": [each["parameters"][1] for each in found["rounds"][:-1]],
        "teacher": held_out["teacher"]["cross_entropy"],
        "first_cut": held_out["start"]["cross_entropy"],
        "last_cut": cut["cross_entropy"],
        "trained": held_out["trained"]["cross_entropy"],
        "kl": held_out["trained"]["kl"],
        "top1": held_out["trained"]["top1"],
        "cpu_seconds": time.process_time() - begun,
    }  # fmt: skip


def main() -> None:
    """Run everything; print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[25, 50, 75], help="percent of the teacher's size")
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--heal", type=float, nargs="+", default=[0.1], help="steps before the last round, as a share")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-random", action="store_true", help="leave the random starts out")
    args = parser.parse_args()
    kinds = [("pruned", rounds, heal) for rounds in args.rounds for heal in (args.heal if rounds > 1 else [0.1])]
    kinds += [] if args.no_random else [("random", 1, 0.1)]
    rows = []
    for share in args.shares:
        for start, rounds, heal in kinds:
            for seed in args.seeds:
                rows.append(run_one(args, share, start, rounds, heal, seed))
                print(json.dumps(rows[-1]), file=sys.stderr)
    print(json.dumps({"steps": args.steps, "batch": args.batch, "length": args.length, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
