"""Run an ONNX bundle: in a plain onnxruntime session behind `LanguageModel`, and in onnxruntime-genai.

The caches are allocated once, at the context's length (sliding layers: window + slack), and each is bound as input
and as output, so the attention writes in place and a step copies nothing. The operator finds its place by the
attention mask's length alone, so emptying the context is setting a number.

Legend: B batch (1), T positions of a call, V vocabulary, G key/value heads, A head width.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.onnx_files import CONFIG, DATA, SESSION_OPTIONS, check_files, model_path
from nano.errors import BadFileError, RequestError, require_module
from nano.lm import Activations, Logits
from nano.tokens import TextTokenizer, load_tokenizer

THREADS = "NANOKIT_THREADS"
"""Environment variable: how many threads the runtime may use; all cores where it is not set."""


class OnnxModel:
    """A plain onnxruntime session with its caches; see `LanguageModel`.

    Args:
        session: of model.onnx.
        tokenizer: of the bundle.
    """

    def __init__(self, session: Any, tokenizer: TextTokenizer) -> None:
        facts = {k.removeprefix("nanokit."): v for k, v in session.get_modelmeta().custom_metadata_map.items()}
        self.tokenizer = tokenizer
        self.context, self.chunk = int(facts["context"]), int(facts["chunk"])
        self.activations: Activations = "int8-ort" if facts["activations"] == "int8" else "float"
        self.vocab_size = int(session.get_outputs()[0].shape[-1])
        self._all = facts["logits"] == "all"
        self._windowed = "cache_slots" in facts
        self._session: Any = session
        self._binding = session.io_binding()
        self._position = 0
        self._bind_caches(facts)

    def _bind_caches(self, facts: dict[str, str]) -> None:
        ort = require_module("onnxruntime", "onnx")
        for value in self._session.get_inputs()[2:]:
            _batch, heads, slots, width = value.shape
            length = int(facts["cache_slots"]) if "sliding" in slots else self.context
            # not zeroed: pages that no position has reached yet stay unallocated
            cache = ort.OrtValue.ortvalue_from_shape_and_type([1, heads, length, width], np.float32, "cpu")
            self._binding.bind_ortvalue_input(value.name, cache)
            self._binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)

    def logits(self, windows: Sequence[npt.NDArray[np.int64]]) -> list[Logits]:
        """See `LanguageModel.logits`: one call a window, or one a token where the graph gives the last row only."""
        out: list[Logits] = []
        for window in windows:
            self._position = 0
            pieces = [window] if self._all else [window[i : i + 1] for i in range(len(window))]
            out.append(np.concatenate([self._step(piece) for piece in pieces]))
        return out

    def prefill(self, ids: Sequence[int]) -> Logits:
        """See `LanguageModel.prefill`; takes the prompt in chunks."""
        self._position = 0
        return self.extend(ids)

    def decode(self, token: int) -> Logits:
        """See `LanguageModel.decode`."""
        return self.extend([token])

    def extend(self, ids: Sequence[int]) -> Logits:
        """See `LanguageModel.extend`."""
        for start in range(0, len(ids), self.chunk):
            last = self._step(np.asarray(ids[start : start + self.chunk], np.int64))
        row: Logits = last[-1]
        return row

    def extend_all(self, ids: Sequence[int]) -> Logits:
        """See `LanguageModel.extend_all`: in chunks, or a token a call where the graph gives the last row only."""
        step = self.chunk if self._all else 1
        pieces = (np.asarray(ids[i : i + step], np.int64) for i in range(0, len(ids), step))
        return np.concatenate([self._step(piece) for piece in pieces])

    def rewind(self, length: int) -> bool:
        """See `LanguageModel.rewind`: the place is a number, but a windowed cache has evicted what came before."""
        if length and self._windowed:
            return False
        self._position = length
        return True

    def _step(self, ids_T: npt.NDArray[np.int64]) -> Logits:
        """Logits of a call: (T, V), or (1, V) where the graph gives the last row only."""
        end = self._position + len(ids_T)
        if not len(ids_T) or end > self.context:
            raise RequestError(
                "The text does not fit the bundle.", found=f"{end} positions", expected=f"1 to {self.context}"
            )
        self._binding.bind_cpu_input("input_ids", ids_T[None])
        self._binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        self._position = end
        logits: Logits = self._binding.get_outputs()[-1].numpy()[0]
        return logits

    def close(self) -> None:
        """Free the session and the caches."""
        self._binding = self._session = None


def open_onnx(folder: Path, tokenizer: TextTokenizer | None = None) -> OnnxModel:
    """An ONNX bundle behind the `LanguageModel` protocol.

    Args:
        folder: the bundle.
        tokenizer: the bundle's, where it is open already.

    Raises:
        BadFileError: a file is missing or truncated, or the runtime cannot read it.
        MissingExtraError: onnxruntime is not installed.
    """
    check_files(folder)
    session = open_session(folder)
    if "nanokit.context" not in session.get_modelmeta().custom_metadata_map:
        raise BadFileError("This ONNX model was not made by nanokit.", found=str(model_path(folder)))
    return OnnxModel(session, tokenizer or load_tokenizer(folder, int(session.get_outputs()[0].shape[-1])))


def open_session(folder: Path) -> Any:
    """A plain onnxruntime session of a bundle's model, with the options that its genai_config.json gives.

    Raises:
        BadFileError: the runtime cannot read the model.
        MissingExtraError: onnxruntime is not installed.
    """
    ort, path = require_module("onnxruntime", "onnx"), model_path(folder)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in SESSION_OPTIONS.items():
        options.add_session_config_entry(key, value)
    if os.environ.get(THREADS, "").isdigit():
        options.intra_op_num_threads = int(os.environ[THREADS])
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises bare pybind exceptions of many kinds
        raise BadFileError("ONNX Runtime cannot read this bundle.", found=f"{path}: {error}") from None
    give_back_pages(folder / DATA)
    return session


def give_back_pages(path: Path) -> None:
    """Let go of a mapped file's pages in this process; what is used again comes back from the page cache.

    While loading, MLAS reads all scales and keeps them in its own layout. The file's pages of them stay resident (a
    fifth of the file at 32 in a group) although nothing reads them again. Mappings that were written to are left
    alone. Nothing happens where there is no /proc.
    """
    if not sys.platform.startswith("linux"):
        return
    madvise, dont_need = ctypes.CDLL(None).madvise, 4  # MADV_DONTNEED, linux/mman.h
    mapped, addresses = str(path.resolve()), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if not fields[0].endswith(":"):
            addresses = fields[0] if fields[-1] == mapped else ""
        elif addresses and fields[:2] == ["Anonymous:", "0"]:
            begin, end = (int(part, 16) for part in addresses.split("-"))
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), dont_need)


def run_genai(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """Continue a prompt greedily with onnxruntime-genai: its model, its tokenizer, its generator.

    Raises:
        BadFileError: the bundle is not whole.
        MissingExtraError: onnxruntime-genai is not installed.
    """
    tokenizer, new = genai_continuation(folder, prompt, max_new_tokens)
    return str(tokenizer.decode(np.array(new, np.int32)))


def genai_continuation(folder: Path, prompt: str, max_new_tokens: int) -> tuple[Any, list[int]]:
    """genai's tokenizer, and the new ids that its generator chooses greedily after a prompt."""
    genai = require_module("onnxruntime_genai", "onnx")
    check_files(folder)
    try:
        model = genai.Model(str(folder))
        tokenizer = genai.Tokenizer(model)
    except Exception as error:  # pybind exceptions of many kinds
        raise BadFileError("onnxruntime-genai cannot read this bundle.", found=f"{folder}: {error}") from None
    # genai's tokenizer leaves the beginning id to the caller; whether there is one, the bundle's own files say
    bos = load_tokenizer(folder).bos_id
    ids = np.array([*([] if bos is None else [bos]), *tokenizer.encode(prompt)], np.int32)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"]
    if not 0 < len(ids) < config["context_length"]:
        found, expected = f"{len(ids)} tokens", f"1 to {config['context_length'] - 1}"
        raise RequestError("The prompt does not fit.", found=found, expected=expected)
    # genai 0.18 makes no cache longer than max_length, but a sliding layer's must hold its whole window
    window = config["decoder"].get("sliding_window", {}).get("window_size", 0)
    limit = min(len(ids) + max_new_tokens, config["context_length"])
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=max(limit, window), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    new: list[int] = []
    while len(ids) + len(new) < limit and not generator.is_done():
        generator.generate_next_token()
        new.append(int(generator.get_next_tokens()[0]))
    return tokenizer, new
