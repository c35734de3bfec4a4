"""The gate on bundles as they ship: faults planted into the int4 folder, exported, and run by their own runtimes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nano.baseline import read_baseline, write_baseline
from nano.errors import CheckFailedError
from nano.evaluate import EvaluateOptions, evaluate_by_document
from nano.gate.compare import Compared, require_passed, run_compare
from nano.gate.verdicts import drift_limit
from nano.manifest import read_manifest

OPTIONS = EvaluateOptions(tokens=100_000, sequence_length=256)
FORMATS = ("executorch", "onnx")


@dataclass(frozen=True)
class Case:
    """What ships, and the baseline of each bundle."""

    shipped: Any
    home: Path

    def saved(self, form: str) -> Path:
        return self.home / f"{form}.json"


def export(int4: Path, out: Path, form: str) -> Path:
    from export.options import ExportOptions
    from export.run import run_export

    run_export(int4, form, out, ExportOptions(logits="all"))
    return out


@pytest.fixture(scope="module")
def case(shipped: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = Case(shipped, tmp_path_factory.mktemp("faults"))
    for form in FORMATS:
        found = evaluate_by_document(shipped.bundle(form), [shipped.text], None, OPTIONS)[1]
        write_baseline(made.saved(form), found)
    return made


def scaled(tensors: dict[str, Any]) -> dict[str, Any]:
    """One layer's scales off by 2%; the fourth's cost the least quality of all."""
    mine = {k for k in tensors if "layers.3." in k and k.endswith("weight_scale")}
    assert len(mine) == 7
    return {k: (v * 1.02).astype(v.dtype) if k in mine else v for k, v in tensors.items()}


def swapped(tensors: dict[str, Any]) -> dict[str, Any]:
    other = {"layers.1.": "layers.2.", "layers.2.": "layers.1."}
    return {next((k.replace(a, b) for a, b in other.items() if a in k), k): v for k, v in tensors.items()}


def faulty(case: Case, name: str, form: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """The bundle of a copy of the int4 folder with its tensors changed."""
    from safetensors.numpy import load_file, save_file

    from nano.manifest import write_manifest

    folder = case.home / f"{name}-int4"
    if not folder.exists():
        shutil.copytree(case.shipped.int4, folder)
        tensors = change(load_file(folder / "model.safetensors"))
        if name == "scaled":  # the exporters take scales that bfloat16 holds, as quantize writes them
            import torch

            tensors = {
                k: torch.from_numpy(v).bfloat16().float().numpy() if k.endswith("weight_scale") else v
                for k, v in tensors.items()
            }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_manifest(folder, read_manifest(folder))
    return export(folder, case.home / f"{name}-{form}", form)


def outcomes(compared: Compared) -> dict[str, str]:
    return {verdict.name: verdict.outcome for verdict in compared.verdicts}


@pytest.mark.parametrize("form", FORMATS)
def test_an_identical_bundle_passes_bit_for_bit(case: Case, form: str) -> None:
    again = case.home / f"again-{form}"
    if form == "onnx":
        export(case.shipped.int4, again, form)
    else:  # made again it is the same too, but takes ten times as long
        shutil.copytree(case.shipped.bundle(form), again)
    for baseline in (case.saved(form), case.shipped.bundle(form)):
        compared = run_compare(baseline, again, data=[case.shipped.text])
        require_passed(compared)
        (drift,) = (v for v in compared.verdicts if v.name == "drift")
        assert (drift.limit_name, drift.value, drift.high) == ("max_drift", 0.0, 0.0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fault", [scaled, swapped])
def test_planted_faults_fail_at_the_defaults(case: Case, form: str, fault: Any) -> None:
    bundle = faulty(case, fault.__name__, form, fault)
    for baseline in (case.saved(form), case.shipped.bundle(form)):
        compared = run_compare(baseline, bundle, data=[case.shipped.text])
        assert outcomes(compared)["drift"] == "failed"
        with pytest.raises(CheckFailedError, match="drift"):
            require_passed(compared)
    if fault is swapped:
        assert outcomes(compared)["perplexity"] == "failed"


@pytest.mark.parametrize("form", FORMATS)
def test_a_tokenizer_off_by_one_fails(case: Case, form: str) -> None:
    folder = case.home / f"shifted-{form}"
    shutil.copytree(case.shipped.bundle(form), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    shifted = {k: i if i < 3 else 3 + (i - 2) % (len(vocabulary) - 3) for k, i in vocabulary.items()}
    tokenizer["model"]["vocab"] = shifted
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for baseline in (case.saved(form), case.shipped.bundle(form)):
        found = outcomes(run_compare(baseline, folder, data=[case.shipped.text]))
        assert found["tokens"] == found["perplexity"] == "failed"


@pytest.mark.parametrize("form", [pytest.param("executorch", marks=pytest.mark.slow), "onnx"])
def test_the_previous_version_fails(case: Case, form: str, stories: Path) -> None:
    """What shipped before: the same student, quantized with the previous release's settings."""
    from quantize.options import QuantizeOptions
    from quantize.run import run_quantize

    before = case.home / "before-int4"
    if not before.exists():
        run_quantize(stories, [], before, QuantizeOptions(method="rtn", group_size=64))
    bundle = export(before, case.home / f"before-{form}", form)
    with pytest.raises(CheckFailedError, match="drift"):
        require_passed(run_compare(case.saved(form), bundle, data=[case.shipped.text]))


def test_the_tight_limit_needs_one_maker_one_runtime_and_one_machine(case: Case) -> None:
    ours, other = read_baseline(case.saved("onnx")), read_baseline(case.saved("executorch"))
    assert drift_limit(ours, ours) == "max_drift"
    assert drift_limit(ours, other) == "max_runtime_drift"
    for key in ("made_by", "run_by", "machine"):
        model = {**ours.model, "runtime": {**ours.model["runtime"], key: "another"}}
        assert drift_limit(ours, replace(ours, model=model)) == "max_runtime_drift"
    older = {key: value for key, value in ours.model.items() if key != "runtime"}
    assert drift_limit(replace(ours, model=older), replace(ours, model=older)) == "max_runtime_drift"
