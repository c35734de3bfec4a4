"""The optimizer and its learning rate, and what has to be there for the ways of training that were asked for."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from distill.options import DistillOptions
from nano.errors import RequestError, UnsupportedError, require_module

BETAS = (0.9, 0.95)
"""Llama 2's (arXiv 2307.09288, section 2.2): a shorter memory than 0.999, right for runs of few steps."""

FUSED_OPTIMIZER = True
_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged-adamw8bit": "PagedAdamW8bit"}


def learning_rate(options: DistillOptions, hidden_size: int, step: int) -> float:
    """Of step `step` (from 0): a linear rise to the peak, then down to `final_rate` of it by the schedule.

    "linear" and "cosine" fall from the peak on. "wsd" (warmup, stable, decay: arXiv 2404.06395) stays there until the
    last `decay` of the steps, and falls as one minus a square root (arXiv 2405.18392, section 3.2).
    """
    peak, rise = options.peak_rate(hidden_size), max(1, round(options.warmup * options.steps))
    if step < rise:
        return peak * (step + 1) / rise
    if options.schedule == "wsd":
        fall = max(1, round(options.decay * options.steps))
        done = math.sqrt(max(0.0, (step + 1 - (options.steps - fall)) / fall))
    else:
        done = (step - rise + 1) / max(1, options.steps - rise)
        done = (1 - math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else done
    return peak * (1 - done * (1 - options.final_rate))


def make_optimizer(parameters: Sequence[torch.nn.Parameter], options: DistillOptions) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with 8-bit moments; norms are not decayed."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=FUSED_OPTIMIZER)
    made: Any = getattr(require_module("bitsandbytes", "bnb").optim, _BITSANDBYTES[options.optimizer])
    optimizer: torch.optim.Optimizer = made(groups, lr=0.0, betas=BETAS)
    return optimizer


def check_means(options: DistillOptions, device: str) -> None:
    """Refuse what this machine cannot do, before any work.

    Raises:
        UnsupportedError: an 8-bit optimizer without a GPU.
        MissingExtraError: bitsandbytes or tensorboard is not installed.
        RequestError: --compile on a CPU without a C++ compiler.
    """
    if options.optimizer != "adamw":
        if device != "cuda":
            raise UnsupportedError(
                "bitsandbytes' optimizers run on an NVIDIA GPU only.", found=f"--optimizer {options.optimizer}, no GPU",
                todo="use --optimizer adamw",
            )  # fmt: skip
        require_module("bitsandbytes", "bnb")
    if options.tensorboard:
        require_module("tensorboard.summary.writer.event_file_writer", "tensorboard")
    if options.compile and device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise RequestError("--compile needs a C++ compiler on the CPU.", found="neither g++ nor clang++",
                           todo="install one, or leave --compile out")  # fmt: skip


def prepare_model(model: Any, options: DistillOptions) -> None:
    """Recompute activations in the backward pass, and compile, where that is asked for; layer by layer.

    A layer's own flag makes transformers recompute it; its children keep theirs, so that no dropout awakes.
    """
    if options.recompute:
        with warnings.catch_warnings():  # 5.23 has a new name for it, which 5.20 does not know
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True
    if options.compile:
        for layer in model.model.layers:
            layer.compile()
