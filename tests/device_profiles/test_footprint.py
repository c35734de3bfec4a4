"""The forecast's arithmetic by hand, and its parts against what the exporters write."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from device_profiles.footprint import (
    RUNTIMES,
    PlannedRecipe,
    Runtime,
    cache_bytes,
    live_bytes,
    manifest_facts,
    planned_facts,
    planned_parts,
    predict,
    runtime_constants,
)
from nano.errors import BadFileError, RequestError
from nano.manifest import Manifest
from nano.shapes import FULL, SLIDING, ModelShape
from nano.solve import canonical_shape

LLAMA = ModelShape("llama", 1000, 64, 160, 3, 4, 2, 16, True, 512, (FULL,) * 3, None)
GEMMA = ModelShape("gemma3_text", 1000, 64, 160, 3, 4, 1, 32, True, 4096, (SLIDING, SLIDING, FULL), 100)


def test_bytes_of_the_file_by_hand() -> None:
    """q 64x64, k and v 32x64, o 64x64, gate and up 160x64, down 64x160: a scale for every 32 columns."""
    codes = (64 * 64 + 2 * 32 * 64 + 64 * 64 + 2 * 160 * 64 + 64 * 160) // 2
    groups = 64 * 2 + 2 * 32 * 2 + 64 * 2 + 2 * 160 * 2 + 64 * 5
    executorch = planned_parts(LLAMA, PlannedRecipe("executorch"))
    onnx = planned_parts(LLAMA, PlannedRecipe("onnx"))
    assert executorch["linears"] == 3 * (codes + 2 * groups)
    assert onnx["linears"] == 3 * (codes + 4 * groups)
    assert (executorch["embedding"], executorch["head"]) == (1000 * (32 + 2 * 2), 1000 * 2 * 2), "codes stand once"
    assert (onnx["embedding"], onnx["head"]) == (1000 * (32 + 2 * 4), 0)
    assert executorch["norms"] == 4 * (3 * 2 * 64 + 64)
    assert planned_parts(LLAMA, PlannedRecipe("onnx", embedding="8"))["embedding"] == 1000 * (64 + 4)
    assert planned_parts(LLAMA, PlannedRecipe("onnx", embedding="float"))["embedding"] == 4 * 1000 * 64
    odd = LLAMA.resized(intermediate_size=172)
    assert planned_parts(odd, PlannedRecipe("onnx"))["linears"] == planned_parts(LLAMA.resized(intermediate_size=192), PlannedRecipe("onnx"))["linears"] - 3 * 2 * 20 * 2 * (16 + 4)  # noqa: E501  # fmt: skip


def test_sliding_layers_hold_their_window_and_a_chunk() -> None:
    per_slot = 2 * 1 * 32 * 4
    assert cache_bytes(GEMMA, "onnx", 1024, 64) == (2 * (100 + 64) + 1024) * per_slot
    assert cache_bytes(GEMMA, "executorch", 1024, 64) == (2 * (100 + 63) + 1024) * per_slot
    assert cache_bytes(GEMMA, "onnx", 120, 64) == 3 * 120 * per_slot
    assert cache_bytes(LLAMA, "onnx", 512, 64) == 3 * 512 * 2 * 2 * 16 * 4


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_prediction_is_the_documented_formula(runtime: Runtime) -> None:
    facts = planned_facts(GEMMA, PlannedRecipe(runtime, context=1024, chunk=64, tokenizer_bytes=10_000))
    c = runtime_constants(runtime)
    footprint = predict(facts)
    assert footprint.packed_weights == round(c.packed_per_byte * facts.packed_source_bytes)
    assert footprint.kv_cache == cache_bytes(GEMMA, runtime, 1024, 64)
    assert footprint.arena == round(c.arena_per_byte * live_bytes(GEMMA, 64, 1024, c.scores))
    assert footprint.logits == 4 * 1000
    assert footprint.tokenizer == round(c.tokenizer_per_byte * 10_000)
    assert footprint.mapped_weights == facts.mapped_bytes
    assert footprint.dirty == footprint.resident - footprint.mapped_weights
    assert footprint.resident == sum(footprint.by_cause().values())


def test_constants_were_measured() -> None:
    for runtime in RUNTIMES:
        c = runtime_constants(runtime)
        assert c.packed_per_byte > 0.9, "both runtimes keep a packed copy"
        assert c.error < 0.1
        assert c.measured.startswith("20")


def test_a_float_head_is_packed_too() -> None:
    on_grid = predict(planned_facts(LLAMA, PlannedRecipe("onnx", context=512)))
    floating = predict(planned_facts(LLAMA, PlannedRecipe("onnx", context=512, embedding="float")))
    assert floating.packed_weights > on_grid.packed_weights + 0.5 * 4 * 1000 * 64


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_memory_never_shrinks_as_the_context_grows(runtime: Runtime) -> None:
    shape = canonical_shape("nano-1")
    peaks = [predict(planned_facts(shape, PlannedRecipe(runtime, context=c))).resident for c in (1, 64, 500, 700, 4096, 32768)]  # noqa: E501  # fmt: skip
    assert peaks == sorted(peaks)


def _manifest(**footprint: Any) -> Manifest:
    facts = {
        "linear_bytes": 1000, "packed_copy_bytes": 1500, "embedding_bytes": 500, "float_weight_bytes": 10,
        "kv_cache_bytes": 4096, "logits_bytes": 40, "context": 128, "chunk": 64, "file_bytes": 1600,
    }  # fmt: skip
    facts.update(footprint)
    return Manifest(kind="onnx", footprint=facts, shape=dataclasses.asdict(LLAMA))


def test_facts_of_a_manifest() -> None:
    facts = manifest_facts(_manifest(), 77, "x/manifest.json")
    assert (facts.packed_source_bytes, facts.mapped_bytes, facts.tokenizer_bytes) == (1500, 510, 77)
    assert facts.float_head_bytes == 0
    assert facts.shape == LLAMA
    assert manifest_facts(_manifest(packed_copy_bytes=1000), 0, "x").float_head_bytes == 4 * 1000 * 64


@pytest.mark.parametrize("broken", [{"kv_cache_bytes": None}, {"chunk": "64"}, {"file_bytes": -1}, {"context": True}])
def test_a_manifest_without_a_fact_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(BadFileError, match="lacks a fact") as raised:
        manifest_facts(_manifest(**broken), 0, "x/manifest.json")
    assert f"footprint.{next(iter(broken))}" in str(raised.value)


def test_a_manifest_without_a_shape_is_refused() -> None:
    with pytest.raises(BadFileError, match="does not describe the model"):
        manifest_facts(dataclasses.replace(_manifest(), shape={}), 0, "x")


@pytest.mark.parametrize("context", [0, -4, 4097])
def test_a_context_beyond_the_model_is_refused(context: int) -> None:
    with pytest.raises(RequestError, match="does not fit the model"):
        planned_facts(GEMMA, PlannedRecipe(context=context))
