"""How fast a run is, and which share of a device's arithmetic the student's work takes (MFU, arXiv 2204.02311).

The student's work on a token is 6 operations a weight that multiplies (2 forward, 4 backward) and 6 T H A a layer for
causal attention, half of the paper's 12. The teacher's forward pass is not the student's work and is left out, so a
run's MFU tells what the whole arrangement gives for the student.
"""

from __future__ import annotations

import time

import torch

from nano.shapes import ModelShape

PEAK_BF16 = {
    "B200": 2250e12, "H200": 989.5e12, "H100 PCIe": 756e12, "H100": 989.5e12, "A100": 312e12, "L40S": 362e12,
    "L4": 121e12, "A10": 125e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 operations a second, from NVIDIA's data sheets; the first name that a device's name holds counts."""


def training_flops(shape: ModelShape, length: int) -> int:
    """Operations of a student's forward and backward pass on one token of a sequence of `length`."""
    looked_up = 0 if shape.tied else shape.vocab_size * shape.hidden_size
    attention = length * shape.num_layers * shape.num_heads * shape.head_dim
    return 6 * (shape.num_parameters - looked_up + attention)


def peak_flops(device: str, dtype: str) -> float | None:
    """Of the device that is used, where it is known; bfloat16 on a GPU."""
    if device != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


class Speed:
    """Tokens a second over the last steps, and MFU where the device's peak is known."""

    def __init__(self, flops_per_token: int, peak: float | None) -> None:
        self.flops, self.peak = flops_per_token, peak
        self.tokens, self.start = 0, time.monotonic()

    def add(self, tokens: int) -> str:
        """Count a step; what to show."""
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.start, 1e-9)
        share = f", MFU {rate * self.flops / self.peak:.0%}" if self.peak else ""
        return f"{rate:,.0f} tokens/s{share}"
