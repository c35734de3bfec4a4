"""What stands in the place of a model folder's files: pointers, adapters, JSON of another kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nano.errors import BadFileError
from nano.hub import resolve_model
from nano.model_files import ADAPTER, read_json_object
from nano.shapes import ModelShape, read_config
from nano.tokens import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1044992\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        (POINTER, "git lfs pull"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadFileError, match=said) as refused:
        read_json_object(path)
    assert "generation_config.json" in refused.value.problem


def test_pointers_in_the_place_of_a_tokenizer_say_what_fetches_it(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (folder / "tokenizer.json").write_text(POINTER)
    with pytest.raises(BadFileError, match="git lfs pull"):
        load_tokenizer(folder)


@pytest.mark.parametrize("beside_weights", [True, False])
def test_an_adapter_is_not_left_out_without_a_word(
    beside_weights: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model")) if beside_weights else tmp_path
    (folder / ADAPTER).write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(BadFileError, match="merge_and_unload"):
        read_config(folder)


def test_a_gguf_file_is_told_what_is_wanted_instead(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BadFileError, match="float model"):
        resolve_model(str(tmp_path / "model.gguf"))
    with pytest.raises(BadFileError, match=r"model\.gguf"):
        read_config(tmp_path)


@pytest.mark.parametrize("eos", ["2", [2, None], -1, {"a": 1}])
def test_ids_that_are_none_are_refused(eos: object, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(BadFileError, match="eos_token_id"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", None), ("rms_norm_eps", "1e-5"), ("rope_theta", 0), ("rope_theta", "10000"),
        ("rope_scaling", "yarn"), ("layer_types", 5), ("head_dim", 0),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused_by_key(key: str, value: object, tiny_model: Callable[..., Path]) -> None:
    config = {**read_config(tiny_model("llama")), key: value}
    with pytest.raises(BadFileError, match=key):
        ModelShape.from_hf(config)
