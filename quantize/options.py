"""Options of the quantize stage, written once: the command line and a recipe's [quantize] table mean the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nano.errors import RequestError

Method = Literal["rtn", "gptq", "best", "recover"]

STEPS = {"best": 200, "recover": 2000}
"""Training steps of the methods that train, where none are asked for."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How a float student becomes codes and scales.

    Attributes:
        method: "rtn" rounds each weight to the nearest code, needs no text to be read by the model; "gptq" lets
            the weights not yet rounded make up for each rounding error, as the calibration text weighs it;
            "best" is gptq, then a short distillation from the float model through the grid; "recover" is that
            distillation at length.
        group_size: input channels that share a scale: 32, 64 or 128.
        samples: calibration windows.
        length: tokens a calibration window holds.
        seed: which windows are drawn.
        damping: share of the mean curvature added to every input channel before the solve.
        steps: training steps of best and recover; 0 means 200 for best, 2,000 for recover.
        batch: windows in a training step.
        window: tokens a training window holds.
        learning_rate: how far a weight may move in a training step, in codes.
    """

    method: Method = "gptq"
    group_size: Literal[32, 64, 128] = 32
    samples: int = 128
    length: int = 256
    seed: int = 0
    damping: float = 0.01
    steps: int = 0
    batch: int = 16
    window: int = 128
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        wrong = {
            "--samples": self.samples < 1,
            "--length": self.length < 8,
            "--damping": self.damping < 0,
            "--steps": self.steps < 0,
            "--batch": self.batch < 1,
            "--window": self.window < 8,
            "--learning-rate": self.learning_rate <= 0,
        }
        found = [name for name, bad in wrong.items() if bad]
        if found:
            raise RequestError(
                "A number for quantize makes no sense.",
                found=f"{found[0]} {getattr(self, found[0][2:].replace('-', '_'))}",
                expected="samples and batch of 1 or more, windows of 8 tokens or more, a positive learning rate, "
                "damping and steps of 0 or more",
            )
