"""`nanokit plan`: exact counts, documented costs, no torch, at once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from device_profiles.footprint import planned_facts
from device_profiles.plan import make_plan, multiplied, parse_tokens
from nano.errors import RequestError
from nano.shapes import ModelShape, read_config


def _teacher(folder: Path, **changes: Any) -> Path:
    """Llama 3.2 3B's config.json and nothing else: no weight is there to be read."""
    config = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_counts_add_up_and_costs_follow_the_formula(tmp_path: Path) -> None:
    plan = make_plan("nano-1", _teacher(tmp_path / "teacher"), "94B")
    assert sum(plan.counts.values()) == plan.shape.num_parameters
    assert abs(plan.deviation) <= 0.005
    teacher = 3_212_749_824 - (28 * 2 * 3072 + 3072)  # all but the norms; the tied embedding multiplies as the head
    assert multiplied(ModelShape.from_hf(read_config(tmp_path / "teacher"))) == teacher
    student = plan.counts["linears"] + plan.counts["embedding"]
    assert plan.flops_per_token == 6 * student + 2 * teacher
    assert plan.as_dict()["flops"] == plan.flops_per_token * 94_000_000_000
    assert make_plan("nano-1").tokens == 20 * make_plan("nano-1").shape.num_parameters
    assert make_plan("nano-1").flops_per_token == 6 * multiplied(make_plan("nano-1").shape)


def test_kv_is_counted_up_to_the_models_positions(tmp_path: Path) -> None:
    short = make_plan("1.2B", _teacher(tmp_path / "short", max_position_embeddings=8192))
    assert list(short.kv_bytes()["onnx"]) == [4096]
    long = make_plan("1.2B", _teacher(tmp_path / "long"))
    per_slot = long.shape.num_layers * 2 * long.shape.num_kv_heads * 128 * 4
    assert long.kv_bytes()["executorch"] == {4096: 4096 * per_slot, 32768: 32768 * per_slot}


@pytest.mark.parametrize(("text", "count"), [("94B", 94 * 10**9), ("1.5T", 15 * 10**11), ("300M", 3 * 10**8), ("7", 7)])
def test_tokens_are_understood(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "many", "-3B", "0", "1e9"])
def test_nonsense_tokens_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="training tokens"):
        parse_tokens(text)


def test_plan_command(nanokit: Callable[..., Any], tmp_path: Path, stories: Path) -> None:
    teacher = _teacher(tmp_path / "teacher")
    (teacher / "tokenizer.json").write_text("{}" * 1000)
    shown = nanokit("plan", "--teacher", teacher, "--student", "nano-1", "--profile", "high-end")
    assert shown.status == 0
    assert "It fits high-end" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    found = nanokit("plan", "--teacher", teacher, "--student", "nano-1", "--json").json()
    assert found["shape"]["family"] == "llama"
    assert found["verdict"] is None
    assert found["footprint"]["bytes"]["tokenizer"] > 2000
    toy = nanokit("plan", "--teacher", stories, "--student", "150k", "--context", 256, "--profile", "low-end", "--json")
    assert toy.status == 0
    assert toy.json()["verdict"]["context"] == 256


def test_an_int8_cache_is_planned_and_advised(nanokit: Callable[..., Any], tmp_path: Path) -> None:
    plan = make_plan("1.2B", _teacher(tmp_path / "teacher"))
    floats, bytes_ = (planned_facts(plan.shape, plan.recipe("executorch", kv=kv)).kv_cache_bytes for kv in ("float", "int8"))  # noqa: E501  # fmt: skip
    assert bytes_ == floats // (4 * 128) * (128 + 5), "a scale and a zero point for each head and position"
    tight = ("plan", "--student", "1.2B", "--teacher", tmp_path / "teacher", "--context", 20000, "--profile", "low-end")
    failed = nanokit(*tight)
    assert failed.status == 1
    assert "--kv-cache int8" in failed.stderr
    assert nanokit(*tight, "--kv-cache", "int8").status == 0
    refused = nanokit(*tight, "--kv-cache", "int8", "--runtime", "onnx")
    assert refused.status == 2
    assert "float cache" in refused.stderr


def test_plan_says_no_with_status_1(nanokit: Callable[..., Any]) -> None:
    failed = nanokit("plan", "--student", "nano-2", "--profile", "low-end", "--context", 8192, "--json")
    assert failed.status == 1
    verdict = failed.json()["verdict"]
    assert verdict["fits"] is False
    assert verdict["advice"]
    assert "too much" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--student", "huge"), "size is not understood"),
        (("--student", "nano-1", "--profile", "low"), "did you mean 'low-end'"),
        (("--student", "nano-1", "--context", "-5"), "not positive"),
        (("--student", "nano-1", "--context", "40000"), "does not fit the model"),
        (("--student", "nano-1", "--teacher", "/nowhere/at/all"), "no such model folder"),
        (("--student", "nano-1", "--tokens", "some"), "training tokens"),
        (("--student", "9B"), "larger than its teacher"),
    ],
)
def test_bad_requests_are_status_2(arguments: tuple[str, ...], says: str, nanokit: Callable[..., Any]) -> None:
    refused = nanokit("plan", *arguments)
    assert refused.status == 2
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr


def test_no_torch_and_at_once() -> None:
    code = (
        "import sys; from nano.cli import run; "
        "status = run(['plan', '--student', 'nano-1', '--profile', 'low-end', '--json']); "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert done.stderr.strip() == "[]"
    assert min(seconds) <= 0.5, "of the processor: on a machine of its own it takes as long by the clock"
