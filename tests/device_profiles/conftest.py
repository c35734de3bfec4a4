"""One small real bundle, exported once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """A random two-layer Llama of 256 positions, int4, as an ONNX bundle."""
    pytest.importorskip("onnxruntime")
    from export.options import ExportOptions
    from export.run import run_export
    from quantize.options import QuantizeOptions
    from quantize.run import run_quantize

    home = tmp_path_factory.mktemp("small")
    run_quantize(tiny_model("llama"), [], home / "int4", QuantizeOptions(method="rtn"))
    run_export(home / "int4", "onnx", home / "onnx", ExportOptions(context=256))
    return home / "onnx"
