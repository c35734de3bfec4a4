"""The whole float model at once, for students that memory holds: output distributions, and KL to them.

Legend: B windows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nano.families import weight_shapes
from quantize.layers import transformers_config
from quantize.student import Student

LOGITS_AT_ONCE = 1 << 26
"""Numbers of logits in one forward pass."""


def whole_model(student: Student) -> Any:
    """The float model by transformers, padded as the student is, float32, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    config = transformers_config(student.config, student.shape.family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: student.tensor(name).float() for name in weight_shapes(student.shape)}
    model.load_state_dict(state, strict=False)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().requires_grad_(False)


def parts_of(windows: Sequence[torch.Tensor], vocab_size: int) -> list[list[torch.Tensor]]:
    """The windows in parts whose logits fit in one forward pass."""
    longest = max(len(window) for window in windows)
    count = max(1, LOGITS_AT_ONCE // (longest * vocab_size))
    return [list(windows[i : i + count]) for i in range(0, len(windows), count)]


def padded(windows: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows padded to one length: ids (B, T), and which of them are real (B, T)."""
    ids_BT = torch.nn.utils.rnn.pad_sequence(list(windows), batch_first=True).to(device)
    length_B1 = torch.tensor([len(window) for window in windows], device=device)[:, None]
    return ids_BT, torch.arange(ids_BT.shape[1], device=device)[None] < length_B1


@torch.no_grad()
def log_probabilities(model: Any, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Log-probabilities (positions, V) of each part of the windows that is run at once; padding is left out."""
    device = next(model.parameters()).device
    found = []
    for part in parts_of(windows, model.config.vocab_size):
        ids_BT, real_BT = padded(part, device)
        found.append(model(input_ids=ids_BT, use_cache=False).logits[real_BT].float().log_softmax(-1))
    return found


@torch.no_grad()
def kl_of(model: Any, reference: Sequence[torch.Tensor], windows: Sequence[torch.Tensor]) -> float:
    """Mean KL(reference || model) in nats a position.

    Args:
        model: a transformers causal model.
        reference: `log_probabilities` of the float model on the same windows.
        windows: token ids.
    """
    total, positions = 0.0, 0
    for wanted_PV, part in zip(reference, parts_of(windows, model.config.vocab_size), strict=True):
        (given_PV,) = log_probabilities(model, part)
        kl = torch.nn.functional.kl_div(given_PV, wanted_PV, reduction="sum", log_target=True)
        total, positions = total + float(kl), positions + len(wanted_PV)
    return total / positions
