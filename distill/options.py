"""Options of the distil stage, written once: the command line and a recipe's [distill] table mean the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nano.errors import RequestError

Divergence = Literal["forward", "reverse", "jsd", "skew", "skew-reverse"]
"""See `distill.divergences`."""

CrossTokenizer = Literal["none", "uld", "gold"]
"""See `distill.cross_losses`."""

MEASURES = {"kl": "KL to the teacher", "uld": "ULD distance to the teacher", "gold": "GOLD loss against the teacher"}
UNITS = {"kl": "nats a token", "uld": "a span of text", "gold": "a span of text"}
"""What a student's distance from its teacher is called, by its key in results and metrics."""

BEFORE = {"pruned": "after the cut", "random": "at random", "given": "as given"}
"""A student before it is trained, in words for people."""

DEFAULT_BETA = {"jsd": 0.5, "skew": 0.1, "skew-reverse": 0.1}
"""Jensen and Shannon's own; DistiLLM's choice (arXiv 2402.03898, section 4.1)."""


@dataclass(frozen=True)
class DistillOptions:
    """How a student is cut from its teacher and trained.

    Attributes:
        steps: optimizer steps; 0 only cuts.
        batch: sequences an optimizer step sees.
        micro_batch: sequences in one pass, so that a large batch fits in memory; 0 means the whole batch.
        length: tokens in a sequence, at most the teacher's positions.
        learning_rate: the peak; 0 means 0.4 / D of the student (D = 64: 6e-3, D = 2048: 2e-4).
        warmup: share of the steps over which the learning rate rises.
        final_rate: learning rate at the end, as a share of the peak.
        schedule: how it falls: "linear", "cosine", or "wsd": it stays at the peak until the last `decay` of the steps.
        decay: share of the steps over which "wsd" falls.
        optimizer: "adamw"; on a GPU also bitsandbytes' "adamw8bit" and "paged-adamw8bit".
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
        temperature: divides both models' logits in the divergence.
        kd: weight of the divergence from the teacher; the rest, 1 - kd, is on the text's own next tokens.
        divergence: "forward" is KL(teacher || student), "reverse" KL(student || teacher), "jsd" the generalised
            Jensen-Shannon divergence; "skew" and "skew-reverse" are KL from teacher or student to their mixture.
        beta: the teacher's share in that mixture; 0 means 0.5 for jsd and 0.1 for skew and skew-reverse.
        cross_tokenizer: for a student (a folder) whose tokenizer is not its teacher's: "gold" compares tokens that
            both have by the divergence and the others by their sorted probabilities, "uld" all by the latter. Give
            the text more weight than with one tokenizer: --kd 0.5.
        match: weight of matching the outputs of the student's layers, through a learned projection, to those of
            the teacher's layers they came from; 0 does not.
        on_policy: share of sequences that the student continues itself, scored by the teacher; 0 trains on text only.
        prompt: tokens of text that such a continuation starts from.
        layers: "damage" drops layers by what their absence measurably does, "influence" by block influence (faster).
        shapes: of a student given by its size, cut to so many shapes of that size and take the one that the cut hurts
            least; 1 takes the one whose dimensions are gentlest, as `nanokit plan` shows it.
        rounds: cut and train in so many rounds; "auto" makes one where half or more of the parameters stay, and else
            rounds that each leave at least half.
        heal: share of the steps that the rounds before the last get together.
        refit: fit the linears whose inputs were cut to the teacher's by least squares.
        start: "pruned" cuts the teacher's weights, "random" begins from scratch; of a student that is a folder then
            only the architecture counts, which may be of another family than its teacher's.
        dtype: of the matrix products in both models; weights and optimizer stay float32.
        teacher_dtype: the teacher's, where it is to be another: "int8" and "nf4" are bitsandbytes' 8 and 4 bits.
        recompute: recompute activations in the backward pass: less memory, a third more arithmetic.
        compile: torch.compile the student's layers.
        seed: of the held-out split, the order of the text and a random start.
        held_out: share of documents (by hash) that the student never sees and is measured on.
        eval_tokens: at most so many held-out tokens are measured.
        eval_every: steps between measurements; 0 measures only before and after training.
        calibration_tokens: training text that importance is measured on.
        remember: gigabytes of disk, at most, for what a live teacher saw of rows that come again in later passes over
            the text, so that it reads each once; 0 asks it anew every time. The answers are the same.
        save_every: steps between checkpoints; 0 means every two minutes (and always when interrupted).
        keep: the weights that become the student: "last", or "best" on held-out text, measured every `eval_every`.
        curves: draw curves.png at the end.
        tensorboard: a folder for TensorBoard events while training; "" writes none.
    """

    steps: int = 400
    batch: int = 8
    micro_batch: int = 0
    length: int = 256
    learning_rate: float = 0.0
    warmup: float = 0.05
    final_rate: float = 0.0
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    decay: float = 0.2
    optimizer: Literal["adamw", "adamw8bit", "paged-adamw8bit"] = "adamw"
    weight_decay: float = 0.01
    clip: float = 1.0
    temperature: float = 1.0
    kd: float = 0.8
    divergence: Divergence = "forward"
    beta: float = 0.0
    cross_tokenizer: CrossTokenizer = "none"
    match: float = 0.0
    on_policy: float = 0.0
    prompt: int = 32
    layers: Literal["damage", "influence"] = "damage"
    shapes: int = 1
    rounds: Literal["auto"] | int = "auto"
    heal: float = 0.1
    refit: bool = True
    start: Literal["pruned", "random"] = "pruned"
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_dtype: Literal["same", "float32", "bfloat16", "int8", "nf4"] = "same"
    recompute: bool = False
    compile: bool = False
    seed: int = 0
    held_out: float = 0.05
    eval_tokens: int = 16384
    eval_every: int = 0
    calibration_tokens: int = 32768
    remember: float = 8.0
    save_every: int = 0
    keep: Literal["last", "best"] = "last"
    curves: bool = True
    tensorboard: str = ""

    def __post_init__(self) -> None:
        """Raise RequestError for a value that makes no sense."""
        _check_ranges(self, (
            ("steps", 0, math.inf), ("batch", 1, math.inf), ("micro_batch", 0, self.batch), ("length", 8, math.inf),
            ("learning_rate", 0, 1), ("warmup", 0, 1), ("final_rate", 0, 1), ("decay", 0, 1), ("weight_decay", 0, 10),
            ("clip", 1e-6, math.inf), ("temperature", 1e-2, 100), ("kd", 0, 1), ("beta", 0, 1),
            ("match", 0, 1e6), ("on_policy", 0, 1), ("prompt", 1, math.inf), ("seed", 0, 2**63),
            ("held_out", 1e-4, 0.9), ("eval_tokens", 64, math.inf), ("eval_every", 0, math.inf),
            ("calibration_tokens", 64, math.inf), ("save_every", 0, math.inf), ("heal", 0, 0.95),
            ("remember", 0, 1e6), ("shapes", 1, 64),
            *((("rounds", 1, 16),) if self.rounds != "auto" else ()),
        ))  # fmt: skip
        if self.beta == 1 or (self.beta and self.divergence not in DEFAULT_BETA):
            raise RequestError(
                "--beta does not go with this divergence.",
                found=f"--divergence {self.divergence} --beta {self.beta:g}",
                expected="--beta above 0 and below 1, with " + ", ".join(DEFAULT_BETA),
                todo="--divergence forward and reverse are its two limits",
            )
        if self.cross_tokenizer != "none":
            _check_across(self)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise RequestError(
                "The learning rate would fall before it has risen.",
                found=f"--warmup {self.warmup:g} --decay {self.decay:g}", expected="at most 1 together",
            )  # fmt: skip
        if self.keep == "best" and not self.eval_every:
            raise RequestError(
                "The best weights are not known where nothing is measured.", found="--keep best without --eval-every",
                todo="give --eval-every STEPS",
            )  # fmt: skip
        if self.on_policy and self.prompt > self.length - 8:
            raise RequestError(
                "The prompt leaves no room for a continuation.",
                found=f"--prompt {self.prompt}",
                expected=f"at most {self.length - 8}, eight less than --length",
            )

    @property
    def measure(self) -> str:
        """The key in `MEASURES` of what is measured against the teacher."""
        return "kl" if self.cross_tokenizer == "none" else self.cross_tokenizer

    @property
    def teacher_precision(self) -> str:
        """The teacher's, with "same" resolved."""
        return self.dtype if self.teacher_dtype == "same" else self.teacher_dtype

    @property
    def mixture(self) -> float:
        """The teacher's share in the divergence's mixture, b of `distill.divergences`."""
        return self.beta or DEFAULT_BETA.get(self.divergence, 0.5)

    def peak_rate(self, hidden_size: int) -> float:
        """The peak learning rate for a student of width D."""
        return self.learning_rate or 0.4 / hidden_size


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of a teacher's answers.

    Attributes:
        form: "sampled" keeps an unbiased sample of each distribution, "top" the most likely ids, renormalised.
        bytes_per_token: size of a token's record; as many ids as fit are kept. A window's place takes 24 bytes more.
        temperature: divides the teacher's logits; a run that uses the cache must have the same.
        length: tokens in a sequence, as the run's.
        held_out: share of documents that the run holds out, which are not cached.
        seed: the run's, of the held-out split; and of the samples.
        batch: sequences in one pass of the teacher.
        dtype: of the teacher; "int8" and "nf4" are bitsandbytes' 8 and 4 bits.
        shard_tokens: tokens between commits: so many at most are lost when it is killed.
    """

    form: Literal["sampled", "top"] = "sampled"
    bytes_per_token: int = 60
    temperature: float = 1.0
    length: int = 256
    held_out: float = 0.05
    seed: int = 0
    batch: int = 16
    dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    shard_tokens: int = 1 << 18

    def __post_init__(self) -> None:
        """Raise RequestError for a value that makes no sense."""
        _check_ranges(self, (
            ("bytes_per_token", 8, 4096), ("temperature", 1e-2, 100), ("length", 8, math.inf), ("held_out", 1e-4, 0.9),
            ("seed", 0, 2**63), ("batch", 1, math.inf), ("shard_tokens", 1, 2**31),
        ))  # fmt: skip

    def run_options(self) -> DistillOptions:
        """Options of a run that sees the same text."""
        return DistillOptions(
            length=self.length, held_out=self.held_out, seed=self.seed, batch=1, temperature=self.temperature
        )


def _check_across(options: DistillOptions) -> None:
    """What a loss across tokenizers does not go with."""
    for found, wrong, why in (
        (f"--on-policy {options.on_policy:g}", options.on_policy > 0, "no text that both read"),
        (f"--match {options.match:g}", options.match > 0, "their hidden states are of different tokens"),
        (f"--divergence {options.divergence}", options.cross_tokenizer == "uld" and options.divergence != "forward",
         "uld compares sorted probabilities and has no divergence; gold has one"),
    ):  # fmt: skip
        if wrong:
            raise RequestError(
                "That does not go with a teacher of another tokenizer.",
                found=f"{found} with --cross-tokenizer {options.cross_tokenizer}: {why}", todo="leave one of both out",
            )  # fmt: skip


def measure_of(figures: Mapping[str, Any]) -> str:
    """Which key of `MEASURES` some figures have."""
    return next(key for key in MEASURES if key in figures)


def _check_ranges(options: object, ranges: tuple[tuple[str, float, float], ...]) -> None:
    for name, low, high in ranges:
        value = getattr(options, name)
        if not low <= value <= high:
            raise RequestError(
                f"--{name.replace('_', '-')} is out of range.", found=str(value), expected=f"{low} to {high}"
            )
