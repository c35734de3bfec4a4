"""Options of the quantize stage, written once: the command line and a recipe's [quantize] table mean the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from nano.errors import RequestError
from quantize.rules import Rule
from quantize.runtimes import Runtime

Method = Literal["best", "fast", "rtn", "awq", "gptq", "tune", "recover", "bnb-nf4", "bnb-int8"]

STEPS = {"tune": 200, "best": 360, "recover": 4000}
"""Training steps of the methods that train, where none are asked for; tune's are for each layer."""

RATES = {"tune": 0.01, "best": 0.01, "recover": 0.006}
"""Their learning rates, in codes a step: longer training takes shorter steps."""

END_TO_END = ("best", "recover")
"""Methods that train the whole model at once."""

SAMPLES, FAST_SAMPLES = 128, 32
"""Calibration windows where none are asked for, of most methods and of fast."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How a float student becomes codes and scales.

    Attributes:
        method: "best" is gptq and then a short distillation from the float model through the grid (layer by layer,
            as tune, where memory cannot hold a training of the whole model); "fast" is a light gptq on little text,
            and rtn without any; "rtn" rounds each weight to the nearest code, scales by the least squared error;
            "awq" is --awq and then rtn; "gptq" lets the weights not yet rounded make up for each rounding error, as
            the calibration text weighs it; "tune" is gptq, then learned rounding layer by layer; "recover" is best at
            length.
            "bnb-nf4" and "bnb-int8" write bitsandbytes' own formats: quick, without text, for PCs and never for phones.
        group_size: input channels that share a scale: 32, 64, 128, or "channel" for all of them; "auto" is 32, and
            8 bits with one scale a row for layers whose width 32 does not divide.
        symmetry: "symmetric" grids run on every phone runtime; "asymmetric" ones have a zero point a group, are a
            little more accurate, and run in ONNX Runtime only.
        embedding: "int4" and "int8" put the embedding on a grid too.
        head: the same for the output head; "auto" leaves an untied head float. A tied head is the embedding.
        runtime: what the model is meant for; grids that it cannot run are refused. "any" means both phone runtimes.
        rules: come before those that the options above make; first match wins.
        bits_budget: mean bits a weight that the decoder linears may take, scales included (int4 in groups of 32 is
            4.5): those that calibration text shows to suffer most at 4 bits get 8. 0 means no budget.
        profile: a phone (see `nanokit profiles`) that the model must fit: linears get 8 bits while it does.
        context: positions in use on that phone; 0 means the model's own limit, at most 2,048.
        samples: calibration windows; 0 means 128, and 32 for fast.
        length: tokens a calibration window holds.
        rotation: fold rotations into the weights before any method, the same function on a basis that int4 suits
            better: "hadamard", or "learned" on calibration text, of the residual stream and of attention's values. A
            tied head gets weights of its own by it. "heads" learns that of the values alone, and the head stays tied.
            "auto", for best and recover, is "learned" where the head has weights of its own already, else "heads".
        awq: fold channel scales searched on calibration text into the weights before any method.
        seed: which windows are drawn, and which rotation is taken.
        damping: share of the mean curvature added to every input channel before the solve.
        steps: training steps; 0 means 200 for each layer of tune, 360 for best, 4,000 for recover.
        batch: windows in a training step.
        window: tokens a training window holds.
        learning_rate: how far a weight may move in a training step, in codes; 0 means 0.01, for recover 0.006.
        noise: share of windows of --data of which a part is replaced by other tokens, which keeps the model near the
            original on text unlike --data, and costs little on text like it. Training gives it up towards its end.
        cross_entropy: weight of the text's own next tokens beside the original's answers in training (best, recover);
            more makes the model fit --data, and leaves the original.
    """

    method: Method = "best"
    group_size: Literal["auto", 32, 64, 128, "channel"] = "auto"
    symmetry: Literal["symmetric", "asymmetric"] = "symmetric"
    embedding: Literal["float", "int4", "int8"] = "float"
    head: Literal["auto", "float", "int4", "int8"] = "auto"
    runtime: Runtime = "any"
    rules: Annotated[tuple[Rule, ...], Parameter(parse=False)] = ()
    bits_budget: float = 0.0
    profile: str = ""
    context: int = 0
    rotation: Literal["auto", "none", "heads", "hadamard", "learned"] = "auto"
    awq: Annotated[bool, Parameter(negative=())] = False
    samples: int = 0
    length: int = 256
    seed: int = 0
    damping: float = 0.01
    steps: int = 0
    batch: int = 8
    window: int = 128
    learning_rate: float = 0.0
    noise: float = 0.25
    cross_entropy: float = 0.015

    def __post_init__(self) -> None:
        wrong = {
            "--samples": self.samples < 0,
            "--length": self.length < 8,
            "--damping": not 0 <= self.damping < math.inf,
            "--seed": self.seed < 0,
            "--steps": self.steps < 0,
            "--batch": self.batch < 1,
            "--window": self.window < 8,
            "--learning-rate": not 0 <= self.learning_rate < math.inf,
            "--noise": not 0 <= self.noise <= 1,
            "--cross-entropy": not 0 <= self.cross_entropy <= 1,
            "--bits-budget": not 0 <= self.bits_budget <= 32,
            "--context": self.context < 0 or bool(self.context and not self.profile),
        }
        found = [name for name, bad in wrong.items() if bad]
        if found:
            raise RequestError(
                "A number for quantize makes no sense.",
                found=f"{found[0]} {getattr(self, found[0][2:].replace('-', '_'))}",
                expected="a batch of 1 or more, windows of 8 tokens or more, samples, damping, seed, steps, learning "
                "rate, bits budget and context of 0 or more; noise and cross-entropy from 0 to 1; "
                "a context only with --profile",
            )
        if self.bits_budget and self.profile:
            raise RequestError(
                "A bits budget and a phone cannot both decide which layers get 8 bits.",
                found=f"--bits-budget {self.bits_budget:g} and --profile {self.profile}",
                todo="give one of them",
            )

    @property
    def reads_text(self) -> bool:
        """Whether the float model must be run on text."""
        return self.method != "rtn" or self.awq or self.rotation in ("heads", "learned")

    @property
    def windows(self) -> int:
        """Calibration windows to draw."""
        return self.samples or (FAST_SAMPLES if self.method == "fast" else SAMPLES)

    @property
    def rate(self) -> float:
        """The learning rate of a method that trains."""
        return self.learning_rate or RATES[self.method]
