"""onnxruntime-genai's own model builder on a float folder of the same weights, and its generator for `bench_worker`.

The builder (0.18) quantizes again, with 32 in a group: its codes differ from ours, its speed does not. Of Gemma 3 it
cannot read transformers 5's rope settings, so the shapes that are compared are of the other families.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 2048
OPTIONS = ("int4_accuracy_level=4", "int4_block_size=32", "shared_embeddings=true", "hf_token=false")


def write_float(int4: Path, folder: Path) -> None:
    """The dequantised model in float16, one tensor in memory at a time."""
    import torch

    from nano.checkpoint import CheckpointWriter
    from nano.shapes import read_config
    from nano.tokens import copy_tokenizer
    from quantize.packed import Int4Checkpoint

    folder.mkdir(parents=True)
    config = {**read_config(int4), "dtype": "float16"}
    config.pop("quantization_config")
    with Int4Checkpoint(int4) as checkpoint, CheckpointWriter(folder) as writer:
        for name, tensor in checkpoint.dense_tensors():
            writer.add(name, tensor.to(torch.float16))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_tokenizer(int4, folder)


def build(int4: Path, out: Path) -> None:
    """Write the builder's artifact."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        write_float(int4, Path(scratch, "float"))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(Path(scratch, "float")), "-o",
                   str(out), "-p", "int4", "-e", "cpu", "-c", scratch, "--extra_options", *OPTIONS]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(out, ignore_errors=True)
        raise RuntimeError(done.stderr[-2000:])


class GenaiModel:
    """onnxruntime-genai's generator, with the two calls that are measured."""

    def __init__(self, genai: Any, folder: Path, threads: int) -> None:
        config = genai.Config(str(folder))
        options = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0"}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai, self._model = genai, genai.Model(config)

    def prefill(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits after a prompt."""
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=CONTEXT, do_sample=False)
        self._generator = self._genai.Generator(self._model, parameters)
        self._generator.append_tokens(np.array(ids, np.int32))
        return self._logits()

    def decode(self, token: int) -> np.ndarray[Any, Any]:
        """Logits after one more token."""
        self._generator.append_tokens(np.array([token], np.int32))
        return self._logits()

    def _logits(self) -> np.ndarray[Any, Any]:
        row: np.ndarray[Any, Any] = self._generator.get_logits().reshape(-1)
        return row


def prepare(folder: Path, threads: int) -> Callable[[], GenaiModel]:
    """Import onnxruntime-genai; a function that loads the model."""
    import onnxruntime_genai as genai

    return lambda: GenaiModel(genai, folder, threads)
