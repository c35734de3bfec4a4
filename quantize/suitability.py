"""Whether calibration text is of the kind that a model was made for: asked of the model itself.

A model is calibrated about text like its training's: its loss there is about the entropy that it predicts, because
it knows how sure it may be. On another language, another format or noise it is sure of things that do not come, and
the loss is far above. The difference, its surprise in nats a token, needs no reference text. Measured on stories260K
(nats a token; loss, entropy, surprise):

    its own kind of stories   1.88  1.47   0.40      English prose (WikiText)  5.31  2.20   3.10
    the same as raw JSON      2.80  1.65   1.15      French                    6.71  2.09   4.62
    the same inside HTML      2.86  1.58   1.28      Python                    6.27  2.36   3.91
    Shakespeare               4.54  2.08   2.46      random characters        13.56  2.84  10.72

Noise that a larger model has learnt to expect shows in bits a byte instead: letters counted one by one take English
to about 4 (Shannon 1951), models to 1 or less.

What it costs: stories260K by gptq from 8,192 tokens of stories, the same as raw JSON, WikiText, French, random
characters and Chinese has a KL of 0.0471, 0.0497, 0.069, 0.109, 0.142 and 0.191 to its float original on held-out
stories: 1, 1.06, 1.5, 2.3, 3.0 and 4.1 times as much.

Legend: S windows, T positions, P predicted positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from nano.corpus import Windows
from nano.progress import warn
from nano.tokens import TextTokenizer
from quantize.fisher import Output
from quantize.layers import advance, embed, load_layer
from quantize.student import Student

MOST_SURPRISE = 0.8
"""Nats a token, between a model's own kind of text (0.11 to 0.40 by sample) and that kind in a wrong format (1.15)."""

MOST_BITS = 3.0
"""Bits a byte that no text takes which the model knows."""

MOST_UNKNOWN = 0.1
"""Share of single bytes and unknown ids among tokens; stories260K: its own kind of text 0.01, Shakespeare 0.06 (line
breaks), Python 0.15, Chinese 0.91."""

WINDOW, MOST_TOKENS, OPERATIONS = 128, 2048, 2e12
"""Tokens of a window, of all, and operations to spend: seconds, beside the minutes of a solve."""

SLAB = 8192
"""Rows of the head at once."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
STRUCTURE = re.compile(r'[{,]\s*"\w[\w ]{0,30}"\s*:|</\w+>')
"""A JSON key or a closing tag."""

MOST_STRUCTURED = 0.25
"""Share of windows with one. Stories as raw JSON lines 0.47, inside HTML 0.5; stories, WikiText and Shakespeare 0."""


@dataclass(frozen=True)
class Suitability:
    """What was found.

    Attributes:
        loss: the float model's, nats a token.
        entropy: what it expects its loss to be.
        bits_per_byte: the loss by bytes of text.
        bytes_per_token: of text, as this tokenizer cuts it.
        unknown: share of tokens that are single bytes of byte fallback or unknown.
        structured: share of windows with a JSON key or a tag in them.
        template_tokens: share of windows with a special token of the chat template; None where there is no template.
        tokens: that it was measured on.
    """

    loss: float
    entropy: float
    bits_per_byte: float
    bytes_per_token: float
    unknown: float
    structured: float
    template_tokens: float | None
    tokens: int

    @property
    def surprise(self) -> float:
        """Loss beyond what the model expects, nats a token."""
        return self.loss - self.entropy

    def warnings(self) -> list[str]:
        """What the user should know, each with what was measured; empty for text that suits the model."""
        found = []
        if self.surprise > MOST_SURPRISE or self.bits_per_byte > MOST_BITS:
            found.append(
                f"the float model does not know text like this: its loss is {self.loss:.2f} nats a token where it "
                f"expects {self.entropy:.2f} ({self.bits_per_byte:.1f} bits a byte), {self._cause()}; give --data "
                f"like the model's use"
            )
        elif self.unknown > MOST_UNKNOWN:
            found.append(
                f"{self.unknown:.0%} of the calibration tokens are single bytes or unknown: the tokenizer does not "
                f"know this script or format; give --data in a language of the model"
            )
        if self.template_tokens == 0:
            found.append(
                "the model has a chat template and none of its special tokens is in the calibration text: the layers "
                'are fitted without ever seeing a turn begin or end; give conversations (JSONL with "messages")'
            )
        return found

    def _cause(self) -> str:
        """The likely cause, and what it cost where that was measured (see the module's docstring)."""
        if self.unknown > MOST_UNKNOWN:
            return (
                f"{self.unknown:.0%} of the tokens are bytes or unknown: the tokenizer lacks its characters. Fitting "
                f"to another script left 4.1 times the divergence from the float model where it was measured"
            )
        if self.structured > MOST_STRUCTURED:
            return (
                f"{self.structured:.0%} of the windows hold JSON keys or tags: a data file, not its text? Fitting to "
                f"raw JSON left 1.06 times the divergence from the float model where it was measured"
            )
        return (
            "as on another language, domain or format. Fitting to another domain left 1.5 times, to another language "
            "2.3 times the divergence from the float model where it was measured"
        )

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "loss": round(self.loss, 4),
            "entropy": round(self.entropy, 4),
            "surprise": round(self.surprise, 4),
            "bits_per_byte": round(self.bits_per_byte, 4),
            "bytes_per_token": round(self.bytes_per_token, 4),
            "unknown_share": round(self.unknown, 4),
            "structured_windows": round(self.structured, 4),
            "tokens": self.tokens,
            "warnings": self.warnings(),
        }


def examine(student: Student, tokenizer: TextTokenizer, windows: Windows) -> Suitability:
    """Run the float model over some of the calibration windows, one layer in memory at a time.

    Args:
        student: the float model.
        tokenizer: its tokenizer.
        windows: calibration windows; the first tokens of some of them are read.
    """
    tokens = min(MOST_TOKENS, max(256, int(OPERATIONS / (2 * student.shape.num_parameters))))
    count = max(1, tokens // WINDOW)
    stride = max(1, len(windows.ids) // count)
    chosen = [torch.from_numpy(ids[:WINDOW]) for ids in windows.ids[::stride][:count]]
    loss, entropy, predicted = _loss(student, chosen)
    texts = [tokenizer.decode(ids[1:].tolist()) for ids in chosen]
    length = max(1, sum(len(text.encode()) for text in texts))
    whole = [tokenizer.decode(ids.tolist()) for ids in windows.ids]
    return Suitability(
        loss=loss / predicted,
        entropy=entropy / predicted,
        bits_per_byte=loss / math.log(2) / length,
        bytes_per_token=length / predicted,
        unknown=_unknown_share(tokenizer, windows),
        structured=sum(bool(STRUCTURE.search(text)) for text in whole) / len(whole),
        template_tokens=_template_share(tokenizer, windows),
        tokens=predicted,
    )


@torch.no_grad()
def _loss(student: Student, windows: list[torch.Tensor]) -> tuple[float, float, int]:
    """Summed loss and predicted entropy in nats, and over how many predicted positions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = embed(student, windows)
    for layer in range(student.shape.num_layers):
        advance(load_layer(student, layer, device), hidden, device)
        student.store.release()
    pairs = list(zip(hidden.x_STD, windows, strict=True))
    x_PD = torch.cat([x_TD[: len(ids) - 1] for x_TD, ids in pairs])
    target_P = torch.cat([ids[1:] for _x, ids in pairs])
    loss, entropy = _loss_and_entropy(student, x_PD, target_P)
    student.store.release()
    return loss, entropy, len(target_P)


def _loss_and_entropy(student: Student, x_PD: torch.Tensor, target_P: torch.Tensor) -> tuple[float, float]:
    """Summed loss and predicted entropy in nats, of the last layer's outputs.

    The head is read in slabs of the vocabulary, with a running maximum and sums of exponentials: 262,144 ids times
    2,048 channels are 2 GiB in float32, and their logits as much again.
    """
    output = Output.of(student)
    normed_PD, head_VD = output.normed(x_PD), output.head_VD
    most_P = torch.full(target_P.shape, -torch.inf)
    total_P, weighted_P, hit_P = (torch.zeros(target_P.shape) for _ in range(3))
    for start in range(0, len(head_VD), SLAB):
        logits_Pv = normed_PD @ head_VD[start : start + SLAB].float().T
        new_P = torch.maximum(most_P, logits_Pv.amax(-1))
        share_Pv = (logits_Pv - new_P[:, None]).exp_()
        shrink_P = (most_P - new_P).exp_()
        total_P = total_P * shrink_P + share_Pv.sum(-1)
        weighted_P = weighted_P * shrink_P + (share_Pv * logits_Pv).sum(-1)
        inside_P = (target_P >= start) & (target_P < start + SLAB)
        hit_P[inside_P] = logits_Pv[inside_P, target_P[inside_P] - start]
        most_P = new_P
    log_total_P = most_P + total_P.log()
    return float((log_total_P - hit_P).sum()), float((log_total_P - weighted_P / total_P).sum())


def _unknown_share(tokenizer: TextTokenizer, windows: Windows) -> float:
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    odd = {index for text, index in vocabulary.items() if BYTE.fullmatch(text)}
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    if unknown in vocabulary:
        odd.add(vocabulary[unknown])
    ids = [int(index) for window in windows.ids for index in window[1:]]
    return sum(index in odd for index in ids) / max(1, len(ids))


def _template_share(tokenizer: TextTokenizer, windows: Windows) -> float | None:
    """Share of windows with a special token that the chat template writes; None where there is none to look for."""
    if tokenizer.template is None:
        return None
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    marks = {vocabulary[t] for t in tokenizer.special_tokens() if t in tokenizer.template.source and t in vocabulary}
    marks -= {tokenizer.bos_id}
    if not marks:
        return None
    return sum(any(int(index) in marks for index in window) for window in windows.ids) / len(windows.ids)


def examine_and_warn(student: Student, tokenizer: TextTokenizer, windows: Windows) -> dict[str, Any]:
    """Examine, say the warnings, and give the record for the manifest."""
    found = examine(student, tokenizer, windows)
    for words in found.warnings():
        warn(words)
    return found.record()
