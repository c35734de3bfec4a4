"""lm-evaluation-harness on bundles: one task on every stage, within what quantization is known to cost."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")


def beside(name: str) -> ModuleType:
    """Another test module, loaded from its file: pytest's importlib mode gives tests no package."""
    path = Path(__file__).parent.parent / "nano" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"beside_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(shipped: Any, stories: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """lm-eval's results of every stage."""
    harness = beside("test_lm_eval")
    tasks = harness.write_tasks(tmp_path_factory.mktemp("tasks"), tinystories)
    stages: dict[str, dict[str, Any]] = {
        "float": {"path": str(stories)},
        "int4": {"path": str(shipped.int4)},
        "as XNNPACK": {"path": str(shipped.int4), "activations": "int8-xnnpack"},
        "as ORT": {"path": str(shipped.int4), "activations": "int8-ort"},
        "executorch": {"path": str(shipped.bundle("executorch"))},
        "onnx": {"path": str(shipped.bundle("onnx"))},
    }
    return {name: harness.evaluate("nanokit", arguments, tasks) for name, arguments in stages.items()} | {"module": harness}  # noqa: E501  # fmt: skip


@pytest.mark.parametrize(("bundle", "simulated"), [("executorch", "as XNNPACK"), ("onnx", "as ORT")])
def test_a_bundle_answers_as_its_simulation_does(found: dict[str, Any], bundle: str, simulated: str) -> None:
    answers = found["module"].answers

    def likelihoods(stage: str) -> np.ndarray:
        return np.array([value for task in ("choice", "rolling") for row in answers(found[stage], task) for value in row], float)  # noqa: E501  # fmt: skip

    ours, theirs = likelihoods(bundle), likelihoods(simulated)
    quantized = np.abs(likelihoods("int4") - likelihoods("float"))
    assert np.abs(ours - theirs).mean() < 0.25 * quantized.mean(), "far less than quantization itself moves them"
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9999
    assert found[bundle]["results"]["nk_choice"]["acc,none"] == found[simulated]["results"]["nk_choice"]["acc,none"]
    bits = [found[stage]["results"]["nk_rolling"]["bits_per_byte,none"] for stage in (bundle, simulated, "float")]
    assert bits[0] == pytest.approx(bits[1], rel=0.005)
    assert bits[0] != bits[2]


@pytest.mark.parametrize("bundle", ["executorch", "onnx"])
def test_generated_text_has_no_space_that_the_float_model_lacks(found: dict[str, Any], bundle: str) -> None:
    """The tokenizer in a bundle for ExecuTorch decodes with the leading space; lm-eval compares texts exactly."""
    answers = found["module"].answers
    said, wanted = answers(found[bundle], "until"), answers(found["int4"], "until")
    assert not any(text.startswith(" ") for (text,) in wanted)
    assert not any(text.startswith(" ") for (text,) in said)
    same = [one[0].split()[:2] == other[0].split()[:2] for one, other in zip(said, wanted, strict=True)]
    assert sum(same) >= len(same) - 1
