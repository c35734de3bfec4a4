"""The whole way on a real pretrained model: teacher → student → int4 → both bundles → text out of both runtimes.

Each step is the real command in its own process; figures are the issue's bars, with room for this text's size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
FORMATS = ("executorch", "onnx")
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spine")


@pytest.fixture(scope="module")
def texts(place: Path, tinystories: Path) -> dict[str, Path]:
    """Training and held-out stories, disjoint."""
    lines = tinystories.read_text().splitlines()
    (place / "train.jsonl").write_text("\n".join(lines[200:]))
    (place / "heldout.jsonl").write_text("\n".join(lines[:200]))
    return {"train": place / "train.jsonl", "heldout": place / "heldout.jsonl"}


@pytest.fixture(scope="module")
def student(place: Path, stories: Path, texts: dict[str, Path], nanokit: Call) -> Path:
    out = place / "student"
    ran = nanokit(
        "distill", "--teacher", stories, "--student", "150k", "--data", texts["train"], "--out", out,
        "--steps", 40, "--batch", 8, "--length", 128, "--eval-tokens", 2048, "--calibration-tokens", 4096,
    )  # fmt: skip
    assert ran.status == 0, ran.stderr
    return out


@pytest.fixture(scope="module")
def int4(place: Path, student: Path, texts: dict[str, Path], nanokit: Call) -> Path:
    out = place / "int4"
    arguments = ("--method", "gptq", "--group-size", 32, "--samples", 32, "--length", 128)
    ran = nanokit("quantize", student, "--data", texts["train"], *arguments, "--out", out)
    assert ran.status == 0, ran.stderr
    return out


@pytest.fixture(scope="module")
def bundles(place: Path, int4: Path, texts: dict[str, Path], nanokit: Call) -> dict[str, dict[str, Any]]:
    """Both bundles, by format: the folder and what `export --json` said."""
    made = {}
    for format in FORMATS:
        out = place / format
        ran = nanokit(
            "export", int4, "--format", format, "--context", 256, "--chunk", 32,
            "--data", texts["heldout"], "--out", out, "--json",
        )  # fmt: skip
        assert ran.status == 0, ran.stderr
        made[format] = {"folder": out, **ran.json()}
    return made


def scores(nanokit: Call, model: Path, texts: dict[str, Path], *more: object) -> dict[str, Any]:
    ran = nanokit("evaluate", model, "--data", texts["heldout"], "--tokens", 1500, *more, "--json")
    assert ran.status == 0, ran.stderr
    found: dict[str, Any] = ran.json()
    return found


def test_the_student_learned(student: Path, texts: dict[str, Path], stories: Path, nanokit: Call) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(student, local_files_only=True)
    assert 140_000 < loaded.num_parameters() < 160_000
    results = json.loads((student / "manifest.json").read_text())["results"]["held_out"]
    assert results["trained"]["cross_entropy"] < results["start"]["cross_entropy"] - 1.0
    assert scores(nanokit, student, texts, "--reference", stories)["perplexity"] < 40


def test_int4_stays_close_to_its_student(int4: Path, student: Path, texts: dict[str, Path], nanokit: Call) -> None:
    against = scores(nanokit, int4, texts, "--reference", student)
    assert against["kl"] < 0.15
    assert against["top1"] > 0.75


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_holds_the_checkpoints_codes(format: str, bundles: dict[str, dict[str, Any]], int4: Path) -> None:
    from export.bundle import compare_codes
    from quantize.packed import Int4Checkpoint

    with Int4Checkpoint(int4) as checkpoint:
        found = compare_codes(bundles[format]["folder"], format, checkpoint)  # type: ignore[arg-type]
        assert found.modules == len(checkpoint.modules) == 3 * 7
        assert found.differing == ()


@pytest.mark.parametrize("format", FORMATS)
def test_the_runtime_agrees_with_torch(format: str, bundles: dict[str, dict[str, Any]]) -> None:
    """To within the noise floor measured in the same run: int8 codes flip at rounding borders."""
    parity = bundles[format]["parity"]
    assert parity["tokens"] >= 2000
    simulated, floor = parity["simulated"], parity["floor"]
    assert simulated["logit_error"] < max(0.01, 1.5 * floor["logit_error"])
    assert simulated["top1"] > min(0.99, floor["top1"] - 0.01)
    assert parity["prefill"]["simulated"]["logit_error"] < max(0.01, 2 * floor["logit_error"])
    assert parity["float"]["logit_error"] < 0.03
    assert parity["float"]["top1"] > 0.95


@pytest.mark.parametrize("format", FORMATS)
def test_evaluate_runs_the_bundle_itself(
    format: str, bundles: dict[str, dict[str, Any]], int4: Path, texts: dict[str, Path], nanokit: Call
) -> None:
    bundle = bundles[format]["folder"]
    against = scores(nanokit, bundle, texts, "--reference", int4, "--activations", "int8")
    assert against["kl"] < 0.003
    assert against["top1"] > 0.97
    assert against["perplexity"] == pytest.approx(against["reference_perplexity"], rel=0.01)


@pytest.mark.parametrize("format", FORMATS)
def test_story_text_comes_out(format: str, bundles: dict[str, dict[str, Any]], nanokit: Call) -> None:
    folder = bundles[format]["folder"]
    said = nanokit("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 24)
    assert said.status == 0, said.stderr
    assert said.stdout.startswith(PROMPT)
    assert said.stderr == ""
    assert len(said.stdout) > len(PROMPT) + 20
    if format == "executorch":
        from export.executorch_runtime import run_llm_runner

        peer = run_llm_runner(folder, PROMPT, 24)
    else:
        from export.onnx_runtime import run_genai

        peer = run_genai(folder, PROMPT, 24)
    assert peer.strip().removeprefix(PROMPT).strip() == said.stdout.strip().removeprefix(PROMPT).strip()


@pytest.mark.parametrize("format", FORMATS)
def test_it_fits_a_phone_and_not_a_watch(
    format: str, bundles: dict[str, dict[str, Any]], nanokit: Call, tmp_path: Path
) -> None:
    folder = bundles[format]["folder"]
    assert nanokit("check", folder, "--profile", "low-end").status == 0
    ran = nanokit("check", folder, "--profile", "high-end", "--json")
    assert ran.status == 0
    assert ran.json()["fits"] is True


def test_history_reaches_back_to_the_teacher(bundles: dict[str, dict[str, Any]], stories: Path) -> None:
    from nano.manifest import fingerprint

    for format in FORMATS:
        manifest = json.loads((bundles[format]["folder"] / "manifest.json").read_text())
        student = manifest["inputs"]["int4"]["manifest"]["inputs"]["student"]
        assert student["manifest"]["inputs"]["teacher"]["fingerprint"] == fingerprint(stories)
