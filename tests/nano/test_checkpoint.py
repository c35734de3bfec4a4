"""Checkpoints against transformers' own files: complete, sharded, truncated, foreign."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nano.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointWriter
from nano.errors import BadFileError
from nano.families import FAMILIES, weight_shapes
from nano.shapes import ModelShape, read_config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_weight_table_is_what_transformers_writes(family: str, tied: bool, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family, tie_word_embeddings=tied)
    shape = ModelShape.from_hf(read_config(folder))
    saved = load_file(folder / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == weight_shapes(shape)
    assert shape.num_parameters == sum(t.numel() for t in saved.values())


def test_shards_round_trip_and_are_read_by_transformers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_model("llama")
    with Checkpoint(source) as original, CheckpointWriter(tmp_path, shard_bytes=40_000) as writer:
        for name in original.names():
            writer.add(name, original.tensor(name))
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    shutil.copy(source / "config.json", tmp_path)
    with Checkpoint(source) as a, Checkpoint(tmp_path) as b:
        assert a.names() == b.names()
        assert all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names())
        name = "model.embed_tokens.weight"
        assert torch.equal(b.rows(name, 3, 7), a.tensor(name)[3:7])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(loaded.model.norm.weight, load_file(source / "model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(tiny_model: Callable[..., Path], tmp_path: Path, keep: int) -> None:
    raw = (tiny_model("llama") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[:keep])
    with pytest.raises(BadFileError, match="truncated or not safetensors"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(BadFileError, match="model-00001-of-00002"):
        Checkpoint(tmp_path)


def test_a_shard_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "evil.safetensors").write_bytes(b"")
    (inner / INDEX).write_text(json.dumps({"weight_map": {"a": "../evil.safetensors"}}))
    with pytest.raises(BadFileError, match="missing"):
        Checkpoint(inner)


def test_weights_that_do_not_fit_the_config_are_counted(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3")
    shape = ModelShape.from_hf(read_config(folder)).resized(intermediate_size=128)
    with Checkpoint(folder) as checkpoint, pytest.raises(BadFileError, match=r"^6 of the model's weights"):
        checkpoint.check(shape)


def test_pickled_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadFileError, match="save_pretrained"):
        Checkpoint(tmp_path)


def test_a_folder_without_its_index_says_so(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(BadFileError, match=r"model\.safetensors\.index\.json too"):
        Checkpoint(tmp_path)


def test_the_single_file_is_read_where_other_files_lie_beside_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "adapter_model.safetensors"}}))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == ["a"]
        assert checkpoint.tensor("a").sum() == 0


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(64), "q_proj.bias"),
        ("model.layers.7.input_layernorm.weight", torch.zeros(64), "layers.7"),
        ("model.norm.weight", torch.zeros(64, dtype=torch.int8), "I8"),
        ("model.norm.weight", torch.zeros(64, dtype=torch.float8_e4m3fn), "F8_E4M3"),
    ],
)
def test_weights_that_would_be_left_out_or_misread_are_refused(
    name: str, tensor: torch.Tensor, said: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    save_file({**load_file(folder / SINGLE), name: tensor}, folder / SINGLE)
    shape = ModelShape.from_hf(read_config(folder))
    with Checkpoint(folder) as checkpoint, pytest.raises(BadFileError, match=said):
        checkpoint.check(shape)


def test_a_git_lfs_pointer_is_no_truncated_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n")
    with pytest.raises(BadFileError, match="git lfs pull"):
        Checkpoint(tmp_path)
