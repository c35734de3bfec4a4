"""What export refuses is known from config.json, in transformers' old and new spelling, before anything is spent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nano.exportable import obstacle
from nano.families import family_of
from nano.shapes import read_config

Call = Callable[..., Any]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_plain_models_have_no_obstacle(tiny_model: Callable[[str], Path], family: str) -> None:
    from transformers import AutoConfig

    folder = tiny_model(family)
    assert obstacle(read_config(folder), family_of(family)) is None
    assert obstacle(AutoConfig.from_pretrained(folder).to_dict(), family_of(family)) is None


@pytest.mark.parametrize(
    ("family", "settings", "found"),
    [
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "full_attention"),
    ],
)
def test_an_obstacle_is_named(family: str, settings: dict[str, Any], found: str) -> None:
    seen = obstacle(settings, family_of(family))
    assert seen is not None
    assert found in seen.found


def test_rotations_that_a_table_holds_pass() -> None:
    for rope_type in ("default", "linear", "llama3", "yarn"):
        assert obstacle({"rope_scaling": {"rope_type": rope_type, "factor": 8.0}}, family_of("llama")) is None


def test_planning_warns(nanokit: Call, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    config = {**read_config(tiny_model("llama")), "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = nanokit("plan", "--teacher", tmp_path, "--student", "20k")
    assert "export will refuse this model" in " ".join(ran.stderr.split())
    assert "gelu" in ran.stderr
