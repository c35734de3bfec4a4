"""The gate on a real model: an int4 stories260K against itself and with faults planted into its files."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from nano.baseline import Baseline, Unit, read_baseline, write_baseline
from nano.errors import BadFileError, CheckFailedError, RequestError
from nano.evaluate import EvaluateOptions, evaluate_by_document
from nano.gate.compare import Compared, check_comparable, report, require_passed, run_compare
from nano.gate.limits import Limits
from nano.gate.verdicts import judge

DOCUMENTS, WORDS = 30, 60
OPTIONS = EvaluateOptions(tokens=100_000, sequence_length=256)


@dataclass(frozen=True)
class Case:
    """A text, an int4 model and the baselines of it and of its float model, in one folder."""

    home: Path
    text: Path
    int4: Path
    saved: Path
    floats: Path


@pytest.fixture(scope="module")
def case(stories: Path, tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    from quantize.options import QuantizeOptions
    from quantize.run import run_quantize

    home = tmp_path_factory.mktemp("gate")
    text = home / "held_out.jsonl"
    with tinystories.open(encoding="utf-8") as lines:
        stories_text = [json.loads(line)["text"] for line in itertools.islice(lines, DOCUMENTS)]
    text.write_text("".join(json.dumps({"text": " ".join(t.split()[:WORDS])}) + "\n" for t in stories_text))
    run_quantize(stories, [], home / "int4", QuantizeOptions(method="rtn"))
    for name, folder in (("int4", home / "int4"), ("float", stories)):
        write_baseline(home / f"{name}.json", evaluate_by_document(folder, [text], None, OPTIONS)[1])
    return Case(home, text, home / "int4", home / "int4.json", home / "float.json")


def faulty(case: Case, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of the int4 folder with its tensors changed."""
    from safetensors.numpy import load_file, save_file

    folder = case.home / name
    shutil.copytree(case.int4, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scaled(layer: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        mine = {k for k in tensors if f"layers.{layer}." in k and k.endswith("weight_scale")}
        assert len(mine) == 7
        return {k: (v * 1.02).astype(v.dtype) if k in mine else v for k, v in tensors.items()}

    return change


def swapped(tensors: dict[str, Any]) -> dict[str, Any]:
    other = {"layers.1.": "layers.2.", "layers.2.": "layers.1."}
    return {next((k.replace(a, b) for a, b in other.items() if a in k), k): v for k, v in tensors.items()}


def outcomes(compared: Compared) -> dict[str, str]:
    return {verdict.name: verdict.outcome for verdict in compared.verdicts}


def test_an_identical_artifact_passes(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.int4, tmp_path / "copy")
    compared = run_compare(case.saved, tmp_path / "copy", data=[case.text])
    require_passed(compared)
    assert set(outcomes(compared).values()) == {"passed"}
    assert all(verdict.value == 0 and verdict.high == 0 for verdict in compared.verdicts)
    assert len(compared.candidate.units) == DOCUMENTS, "the documents are the units"


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_one_layers_scales_off_by_two_per_cent_fail(case: Case, layer: int) -> None:
    folder = faulty(case, f"scaled{layer}", scaled(layer))
    compared = run_compare(case.saved, folder, data=[case.text])
    assert outcomes(compared)["drift"] == "failed"
    if layer == 2:  # its effect on quality is none; against the model itself the drift is a KL
        direct = run_compare(case.int4, folder, data=[case.text])
        (drift,) = (verdict for verdict in direct.verdicts if verdict.name == "drift")
        assert drift.outcome == "failed"
        assert 0.0007 < drift.low < drift.value < drift.high < 0.003


def test_two_layers_swapped_fail_and_are_told_everywhere(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = run_compare(case.saved, faulty(case, "swapped", swapped), data=[case.text])
    assert outcomes(compared)["perplexity"] == outcomes(compared)["next-token accuracy"] == "failed"
    with pytest.raises(CheckFailedError) as refused:
        require_passed(compared)
    words = [unit.words for unit in compared.candidate.units]
    assert "perplexity rose" in str(refused.value)
    assert any(repr(word) in str(refused.value) for word in words), "the worst documents are named"

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    report(compared, tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    failures = {c.get("name"): c.findtext("failure") for c in suite}
    assert "more than the 1.00% allowed" in (failures["perplexity"] or "")
    assert any(repr(word) in (failures["perplexity"] or "") for word in words)
    assert failures["tokens"] is None
    summary = (tmp_path / "summary.md").read_text()
    assert "### Accuracy of swapped: ❌ failed" in summary
    assert "| ❌ | perplexity |" in summary


def test_a_tokenizer_off_by_one_fails(case: Case) -> None:
    folder = case.home / "shifted"
    shutil.copytree(case.int4, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        k: i if i < 3 else 3 + (i - 2) % (len(vocabulary) - 3) for k, i in vocabulary.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    found = outcomes(run_compare(case.saved, folder, data=[case.text]))
    assert found["tokens"] == found["perplexity"] == "failed"
    # against a reference of the right vocabulary nothing can be compared token by token: still a verdict
    found = outcomes(run_compare(case.int4, folder, data=[case.text]))
    assert found["tokens"] == found["perplexity"] == "failed"


def test_quantization_itself_is_seen_and_float_is_no_loss(case: Case) -> None:
    found = {verdict.name: verdict for verdict in run_compare(case.floats, case.saved).verdicts}
    assert found["perplexity"].outcome == "failed"
    assert 0.03 < found["perplexity"].low < found["perplexity"].value < 0.2
    back = {verdict.name: verdict for verdict in run_compare(case.saved, case.floats).verdicts}
    assert back["perplexity"].outcome == back["next-token accuracy"].outcome == "passed"
    assert back["perplexity"].sentence.startswith("perplexity's rise is -")


def test_false_alarms_are_rare(case: Case) -> None:
    """200 comparisons of equal models: real figures of float and int4, dealt to the two sides by chance."""
    random = np.random.default_rng(0)
    ours, theirs = read_baseline(case.saved).units, read_baseline(case.floats).units
    hardest = Limits(max_perplexity_rise=0.0, max_accuracy_loss=None, max_drift=None)
    defaults, strict = 0, 0
    for trial in range(200):
        sides: tuple[list[Unit], list[Unit]] = ([], [])
        for i in random.integers(0, len(ours), len(ours)):
            pair = (ours[i], theirs[i])[:: random.choice((1, -1))]
            for side, unit in zip(sides, pair, strict=True):
                side.append(unit)
        before, after = (replace(read_baseline(case.saved), units=tuple(side)) for side in sides)
        limits = Limits(max_drift=None, resamples=2000, seed=trial)
        defaults += any(verdict.outcome == "failed" for verdict in judge(before, after, limits))
        found = judge(before, after, replace(hardest, resamples=2000, seed=trial))
        strict += any(verdict.outcome == "failed" for verdict in found)
    assert strict <= 10, "with no loss allowed at all, 2.5% are expected"
    assert defaults <= 10


def test_a_baseline_is_read_back_and_small(case: Case, tmp_path: Path) -> None:
    saved = read_baseline(case.saved)
    assert case.saved.stat().st_size < 6_000
    assert saved.scores["perplexity"] == pytest.approx(
        np.exp(sum(unit.nll for unit in saved.units) / sum(unit.tokens for unit in saved.units)), rel=1e-6
    )
    write_baseline(tmp_path / "again.json", saved)
    assert (tmp_path / "again.json").read_text() == case.saved.read_text()
    whole = case.saved.read_text()
    for number, bad in enumerate(
        (whole[: len(whole) // 2], "{}", "[]", whole.replace('"units"', '"unit"'), whole.replace('"nll"', '"nil"'),
         whole.replace('"schema_version": 1', '"schema_version": 9'), whole.replace('"files"', '"file"'))
    ):  # fmt: skip
        path = tmp_path / f"bad{number}.json"
        path.write_text(bad)
        with pytest.raises(BadFileError):
            read_baseline(path)


def test_what_cannot_be_compared_is_refused(case: Case, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(case.text.read_text() + '{"text": "One more."}\n')
    gate = tmp_path / "gate.toml"
    gate.write_text("max_kl = 0.1\n")
    with pytest.raises(RequestError, match="text is not the one"):
        run_compare(case.saved, case.int4, data=[other])
    with pytest.raises(RequestError, match="measured on text"):
        run_compare(case.saved, case.int4)
    with pytest.raises(RequestError, match="nothing is measured"):
        run_compare(case.saved, case.saved, data=[case.text])
    with pytest.raises(RequestError, match="another --tokens"):
        run_compare(case.saved, case.int4, data=[case.text], tokens=100)
    with pytest.raises(RequestError, match="max_kl, which cannot be judged"):
        run_compare(case.saved, case.saved, gate=gate)
    saved = read_baseline(case.saved)
    changed: Baseline = replace(saved, data={**saved.data, "sequence_length": 64})
    with pytest.raises(RequestError, match="another --sequence-length"):
        check_comparable(saved, changed)
    one, two = (replace(saved, reference={"path": p, "fingerprint": p, "kind": "student"}) for p in "ab")
    with pytest.raises(RequestError, match="different references"):
        check_comparable(one, two)


def test_the_command_tells_by_its_status(case: Case, nanokit: Callable[..., Any], tmp_path: Path) -> None:
    good = nanokit("compare", case.saved, case.saved, "--json")
    assert (good.status, good.json()["passed"], good.json()["units"]) == (0, True, DOCUMENTS)
    bad = nanokit("compare", case.floats, case.saved, "--junit", tmp_path / "j.xml")
    assert bad.status == 1
    assert "perplexity rose" in bad.stderr
    assert max(map(len, bad.stdout.splitlines())) <= 100
    assert (tmp_path / "j.xml").exists()
    wrong = nanokit("compare", case.saved, tmp_path / "nowhere")
    assert (wrong.status, wrong.stdout) == (2, "")
    assert "no such model folder" in wrong.stderr
