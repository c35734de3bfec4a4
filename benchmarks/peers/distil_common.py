"""What every distillation runner shares: its job, its meter, batches of the same text, and the plain loop.

A runner is started by benchmarks/distillation.py in the environment of one tool:

    python distil_with_TOOL.py --job JOB.json --report REPORT.json

Nothing of nanokit is imported here, so that it runs in any environment with torch and transformers.

Legend: B sequences of a batch, T tokens of a sequence, N positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

RISE = 0.05
"""Share of a run over which the learning rate rises; then it falls linearly to zero. nanokit's default."""


@dataclass(frozen=True)
class Job:
    """What a runner is to do.

    Attributes:
        teacher, student: HF folders, float32.
        text: an .npz of `ids` (all documents' one behind another) and `sizes`; documents begin with their first id.
        steps: how many; ignored where `seconds` or `passes` is given.
        seconds: CPU seconds of training after which it stops, or 0.
        batch: B.
        length: T, no document exceeds it.
        passes: over the text, or 0.
        rate: the peak learning rate.
        loss: "kd" (KL to the teacher alone) or "ce" (no teacher).
        save: a folder for the trained student, or "".
    """

    teacher: str
    student: str
    text: str
    steps: int
    seconds: float
    batch: int
    length: int
    rate: float
    loss: str = "kd"
    save: str = ""
    passes: int = 0

    def over(self, sequences: int) -> Job:
        """The job in steps, where it is in passes over so many sequences."""
        return replace(self, steps=-(-self.passes * sequences // self.batch)) if self.passes else self


def read_job(description: str | None) -> tuple[Job, Path]:
    """The job and where its report goes; one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Job(**json.loads(given.job.read_text(encoding="utf-8"))), given.report


def documents(job: Job) -> list[torch.Tensor]:
    """Token ids of each document of the job's text."""
    with np.load(job.text) as text:
        ids, sizes = text["ids"].astype(np.int64), text["sizes"]
    return list(torch.from_numpy(ids).split(sizes.tolist()))


def padded(chosen: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and bool (B, T) where a token is, right-padded to the longest, as collators do."""
    ids_BT = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    sizes_B1 = torch.tensor([len(ids) for ids in chosen]).unsqueeze(1)
    return ids_BT, torch.arange(ids_BT.shape[1]) < sizes_B1


def batches(texts: list[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Documents in a shuffled order, anew in each pass, without end."""
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(texts))
        for start in range(0, len(order) - size + 1, size):
            yield [texts[i] for i in order[start : start + size]]


def load_float(folder: str) -> Any:
    """The transformers model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


class Meter:
    """CPU seconds since the block began, and tokens, until it ends; writes the report."""

    def __init__(self, tool: str, report: Path) -> None:
        self.tool, self.report, self.tokens, self.steps = tool, report, 0, 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the training, from models in memory to the last step."""
        self.begun, wall = time.process_time(), time.perf_counter()
        yield
        unit = 1 if sys.platform == "darwin" else 1024
        found = {
            "version": f"{self.tool} {metadata.version(self.tool)}",
            "torch": torch.__version__,
            "cpu_seconds": self.spent,
            "wall_seconds": time.perf_counter() - wall,
            "tokens": self.tokens,
            "steps": self.steps,
            "peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }
        self.report.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    @property
    def spent(self) -> float:
        return time.process_time() - self.begun

    def count(self, tokens: int) -> None:
        """A step is done."""
        self.tokens += tokens
        self.steps += 1

    def done(self, job: Job) -> float:
        """Share of the run that is over."""
        return self.spent / job.seconds if job.seconds else self.steps / job.steps

    def rate(self, job: Job) -> float:
        """The learning rate now, as a share of its peak."""
        done = self.done(job)
        return max(1e-3, min(done / RISE if done < RISE else (1 - done) / (1 - RISE), 1.0))


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def train(job: Job, meter: Meter, parameters: list[torch.nn.Parameter], loss_of: Loss) -> None:
    """The loop that a user of torch writes: AdamW, clipping, the schedule above.

    Args:
        loss_of: the loss of padded ids (B, T) and of where a token is.
    """
    optimizer = torch.optim.AdamW(parameters, lr=job.rate, weight_decay=0.01)
    texts = documents(job)
    job, source = job.over(len(texts)), batches(texts, job.batch)
    with meter.measured():
        while meter.done(job) < 1:
            ids_BT, real_BT = padded(next(source))
            for group in optimizer.param_groups:
                group["lr"] = job.rate * meter.rate(job)
            loss_of(ids_BT, real_BT).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            meter.count(int(real_BT.sum()))
