"""ORT format: every family runs as its model.onnx does, codes are read back, and damage and sizes are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from export import onnx_ort
from export.onnx_files import check_files, model_path
from export.onnx_readback import read_codes
from export.onnx_runtime import genai_continuation, open_onnx
from export.options import ExportOptions
from export.run import run_export
from nano.errors import BadFileError, UnsupportedError
from nano.lm import generate
from quantize.packed import Int4Checkpoint


@pytest.mark.parametrize(
    ("family", "changes", "grid"),
    [
        ("llama", {}, {"embedding": True}),
        ("llama", {"tie_word_embeddings": False}, {"embedding": True, "bits": 8}),
        ("qwen3", {}, {}),
        ("gemma3_text", {}, {"embedding": True}),
    ],
)
def test_it_runs_as_the_onnx_file_does(
    family: str, changes: dict[str, Any], grid: dict[str, Any], tiny_model: Callable[..., Path],
    int4_folder: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    int4 = int4_folder(tiny_model(family, **changes), **grid)
    options = {"context": 96, "chunk": 8}
    run_export(int4, "onnx", tmp_path / "onnx", ExportOptions(**options))  # type: ignore[arg-type]
    manifest = run_export(int4, "onnx", tmp_path / "ort", ExportOptions(**options, ort=True))  # type: ignore[arg-type]
    models = sorted(path.name for path in (tmp_path / "ort").iterdir() if path.name.startswith("model"))
    assert models == ["model.ort"] == [model_path(tmp_path / "ort").name]
    assert manifest.footprint["file_bytes"] == (tmp_path / "ort" / "model.ort").stat().st_size
    plain, ort = open_onnx(tmp_path / "onnx"), open_onnx(tmp_path / "ort")
    ids = np.random.default_rng(1).integers(3, 320, 60)
    assert np.array_equal(plain.prefill(ids[:50].tolist()), ort.prefill(ids[:50].tolist()))
    assert np.array_equal(plain.decode(int(ids[50])), ort.decode(int(ids[50])))
    assert (ort.context, ort.chunk, ort.activations) == (96, 8, "int8-ort")
    with Int4Checkpoint(int4) as checkpoint:
        found = dict(read_codes(tmp_path / "ort"))
        assert set(found) == set(checkpoint.modules)
        for name, tensor in found.items():
            expected = checkpoint.quantized(name)
            assert torch.equal(tensor.codes_NK, expected.codes_NK)
            assert torch.equal(tensor.scale_NG, expected.scale_NG)
    ours = generate(ort, "Once upon", 20)
    assert genai_continuation(tmp_path / "ort", "Once upon", 20)[1][: len(ours)] == ours


def test_damage_is_told(tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_export(int4_folder(tiny_model("llama"), embedding=True), "onnx", out, ExportOptions(context=64, ort=True))
    path = out / "model.ort"
    whole = path.read_bytes()
    for broken in (b"", b"text of another kind", whole[: len(whole) // 2], whole[:-2000]):
        path.write_bytes(broken)
        with pytest.raises(BadFileError, match="truncated or not of the ORT format"):
            check_files(out)
    path.unlink()
    with pytest.raises(BadFileError, match="no model"):
        open_onnx(out)
    config = out / "genai_config.json"
    config.write_text(config.read_text().replace("model.ort", "../model.ort"))
    with pytest.raises(BadFileError, match="names a model that is not ours"):
        open_onnx(out)


def test_its_memory_is_measured_and_not_predicted(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path, nanokit: Callable[..., Any]
) -> None:
    """A forecast made for model.onnx would be less than half of what model.ort takes."""
    out = tmp_path / "out"
    run_export(int4_folder(tiny_model("llama"), embedding=True), "onnx", out, ExportOptions(context=64, ort=True))
    refused = nanokit("check", out, "--profile", "low-end")
    assert refused.status == 2
    assert "cannot be predicted" in refused.stderr
    assert "--measure" in refused.stderr
    assert nanokit("check", out, "--profile", "low-end", "--measure", "--no-record").status == 0


def test_what_cannot_be_written_is_refused_before_work(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int4 = int4_folder(tiny_model("llama"), embedding=True)
    codes = 2 * (12288 + 18432) + 2 * 20480  # a tied head stands in it twice; its scales are shared
    floats = 4 * (2 * (12288 + 18432) + 20480) // 32 + 4 * 5 * 64 + 4 * 64 * 16
    size = codes // 2 + floats + 8 * 6
    monkeypatch.setattr(onnx_ort, "LARGEST", size - 200)
    with pytest.raises(UnsupportedError, match="too large for the ORT format"):
        run_export(int4, "onnx", tmp_path / "out", ExportOptions(context=64, ort=True))
    monkeypatch.setattr(onnx_ort, "LARGEST", size + 200)
    run_export(int4, "onnx", tmp_path / "out", ExportOptions(context=64, ort=True))
    if pytest.importorskip("executorch"):
        with pytest.raises(UnsupportedError, match="ORT format is ONNX Runtime's"):
            run_export(int4, "executorch", tmp_path / "pte", ExportOptions(ort=True))
    with pytest.raises(UnsupportedError, match="Backends are ExecuTorch's"):
        run_export(int4, "onnx", tmp_path / "other", ExportOptions(backend="coreml"))
