"""Bundles asked by `nano.tasks.answering`: going back in the cache changes nothing, and shared ids are run once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("executorch")
pytest.importorskip("onnxruntime")

from checks import relative

from export.executorch_runtime import open_executorch
from export.onnx import write_onnx
from export.onnx_runtime import open_onnx
from export.options import ExportOptions
from nano.lm import BatchedModel
from nano.manifest import Manifest, write_manifest
from nano.shapes import read_config
from nano.tasks.answering import continuations, likelihoods, split
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.packed import Int4Checkpoint

SHOTS = "Tom saw a dog. The dog was big. Tom ran to the dog. "
PAIRS = [
    (SHOTS + "Lily had a red", " ball"), (SHOTS + "Lily had a red", " ball and a hat"),
    (SHOTS + "Lily had a red", " sky"), (SHOTS + "Mom said", " no"), (SHOTS + "Mom said", " hello"),
    ("A dog", " ran"),
]  # fmt: skip


@pytest.fixture
def opened(
    exported: Callable[..., Any], int4_folder: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> Callable[..., Any]:
    """`opened(runtime, family, logits)`: a bundle of a tiny model; Gemma's sliding layers keep 16 positions."""

    def call(runtime: str, family: str, logits: str) -> Any:
        int4 = int4_folder(tiny_model(family))
        if runtime == "executorch":
            folder = tmp_path / "pte"
            shutil.copytree(exported(int4, logits=logits, chunk=8)[0], folder)
            kinds = read_config(int4).get("layer_types") or ["full_attention"]
            write_manifest(folder, Manifest("executorch", shape={"layer_types": kinds}))
            return open_executorch(folder)
        with Int4Checkpoint(int4) as checkpoint:
            write_onnx(checkpoint, tmp_path, ExportOptions(logits=logits, chunk=8), load_tokenizer(int4))
        copy_tokenizer(int4, tmp_path)
        return open_onnx(tmp_path)

    return call


@pytest.mark.parametrize("runtime", ["executorch", "onnx"])
@pytest.mark.parametrize(("family", "logits"), [("llama", "last"), ("gemma3_text", "all")])
def test_a_bundle_goes_back_in_its_cache(
    runtime: str, family: str, logits: str, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(runtime, family, logits)
    assert not isinstance(model, BatchedModel)
    expected = [likelihoods(model, [pair])[0] for pair in PAIRS]  # each from an empty cache
    steps: list[int] = []
    step = model._step
    monkeypatch.setattr(model, "_step", lambda ids: (steps.append(len(ids)), step(ids))[1])
    found = likelihoods(model, PAIRS)
    for one, other in zip(found, expected, strict=True):
        assert one.total == pytest.approx(other.total, rel=2e-3), "a flipped int8 code at most"
        assert one.tokens == other.tokens
    whole = sum(len(context) + len(ids) - 1 for context, ids, _cut in (split(model, *pair) for pair in PAIRS))
    ran = sum(steps)
    if family == "gemma3_text":
        assert ran <= whole, "a ring forgets"
    else:
        assert ran < 0.45 * whole, "the examples and each question once"

    said = continuations(model, [SHOTS + "Lily", SHOTS + "Mom"], (), 6)
    alone = [continuations(model, [prompt], (), 6)[0] for prompt in (SHOTS + "Lily", SHOTS + "Mom")]
    assert [one.tokens for one in said] == [6, 6]
    assert said[0] == alone[0]


@pytest.mark.parametrize("runtime", ["executorch", "onnx"])
@pytest.mark.parametrize(("family", "logits"), [("llama", "last"), ("gemma3_text", "all")])
def test_rewinding_gives_the_rows_of_a_fresh_start(
    runtime: str, family: str, logits: str, opened: Callable[..., Any]
) -> None:
    model = opened(runtime, family, logits)
    ids = np.random.default_rng(0).integers(3, 320, 60).tolist()
    other = ids[:50] + ids[:8]
    whole = model.logits([np.array(other)])[0]
    model.prefill(ids[:56])
    went = model.rewind(50)
    assert went or (runtime, family) == ("onnx", "gemma3_text")
    if not went:
        assert model.rewind(0)
        model.prefill(other[:50])
    rows = model.extend_all(other[50:57])
    assert rows.shape == (7, 320)
    assert relative(rows, whole[50:57]) < 0.02
    assert relative(model.extend(other[57:]), whole[57]) < 0.02


def test_a_ring_that_has_moved_on_says_so(opened: Callable[..., Any]) -> None:
    """ExecuTorch's ring has room for a chunk beyond its window of 16: 8 ids may be taken back, not 30."""
    model = opened("executorch", "gemma3_text", "all")
    ids = np.random.default_rng(1).integers(3, 320, 80).tolist()
    model.prefill(ids)
    assert not model.rewind(50)
    assert model.rewind(72)
    fresh = model.logits([np.array(ids)])[0]
    model.prefill(ids)
    assert model.rewind(72)
    assert relative(model.extend_all(ids[72:]), fresh[72:]) < 0.02
