"""One way to ask any stage's model for logits: HF folder, int4 folder, .pte bundle, ONNX bundle.

`open_model` picks the opener by manifest.json's kind or config.json's quantization_config, never by a file's
name, and imports it by a string, so `nano` needs none of the rooms to its right.

Legend: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from nano.errors import BadFileError, RequestError
from nano.manifest import has_manifest, read_manifest
from nano.shapes import read_config
from nano.tokens import TextTokenizer

Logits = npt.NDArray[np.float32]
Activations = Literal["float", "int8-xnnpack", "int8-ort"]
"""How an int4 folder's linears see their input in torch: as it is, or quantized as a phone runtime does."""

_OPENERS = {
    "student": "nano.torch_lm:open_float",
    "int4": "quantize.lm:open_int4_model",
    "bitsandbytes": "quantize.bnb:open_bnb",
    "executorch": "export.executorch_runtime:open_executorch",
    "onnx": "export.onnx_runtime:open_onnx",
}


class LanguageModel(Protocol):
    """A model that gives next-token logits.

    Attributes:
        tokenizer: the tokenizer that lies beside it.
        context: how many positions it can hold.
        vocab_size: V.
        activations: how the linears see their inputs: "float", or int8 in the way of one phone runtime.
    """

    tokenizer: TextTokenizer
    context: int
    vocab_size: int
    activations: Activations

    def logits(self, windows: Sequence[npt.NDArray[np.int64]]) -> list[Logits]:
        """Logits of whole windows, each from an empty context: T ids give (T, V); row t predicts id t + 1."""

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Empty the context, take a prompt; logits (V,) after its last id."""

    def decode(self, token: int) -> Logits:
        """Take one more id; logits (V,) after it."""

    def extend(self, ids: Sequence[int]) -> Logits:
        """Take more ids, in chunks; logits (V,) after the last one."""

    def extend_all(self, ids: Sequence[int]) -> Logits:
        """Take more ids; logits (T, V) after each one."""

    def rewind(self, length: int) -> bool:
        """Forget all but the first `length` ids taken; False, and nothing is done, where its caches cannot."""

    def close(self) -> None:
        """Free what it holds."""


@runtime_checkable
class BatchedModel(Protocol):
    """What a `LanguageModel` may offer besides: many requests in one call."""

    def followed(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Logits]]:
        """For each request (ids of a context, ids after it) its number and the logits (T, V) that predict the latter.

        In whatever order is quick; what all contexts begin with is computed once.
        """

    def greedy(
        self, prompts: Sequence[Sequence[int]], limit: int, ended: Callable[[int, list[int]], bool]
    ) -> list[list[int]]:
        """The likeliest ids after each prompt: at most `limit`, or until `ended` (prompt's number, its new ids)."""


def common_length(texts: Sequence[Sequence[int]]) -> int:
    """How many ids all texts begin with."""
    shortest = min(texts, key=len)
    return next((i for i, token in enumerate(shortest) if any(text[i] != token for text in texts)), len(shortest))


def stage_of(folder: Path) -> str:
    """Which stage made a folder: "student" (any HF float folder), "int4", "bitsandbytes", "executorch" or "onnx"."""
    if has_manifest(folder):
        return read_manifest(folder).kind
    config = read_config(folder)
    quantization = config.get("quantization_config")
    if quantization is None:
        return "student"
    if isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors":
        return "int4"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method == "bitsandbytes":
        return "bitsandbytes"
    raise BadFileError(
        "This model is quantized in a form that nanokit does not read.",
        found=f"quant_method {method!r} in {folder}",
        expected="a float model, compressed-tensors pack-quantized int4, or bitsandbytes",
    )


def open_model(folder: Path, *, activations: Activations = "float") -> LanguageModel:
    """Open any stage's output.

    Args:
        folder: an HF folder, an int4 folder or a bundle.
        activations: only for int4 folders; bundles run their runtime's own kernels.

    Raises:
        BadFileError: not a model folder, or broken.
        RequestError: `activations` asked of a model that has no int4 linears.
    """
    stage = stage_of(folder)
    if activations != "float" and stage != "int4":
        raise RequestError(
            "Only an int4 folder's activations can be simulated.",
            found=f"--activations {activations} for {folder}, which is of kind '{stage}'",
            todo="leave --activations out, or name the int4 folder",
        )
    module, function = _OPENERS[stage].split(":")
    opener = getattr(importlib.import_module(module), function)
    model: LanguageModel = opener(folder, activations) if stage == "int4" else opener(folder)
    return model


def generate(
    model: LanguageModel, prompt: str, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[int]:
    """New ids after a prompt: greedy at temperature 0, else sampled; stops at an end id or a full context."""
    ids = model.tokenizer.prompt(prompt)
    if not ids:
        raise RequestError(
            "The prompt is empty.", found="no tokens, and this model has no beginning id", todo="--prompt TEXT"
        )
    if len(ids) >= model.context:
        raise RequestError(
            "The prompt is too long.", found=f"{len(ids)} tokens", expected=f"fewer than the context, {model.context}"
        )
    random = np.random.default_rng(seed)
    new: list[int] = []
    logits = model.prefill(ids)
    while len(new) < max_new_tokens:
        token = _pick(logits, temperature, random)
        if token in model.tokenizer.eos_ids:
            break
        new.append(token)
        if len(new) == max_new_tokens or len(ids) + len(new) >= model.context:
            break
        logits = model.decode(token)
    return new


def _pick(logits: Logits, temperature: float, random: np.random.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(len(weights), p=weights / weights.sum()))
