"""What tests of several rooms do alike: read what a run wrote, write the text of one, compare models and pages."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nano.checkpoint import Checkpoint
from nano.corpus import read_documents

if TYPE_CHECKING:
    from quantize.student import Student


def some_stories(folder: Path, tinystories: Path, count: int) -> Path:
    """The first real stories, as JSONL."""
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in read_documents([tinystories])[:count]))
    return path


def some_sentences(folder: Path) -> Path:
    """Sentences of few words and many numbers, as JSONL: enough to calibrate a tiny model of bytes."""
    path = folder / "text.jsonl"
    sentence = "The quick brown fox number {} jumps over {} lazy dogs, and then it sleeps for {} hours. "
    path.write_text("\n".join(json.dumps({"text": sentence.format(i, i * 7, i % 9) * 3}) for i in range(40)))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.names()}


def same_bits(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same."""
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a student's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def load_by_transformers(folder: Path) -> Any:
    """A model folder as a user would open it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(str(folder)).eval()


def student_logits(student: Student, ids_BT: torch.Tensor) -> torch.Tensor:
    """What a student in the middle of quantization says."""
    from quantize.whole import whole_model

    with torch.no_grad():
        found: torch.Tensor = whole_model(student)(ids_BT).logits
    return found


def relative(found: Any, expected: Any) -> float:
    """The norm of the difference over that of what was expected; of numpy's arrays or torch's tensors."""
    return float(((found - expected) ** 2).sum() ** 0.5 / (expected**2).sum() ** 0.5)


class Balanced(HTMLParser):
    """Checks that tags close in order, and gathers what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.loads.append(tag)
        self.loads += [value or name for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operation gives while the block runs."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out
