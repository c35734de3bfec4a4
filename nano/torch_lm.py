"""An HF float folder behind the `LanguageModel` protocol, run by transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from nano.checkpoint import Checkpoint
from nano.errors import BadFileError
from nano.lm import Activations, Logits, common_length
from nano.shapes import ModelShape, read_config
from nano.tokens import TextTokenizer, load_tokenizer

BATCH_TOKENS = 8192
MIN_SHARED = 16
"""Ids that contexts must have in common to be computed apart."""


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
        return self.extend(ids)

    def decode(self, token: int) -> Logits:
        """See `LanguageModel.decode`."""
        return self.extend([token])

    def extend(self, ids: Sequence[int]) -> Logits:
        """See `LanguageModel.extend`."""
        row: Logits = self._step(ids, 1)[-1]
        return row

    def extend_all(self, ids: Sequence[int]) -> Logits:
        """See `LanguageModel.extend_all`."""
        return self._step(ids, len(ids))

    def rewind(self, length: int) -> bool:
        """See `LanguageModel.rewind`; a sliding layer's cache has dropped what lies before its window."""
        if length == 0:
            self._cache = None
        elif self._cache is None or self._slides():
            return False
        elif extra := self._cache.get_seq_length() - length:
            self._cache.crop(-extra)
        return True

    def _slides(self) -> bool:
        return "sliding_attention" in (getattr(self.model.config, "layer_types", None) or ())

    def _step(self, ids: Sequence[int], keep: int) -> Logits:
        """Logits (keep, V) of the last ids of a call."""
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        with torch.inference_mode():
            out = self.model(input_ids=ids_1T, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
        self._cache = out.past_key_values
        rows: Logits = out.logits[0].float().cpu().numpy()
        return rows

    def followed(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Logits]]:
        """See `BatchedModel.followed`. Rows are padded on the right, and the head sees wanted positions only."""
        shared = shared_length([context[:-1] for context, _ids in requests])
        cache = self._prefix(requests[0][0][:shared]) if shared else None
        windows = [[*context[shared:], *ids[:-1]] for context, ids in requests]
        for batch in by_length(windows, BATCH_TOKENS):
            ids_BT = torch.zeros(len(batch), len(windows[batch[0]]), dtype=torch.long)
            for row, number in enumerate(batch):
                ids_BT[row, : len(windows[number])] = torch.tensor(windows[number])
            with torch.inference_mode():
                held = None if cache is None else _repeated(cache, len(batch))
                hidden_BTD = self.model.base_model(
                    input_ids=ids_BT.to(self.model.device), past_key_values=held, use_cache=held is not None
                ).last_hidden_state
                for row, number in enumerate(batch):
                    begin = len(requests[number][0]) - 1 - shared
                    wanted_TD = hidden_BTD[row, begin : len(windows[number])]
                    yield number, self.model.get_output_embeddings()(wanted_TD).float().cpu().numpy()

    def greedy(
        self, prompts: Sequence[Sequence[int]], limit: int, ended: Callable[[int, list[int]], bool]
    ) -> list[list[int]]:
        """See `BatchedModel.greedy`. Prompts are padded on the left; rows that have ended leave the batch.

        A sliding layer counts its window in slots, padding included, so there nothing is shared.
        """
        shared = 0 if self._slides() else shared_length([ids[:-1] for ids in prompts])
        cache = self._prefix(prompts[0][:shared]) if shared else None
        rest = [list(ids[shared:]) for ids in prompts]
        new: list[list[int]] = [[] for _ in prompts]
        for batch in by_length(rest, BATCH_TOKENS):
            self._greedy_batch([rest[number] for number in batch], batch, (cache, shared), new, limit, ended)
        return new

    def _greedy_batch(
        self, rest: list[list[int]], numbers: list[int], prefix: tuple[Any, int], new: list[list[int]], limit: int,
        ended: Callable[[int, list[int]], bool],
    ) -> None:  # fmt: skip
        """Continue one batch; what is new is added to `new` under each row's number."""
        cache, shared = prefix
        width = len(rest[0])
        ids_BT = torch.zeros(len(rest), width, dtype=torch.long)
        seen_BC = torch.ones(len(rest), shared + width, dtype=torch.long)
        for row, ids in enumerate(rest):
            ids_BT[row, width - len(ids) :] = torch.tensor(ids)
            seen_BC[row, shared : shared + width - len(ids)] = 0
        places_BT = (seen_BC.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        with torch.inference_mode():
            cache = None if cache is None else _repeated(cache, len(rest))
            for _ in range(limit):
                out = self.model(
                    input_ids=ids_BT.to(self.model.device), attention_mask=seen_BC.to(self.model.device),
                    position_ids=places_BT.to(self.model.device), past_key_values=cache, use_cache=True,
                    logits_to_keep=1,
                )  # fmt: skip
                cache = out.past_key_values
                ids_BT = out.logits[:, -1].argmax(-1, keepdim=True).cpu()
                for row, number in enumerate(numbers):
                    new[number].append(int(ids_BT[row, 0]))
                going = [row for row, number in enumerate(numbers) if not ended(number, new[number])]
                if not going:
                    return
                if len(going) < len(numbers):
                    rows = torch.tensor(going)
                    cache.batch_select_indices(rows.to(self.model.device))
                    ids_BT, seen_BC, places_BT = ids_BT[rows], seen_BC[rows], places_BT[rows]
                    numbers = [numbers[row] for row in going]
                seen_BC = torch.cat([seen_BC, torch.ones(len(going), 1, dtype=torch.long)], -1)
                places_BT = places_BT[:, -1:] + 1

    def _prefix(self, ids: Sequence[int]) -> Any:
        """The cache that holds some ids."""
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        with torch.inference_mode():
            return self.model.base_model(input_ids=ids_1T, use_cache=True).past_key_values

    def close(self) -> None:
        """Drop the cache."""
        self._cache = None


def shared_length(contexts: Sequence[Sequence[int]]) -> int:
    """How many ids all contexts begin with; 0 where that is too few to be worth a call."""
    same = common_length(contexts)
    return same if len(contexts) > 1 and same >= MIN_SHARED else 0


def by_length(windows: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Numbers of windows in batches of so many tokens, the longest first, so that little is padding."""
    order = sorted(range(len(windows)), key=lambda number: -len(windows[number]))
    while order:
        size = max(1, tokens // max(len(windows[order[0]]), 1))
        yield order[:size]
        order = order[size:]


def _repeated(cache: Any, rows: int) -> Any:
    """A copy of a cache of one row, for so many rows."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(rows)
    return copied


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
    if config.get("quantization_config") is not None:
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
    """The transformers model of a float HF folder, loaded silently.

    Raises:
        BadFileError: transformers cannot build what config.json says, or a weight holds NaN or infinity.
    """
    model = built_from(folder, dtype=dtype)
    check_finite(model, folder)
    return model


def built_from(folder: Path, **settings: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained` of a local folder, silent, its refusals in our words.

    Raises:
        BadFileError: transformers cannot build what config.json says.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, **settings)
    except (ArithmeticError, AttributeError, KeyError, StrictDataclassError, TypeError, ValueError) as error:
        raise BadFileError(
            "transformers cannot build this model.",
            found=f"{type(error).__name__}: {' '.join(str(error).split())} ({folder})",
            todo="correct config.json: a value of another type, or of a newer version of transformers",
        ) from error


def check_finite(model: torch.nn.Module, folder: Path) -> None:
    """Refuse a model of which a weight is NaN or infinite: all that follows would be worthless.

    Raises:
        BadFileError: names the first such weight, and how many of its numbers.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            refuse_not_finite(name, weight, folder)


def refuse_not_finite(name: str, tensor: torch.Tensor, folder: Path) -> NoReturn:
    """The error of a tensor that holds NaN or infinity.

    Raises:
        BadFileError: always.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    raise BadFileError(
        f"'{name}' holds numbers that are not finite.",
        found=f"{bad} of {tensor.numel()} are NaN or infinite, in {folder}",
        todo="train or convert the model again; a half-precision overflow is the usual cause",
    )
