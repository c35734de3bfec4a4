"""nanokit's whole stage (`nanokit distill`): cut or begin at random, train, write; CPU seconds of all of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from distil_common import Meter

import distill.work  # noqa: F401  (imported here, so that imports do not count, as for the others)
from distill.options import DistillOptions
from distill.run import run_distill


def main() -> None:
    """Run the stage, with hardly any held-out text of its own: all are measured on other text afterwards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", choices=["pruned", "random"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    options = DistillOptions(steps=given.steps, start=given.start, held_out=1e-3, eval_tokens=64, curves=False)
    meter = Meter("nanokit", given.report)
    with meter.measured():
        made = run_distill(given.teacher, given.student, [given.data], given.out, options)
        meter.tokens, meter.steps = int(made.results["train_tokens"]), given.steps


if __name__ == "__main__":
    main()
