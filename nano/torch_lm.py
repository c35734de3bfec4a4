"""An HF float folder behind the `LanguageModel` protocol, run by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nano.checkpoint import Checkpoint
from nano.errors import BadFileError
from nano.lm import Activations, Logits
from nano.shapes import ModelShape, read_config
from nano.tokens import TextTokenizer, load_tokenizer

BATCH_TOKENS = 8192


class TorchModel:
    """A transformers causal model on the CPU (or where it lies) that gives logits as numpy arrays."""

    def __init__(self, model: Any, tokenizer: TextTokenizer, context: int, activations: Activations = "float") -> None:
        self.model, self.tokenizer, self.context, self.activations = model.eval(), tokenizer, context, activations
        self.vocab_size = int(model.config.vocab_size)
        self._cache: Any = None

    def logits(self, windows: Sequence[npt.NDArray[np.int64]]) -> list[Logits]:
        """See `LanguageModel.logits`. Windows are padded on the right; causal attention never sees the padding."""
        out: list[Logits] = []
        width = max(len(w) for w in windows)
        per_batch = max(1, BATCH_TOKENS // width)
        for start in range(0, len(windows), per_batch):
            batch = windows[start : start + per_batch]
            ids_BT = torch.zeros(len(batch), max(len(w) for w in batch), dtype=torch.long, device=self.model.device)
            for row, window in enumerate(batch):
                ids_BT[row, : len(window)] = torch.from_numpy(window)
            with torch.inference_mode():
                logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits.float().cpu().numpy()
            out += [logits_BTV[row, : len(window)] for row, window in enumerate(batch)]
        return out

    def prefill(self, ids: Sequence[int]) -> Logits:
        """See `LanguageModel.prefill`."""
        self._cache = None
        return self._step(list(ids))

    def decode(self, token: int) -> Logits:
        """See `LanguageModel.decode`."""
        return self._step([token])

    def _step(self, ids: list[int]) -> Logits:
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        last: Logits = out.logits[0, -1].float().cpu().numpy()
        return last

    def close(self) -> None:
        """Drop the cache."""
        self._cache = None


def open_float(folder: Path) -> TorchModel:
    """A float HF folder, checked tensor by tensor before it is loaded.

    Raises:
        BadFileError: a file is missing, truncated or does not fit config.json.
        UnsupportedError: the family is not one of ours.
    """
    shape = check_float_folder(folder)
    tokenizer = load_tokenizer(folder, shape.vocab_size)
    return TorchModel(load_float(folder), tokenizer, shape.max_positions)


def check_float_folder(folder: Path) -> ModelShape:
    """The shape of a float HF folder whose weights all are there and of the right size."""
    config = read_config(folder)
    if config.get("quantization_config"):
        raise BadFileError(
            "This needs a float model.",
            found=f"a quantized one in {folder}",
            todo="name the folder that nanokit distill wrote, or the original model",
        )
    shape = ModelShape.from_hf(config)
    with Checkpoint(folder) as checkpoint:
        checkpoint.check(shape)
    return shape


def load_float(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a float HF folder, loaded silently."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
