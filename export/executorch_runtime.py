"""Run a .pte bundle: in ExecuTorch's runtime behind `LanguageModel`, and in its C++ LLM runner.

The runtime's extension module is imported by itself: `executorch.runtime` and the wheel's Python modules beside it pull
in the compiler, 130 MB of it.

Everything about the model is read from the file itself: context and chunk from its metadata methods, the rest from
the sizes of its outputs. The cache lives in the program's memory; a call at position 0 begins a new text, because
nothing beyond the current position is ever attended to.

Legend: T positions of a call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.executorch_file import MODEL, check_whole
from export.executorch_memory import unlock
from export.silence import silenced
from nano.errors import BadFileError, RequestError, require_module
from nano.lm import Activations, Logits
from nano.manifest import has_manifest, read_manifest
from nano.shapes import SLIDING
from nano.tokens import FILE as TOKENIZER
from nano.tokens import TextTokenizer, load_tokenizer


class ExecutorchModel:
    """A loaded program; see `LanguageModel`.

    Args:
        program: an `ExecuTorchProgram` of the runtime's extension module.
        tokenizer: of the bundle.
        slides: whether a layer may keep a ring of positions; the program does not say.
    """

    activations: Activations = "int8-xnnpack"

    def __init__(self, program: Any, tokenizer: TextTokenizer, slides: bool = True) -> None:
        self.tokenizer = tokenizer
        self.context = int(_constant(program, "get_max_context_len"))
        self.chunk = int(_constant(program, "get_max_seq_len"))
        self._program: Any = program
        self._forward: Any = program.load_method("forward")
        rows, self.vocab_size = self._forward.method_meta().output_tensor_meta(0).sizes()[-2:]
        self._all = rows == self.chunk
        self._position = 0
        self._rewindable = self.chunk if slides else self.context

    def logits(self, windows: Sequence[npt.NDArray[np.int64]]) -> list[Logits]:
        """See `LanguageModel.logits`: a chunk a call, or a token where the program gives the last row only."""
        step = self.chunk if self._all else 1
        out: list[Logits] = []
        for window in windows:
            self._position = 0
            out.append(np.concatenate([self._step(window[i : i + step]) for i in range(0, len(window), step)]))
        return out

    def prefill(self, ids: Sequence[int]) -> Logits:
        """See `LanguageModel.prefill`; takes the prompt in chunks."""
        self._position = 0
        if not ids:
            raise RequestError("The prompt is empty.", expected="at least one token")
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
        """See `LanguageModel.extend_all`: in chunks, or a token a call where the program gives the last row only."""
        step = self.chunk if self._all else 1
        pieces = (np.asarray(ids[i : i + step], np.int64) for i in range(0, len(ids), step))
        return np.concatenate([self._step(piece) for piece in pieces])

    def rewind(self, length: int) -> bool:
        """See `LanguageModel.rewind`: the place is a number, but a ring has room for a chunk beyond its window only."""
        if length and self._position - length > self._rewindable:
            return False
        self._position = length
        return True

    def _step(self, ids_T: npt.NDArray[np.int64]) -> Logits:
        """Logits of a call: (T, V), or (1, V) where the program gives the last row only."""
        import torch

        end = self._position + len(ids_T)
        if end > self.context:
            raise RequestError(
                "The text does not fit the bundle.", found=f"{end} positions", expected=f"at most {self.context}"
            )
        inputs = (torch.from_numpy(ids_T)[None], torch.tensor([self._position]))
        logits: Logits = self._forward(inputs)[0][0].numpy()
        self._position = end
        return logits

    def close(self) -> None:
        """Free the program and its memory."""
        self._forward = self._program = None


def _constant(program: Any, method: str) -> int:
    """What a metadata method gives."""
    if method not in {program.get_method_name(i) for i in range(program.num_methods())}:
        raise BadFileError(
            "This .pte is not a language model of ours.",
            found=f"no method '{method}'",
            expected="a bundle that nanokit export wrote",
        )
    return int(program.load_method(method)(())[0])


def load_kernels() -> Any:
    """ExecuTorch's runtime, with the operators that a program of ours calls besides the portable ones registered.

    Raises:
        MissingExtraError: executorch is not installed.
    """
    import torch

    runtime = require_module("executorch.extension.pybindings._portable_lib", "executorch")
    root = Path(runtime.__file__ or "").parent.parent.parent
    for pattern in ("kernels/quantized/*quantized_ops_aot_lib.*", "extension/llm/custom_ops/*custom_ops_aot_lib.*"):
        for library in root.glob(pattern):
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    return runtime


def set_threads(count: int) -> None:
    """Give ExecuTorch's thread pool so many threads, before anything is loaded. Its own choice is the fast cores.

    Raises:
        MissingExtraError: executorch is not installed.
    """
    library = load_kernels()
    if library._threadpool_get_thread_count() != count:
        library._unsafe_reset_threadpool(count)


def open_executorch(folder: Path, tokenizer: TextTokenizer | None = None) -> ExecutorchModel:
    """A .pte bundle behind the `LanguageModel` protocol.

    Args:
        folder: the bundle.
        tokenizer: the bundle's, where it is open already.

    Raises:
        BadFileError: a file is missing, truncated or not a program of ours.
        MissingExtraError: executorch is not installed.
    """
    check_whole(folder)
    with silenced():
        runtime = load_kernels()
        try:
            checked = runtime.Verification.InternalConsistency
            program = runtime._load_program(str(folder / MODEL), program_verification=checked)
            unlock(folder / MODEL)
            slides = not has_manifest(folder) or SLIDING in read_manifest(folder).shape.get("layer_types", (SLIDING,))
            model = ExecutorchModel(program, tokenizer or load_tokenizer(folder), slides)
            model.prefill([0])  # the first call starts the thread pool, which talks; the next prefill forgets it
        except RuntimeError as error:
            raise BadFileError("ExecuTorch cannot read this bundle.", found=f"{folder / MODEL}: {error}") from None
    return model


def run_llm_runner(folder: Path, prompt: str, max_new_tokens: int) -> str:
    """Continue a prompt greedily with ExecuTorch's C++ `TextLLMRunner`: its tokenizer, prefill and sampling loop.

    This is the code behind `LlmModule` on Android and iOS, so it shows that they take the bundle as it is.

    Returns:
        The new text alone.

    Raises:
        BadFileError: the bundle is not whole, or the runner cannot read it.
        MissingExtraError: executorch is not installed.
    """
    check_whole(folder)
    tokenizer = load_tokenizer(folder)
    pieces: list[str] = []
    with silenced():
        load_kernels()
        runner = require_module("executorch.extension.llm.runner", "executorch")
        try:
            loaded = runner.TextLLMRunner(str(folder / MODEL), str(folder / TOKENIZER))
            config = runner.GenerationConfig(
                echo=False,
                max_new_tokens=max_new_tokens,
                temperature=0.0,
                num_bos=0 if tokenizer.bos_id is None else 1,
                num_eos=0,
            )
            loaded.generate(prompt, config, token_callback=pieces.append)
        except RuntimeError as error:
            raise BadFileError("ExecuTorch's runner cannot run this bundle.", found=f"{folder}: {error}") from None
    return "".join(pieces)
