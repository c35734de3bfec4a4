"""Every grid that quantize lets through for a runtime, through that runtime: codes bit for bit, logits as simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import relative

from device_profiles.footprint import RUNTIMES, EmbeddingBits, PlannedRecipe, manifest_facts, planned_facts
from export.options import ExportOptions
from export.run import run_export
from nano.errors import UnsupportedError
from nano.families import EMBEDDING
from nano.lm import open_model
from quantize.lm import open_int4_model
from quantize.options import QuantizeOptions
from quantize.packed import Int4Checkpoint
from quantize.rules import Rule
from quantize.run import run_quantize

EIGHT = Rule(r"model\.layers\.0\..*(down|q)_proj", 8)
BOTH: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "channel, int8 tied table": ("llama", True, {"group_size": "channel", "embedding": "int8"}),
    "int8 linears, int4 tied table": ("gemma3_text", True, {"rules": (EIGHT,), "embedding": "int4"}),
    "int4 table, int8 head": ("qwen3", False, {"embedding": "int4", "head": "int8", "group_size": 64}),
    "width 48": ("llama", True, {"embedding": "int4"}),
}
ONNX: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "asymmetric": ("qwen3", True, {"symmetry": "asymmetric", "embedding": "int4"}),
    "asymmetric channel": ("llama", False, {"symmetry": "asymmetric", "group_size": "channel", "head": "int8"}),
    "asymmetric int8 beside float": (
        "gemma3_text", True,
        {"rules": (Rule(".*q_proj", 8, 32, symmetric=False), Rule(".*o_proj", "float"), Rule(".*_proj", 4, 16))},
    ),
}  # fmt: skip
LOOSEST = 2e-2
"""int8 activations flip at rounding borders; where none does, the logits agree to float32's own precision."""


def make(name: str, runtime: Any, tiny_model: Callable[..., Path], out: Path) -> Path:
    family, tied, wishes = {**BOTH, **ONNX}[name]
    changes = {"hidden_size": 48, "head_dim": 16} if name == "width 48" else {}
    options = QuantizeOptions(**{"method": "rtn", "runtime": runtime, **wishes})
    run_quantize(tiny_model(family, tie_word_embeddings=tied, **changes), [], out, options)
    return out


@pytest.fixture(scope="module")
def texts() -> list[Any]:
    return [np.random.default_rng(seed).integers(3, 320, 40) for seed in range(4)]


@pytest.mark.parametrize("name", [*BOTH, *ONNX])
def test_onnx_runtime_computes_what_the_grid_says(
    name: str, tiny_model: Callable[..., Path], texts: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    int4 = make(name, "any" if name in BOTH else "onnx", tiny_model, tmp_path / "int4")
    expected = {kind: open_int4_model(int4, kind).logits(texts) for kind in ("float", "int8-ort")}  # type: ignore[arg-type]
    for activations in ("float", "int8"):
        out = tmp_path / activations
        manifest = run_export(int4, "onnx", out, ExportOptions(logits="all", activations=activations, chunk=16))  # type: ignore[arg-type]
        assert manifest.results["exact"]["differing"] == ()
        model = open_model(out)
        wanted = expected["float" if activations == "float" else "int8-ort"]
        lost = [relative(a, b) for a, b in zip(model.logits(texts), wanted, strict=True)]
        assert max(lost) < (3e-6 if activations == "float" else LOOSEST), lost
    written = manifest.recipe["modules"]
    with Int4Checkpoint(int4) as checkpoint:
        assert set(written) == set(checkpoint.modules)
        for module in checkpoint.modules:
            assert ("zero_points" in written[module]) == (not checkpoint.layout(module).symmetric)
            assert checkpoint.layout(module).columns % written[module]["group_size"] == 0


@pytest.mark.parametrize("name", BOTH)
def test_executorch_computes_what_the_grid_says(
    name: str, tiny_model: Callable[..., Path], texts: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("executorch")
    int4, out = make(name, "any", tiny_model, tmp_path / "int4"), tmp_path / "out"
    manifest = run_export(int4, "executorch", out, ExportOptions(logits="all", chunk=16))
    assert manifest.results["exact"]["differing"] == ()
    wanted = open_int4_model(int4, "int8-xnnpack").logits(texts)
    lost = [relative(a, b) for a, b in zip(open_model(out).logits(texts), wanted, strict=True)]
    assert min(lost) < 1e-5, lost
    assert max(lost) < LOOSEST, lost
    with Int4Checkpoint(int4) as checkpoint:
        bits = [checkpoint.layout(m).bits for m in checkpoint.modules if m.startswith("model.layers")]
        tied = checkpoint.shape.tied
        on_grid = EMBEDDING in checkpoint
    delegation = manifest.results["delegation"]
    assert (delegation["linears_int4"], delegation["linears_int8"]) == (bits.count(4), bits.count(8))
    assert on_grid == ("embedding_byte" in str(delegation["operators"]) or "embedding_4bit" in str(delegation["operators"]))  # noqa: E501  # fmt: skip
    if tied and on_grid:
        assert "lm_head" not in manifest.recipe["modules"]


def test_what_a_runtime_cannot_run_is_refused_at_export_too(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for name in ONNX:
        int4 = make(name, "onnx", tiny_model, tmp_path / name)
        with pytest.raises(UnsupportedError, match=r"executorch cannot take|on a grid for ExecuTorch"):
            run_export(int4, "executorch", tmp_path / "out", ExportOptions())
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("embedding", ["float", "int4", "int8"])
def test_the_forecast_of_bytes_is_what_is_written(
    embedding: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """`nanokit plan` and `check` count alike, tied and not, in both formats."""
    for tied in (True, False):
        int4 = tmp_path / f"int4-{tied}"
        options = QuantizeOptions(method="rtn", embedding=embedding, head=embedding)
        run_quantize(tiny_model("llama", tie_word_embeddings=tied), [], int4, options)
        for runtime in RUNTIMES:
            manifest = run_export(int4, runtime, tmp_path / f"{runtime}-{tied}", ExportOptions(chunk=16, context=64))
            written = manifest_facts(manifest, 0, "here")
            bits: EmbeddingBits = "float" if embedding == "float" else embedding[3:]
            recipe = PlannedRecipe(runtime, 32, bits, context=64, chunk=16)
            planned = planned_facts(written.shape, recipe)
            assert written.packed_source_bytes == planned.packed_source_bytes
            assert (written.float_head_bytes, written.kv_cache_bytes) == (planned.float_head_bytes, planned.kv_cache_bytes)  # noqa: E501  # fmt: skip
            if runtime == "executorch":  # rotation tables and the like are not planned for
                assert 0 <= written.mapped_bytes - planned.mapped_bytes < 40_000
            assert 0 < written.file_bytes - planned.file_bytes < 100_000
