"""docs/mobile.md: every field of manifest.json that it names exists, and its session options do what it says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("executorch")

from export.bench import as_dict, run_bench  # noqa: E402
from export.onnx_runtime import OnnxModel, genai_continuation, open_onnx, open_session  # noqa: E402
from export.options import ExportOptions  # noqa: E402
from export.run import run_export  # noqa: E402
from nano.manifest import add_results  # noqa: E402

DOCUMENT = (Path(__file__).parents[2] / "docs" / "mobile.md").read_text(encoding="utf-8")
ROOTS = "footprint|results|shape|files|versions|recipe|inputs"
SECTIONS = {title.splitlines()[0]: title for title in DOCUMENT.split("\n## ")[1:]}


def named(text: str) -> set[str]:
    """Paths in the manifest that a text names: in `backticks`, in "strings" of code, or after // in it."""
    return set(re.findall(rf"(?:`|\"|// )((?:{ROOTS})(?:\.\w+)+)", text))


@pytest.fixture(scope="module")
def bundles(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One of each format; the ONNX one measured too."""
    int4 = int4_folder(tiny_model("gemma3_text"), embedding=True)
    made = {}
    for format in ("onnx", "executorch"):
        made[format] = tmp_path_factory.mktemp(format) / "bundle"
        run_export(int4, format, made[format], ExportOptions(context=64, chunk=8))  # type: ignore[arg-type]
    found = as_dict(run_bench(made["onnx"], threads=1, prompt=8, decode=2, repeat=1))
    for folder in made.values():
        add_results(folder, {"bench": found})
    return made


def test_every_field_it_names_exists(bundles: dict[str, Path]) -> None:
    checked = set()
    for title, text in SECTIONS.items():
        formats = [f for f, word in (("executorch", "ExecuTorch on"), ("onnx", "GenAI on")) if word in title]
        for format in formats or bundles:
            manifest: Any = json.loads((bundles[format] / "manifest.json").read_text())
            for path in named(text):
                value = manifest
                for key in path.split("."):
                    assert key in value, f"{path}, named in '{title}', is not in the manifest of {format}"
                    value = value[key]
                checked.add(path)
    assert len(checked) >= 14, sorted(checked)
    assert {"footprint.packed_copy_bytes", "results.graph.minimum_onnxruntime", "results.bench.dirty.median"} <= checked


def test_versions_it_names_are_those_that_the_tests_run_with() -> None:
    from importlib.metadata import version

    assert f"executorch {version('executorch')}" in DOCUMENT
    assert f"onnxruntime-android:{version('onnxruntime')}" in DOCUMENT
    assert f"onnxruntime-genai-android-{version('onnxruntime-genai')}.aar" in DOCUMENT


@pytest.mark.filterwarnings("ignore:Ignoring unknown external data")
def test_its_session_options_keep_packed_weights_in_the_file(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The keys as the Kotlin code gives them, in the Python session, which is the same library."""
    keys = dict(re.findall(r"addConfigEntry\(\"([\w.]+)\", \"([\w.]+)\"\)", DOCUMENT))
    assert len(keys) == 3
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "model.onnx")
    for key, value in keys.items():
        options.add_session_config_entry(key, value)
    bundle = bundles["onnx"]
    ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundle / name, tmp_path / name)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    packed = [i.name for i in graph.initializer if any(e.key.startswith("prepacked") for e in i.external_data)]
    assert sorted(packed) == sorted(node.input[1] for node in nodes)
    ours = open_onnx(bundle)
    theirs = OnnxModel(open_session(tmp_path), ours.tokenizer)
    ids = list(range(3, 40))
    assert np.array_equal(ours.prefill(ids), theirs.prefill(ids))
    assert genai_continuation(tmp_path, "Once", 20)[1] == genai_continuation(bundle, "Once", 20)[1]
