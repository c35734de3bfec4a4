"""Calibration text: which windows the solvers look at, and the record of it that goes into the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nano.corpus import Windows, describe_data, read_documents, sample_windows
from nano.progress import warn
from nano.tokens import TextTokenizer
from quantize.options import STEPS, QuantizeOptions


@dataclass(frozen=True)
class Calibration:
    """Windows drawn for calibration.

    Attributes:
        windows: token ids.
        record: files with sha256, tokens, seed, and what was asked for: enough to draw the same windows again.
        text_ids: every id of the tokenizer that stands for text, to make noise of.
    """

    windows: Windows
    record: dict[str, Any]
    text_ids: Sequence[int] = ()


def draw_windows(
    data: Sequence[Path], tokenizer: TextTokenizer, options: QuantizeOptions, max_positions: int
) -> Calibration:
    """Draw `samples` windows of `length` tokens from text files.

    Warns when the text holds clearly fewer tokens than asked for.

    Raises:
        BadFileError: a file is missing, empty or not text.
        RequestError: the text does not give one window.
    """
    length = min(options.length, max_positions)
    if length < options.length:
        warn(f"windows are cut to the model's {max_positions} positions (--length {options.length} was asked for)")
    windows = sample_windows(read_documents(data), tokenizer, length, options.windows, options.seed)
    asked, found = options.windows * length, sum(len(window) for window in windows.ids)
    if found < 0.9 * asked:
        warn(
            f"the text gives {found:,} calibration tokens in {len(windows.ids)} windows; {asked:,} were asked for. "
            f"The result fits this text more than the model's general use: give more --data, or lower --samples"
        )
    record = {
        **describe_data(data, tokens=found, seed=options.seed),
        "windows": len(windows.ids),
        "asked": {"samples": options.windows, "length": options.length},
    }
    return Calibration(windows, record, tokenizer.text_ids())


def with_noise(calibration: Calibration, options: QuantizeOptions) -> Calibration:
    """The same windows, some of them noised (see `quantize.noise`)."""
    import torch

    from quantize.noise import noised

    windows = [torch.from_numpy(window) for window in calibration.windows.ids]
    changed = noised(windows, torch.tensor(calibration.text_ids), options.noise, options.seed)
    return replace(calibration, windows=Windows(tuple(window.numpy() for window, _ in changed)))


def draw_training_windows(
    data: Sequence[Path], tokenizer: TextTokenizer, options: QuantizeOptions, max_positions: int
) -> Calibration:
    """Draw the windows that the training methods need: each seen once where the text is long enough.

    Warns when windows must be seen more than three times: the result then fits this text, not the use.
    """
    steps = options.steps or STEPS[options.method]
    length, count = min(options.window, max_positions), steps * options.batch
    windows = sample_windows(read_documents(data), tokenizer, length, count, options.seed)
    tokens = sum(len(window) for window in windows.ids)
    if count > 3 * len(windows.ids):
        warn(
            f"{steps} steps see each of the text's {len(windows.ids):,} windows {count / len(windows.ids):.0f} times: "
            f"the result may fit this text more than the model's use; give more --data, or lower --steps"
        )
    record = {"windows": len(windows.ids), "tokens": tokens, "steps": steps, "rate": options.rate}
    return Calibration(windows, record, tokenizer.text_ids())
