"""Float models that transformers or their own numbers refuse: told as what they are, before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nano.errors import BadFileError
from nano.torch_lm import open_float


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_weight_that_is_not_finite_is_named(value: float, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadFileError, match=r"'model\.norm\.weight'.*\n.*1 of 64"):
        open_float(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "banana"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"hidden_act": "nonsense"},
        {"initializer_range": "wide"},
    ],
)
def test_a_config_that_transformers_refuses_is_no_accident_of_ours(
    change: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BadFileError, match="transformers cannot build"):
        open_float(folder)


def test_extra_parts_of_a_sound_folder_do_not_matter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert open_float(folder).vocab_size == 320
