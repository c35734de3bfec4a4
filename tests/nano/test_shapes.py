"""ModelShape and weight_shapes against public models' published facts and against transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nano.errors import BadFileError, NanokitError, UnsupportedError
from nano.families import weight_shapes
from nano.shapes import FULL, SLIDING, ModelShape, read_config

LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "max_position_embeddings": 40960, "num_key_value_heads": 8,
         "head_dim": 128, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28}  # fmt: skip
GEMMA3 = {"model_type": "gemma3_text", "vocab_size": 262144, "max_position_embeddings": 32768, "head_dim": 256,
          "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 512}  # fmt: skip


def _config(base: dict[str, Any], hidden: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    dims = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**base, **dims, **more}


def _gemma3_vision(**text: Any) -> dict[str, Any]:
    """As google/gemma-3-4b-it and larger publish it: a text_config that leaves defaults out."""
    return {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "sliding_window": 1024, **text}}


# Dimensions: each model's config.json on huggingface.co (the larger Gemma 3 also: litgpt/config.py).
# Counts: Llama from the model card's safetensors, tied embeddings once; Gemma 3 from its technical report
# (arXiv 2503.19786, table 1: 302 M + 698 M, 3,209 M, 10,759 M, 25,600 M beside the embedding); Qwen3 from its
# model cards (0.44 B, 1.4 B, 3.6 B, 6.95 B, 13.2 B, 31.2 B beside the embeddings).
PUBLIC: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3.2-1B": (_config(LLAMA, 2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True), 1_235_814_400),
    "Llama-3.2-3B": (_config(LLAMA, 3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True), 3_212_749_824),
    "Llama-3.1-8B": (_config(LLAMA, 4096, 14336, 32, 32, tie_word_embeddings=False), 8_030_261_248),
    "Llama-3.1-70B": (_config(LLAMA, 8192, 28672, 80, 64, tie_word_embeddings=False), 70_553_706_496),
    "Qwen3-0.6B": (_config(QWEN3, 1024, 3072, 28, 16, tie_word_embeddings=True), 596_049_920),
    "Qwen3-1.7B": (_config(QWEN3, 2048, 6144, 28, 16, tie_word_embeddings=True), 1_720_574_976),
    "Qwen3-4B": (_config(QWEN3, 2560, 9728, 36, 32, tie_word_embeddings=True), 4_022_468_096),
    "Qwen3-8B": (_config(QWEN3, 4096, 12288, 36, 32, tie_word_embeddings=False), 8_190_735_360),
    "Qwen3-14B": (_config(QWEN3, 5120, 17408, 40, 40, tie_word_embeddings=False), 14_768_307_200),
    "Qwen3-32B": (_config(QWEN3, 5120, 25600, 64, 64, tie_word_embeddings=False), 32_762_123_264),
    "gemma-3-270m": (_config(GEMMA3, 640, 2048, 18, 4, _sliding_window_pattern=6), 268_098_176),
    "gemma-3-1b": (_config(GEMMA3, 1152, 6912, 26, 4, sliding_window_pattern=6), 999_885_952),
    "gemma-3-4b": (_gemma3_vision(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34), 3_880_263_168),
    "gemma-3-12b": (
        _gemma3_vision(
            hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
            num_key_value_heads=8,
        ),
        11_766_034_176,
    ),
    "gemma-3-27b": (
        _gemma3_vision(
            hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
            num_key_value_heads=16, head_dim=128,
        ),
        27_009_346_304,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_parameter_counts_of_public_models_are_the_published_ones(name: str) -> None:
    config, published = PUBLIC[name]
    shape = ModelShape.from_hf(config)
    assert shape.num_parameters == published
    norms = published - shape.embedding_parameters - shape.linear_parameters
    assert 0 < norms < 3e-4 * published
    assert ModelShape.from_hf(shape.to_hf()) == shape


@pytest.mark.parametrize(
    ("name", "beside_embedding"),
    [("gemma-3-1b", 698e6), ("gemma-3-4b", 3209e6), ("gemma-3-12b", 10759e6), ("gemma-3-27b", 25600e6),
     ("Qwen3-0.6B", 0.44e9), ("Qwen3-1.7B", 1.4e9), ("Qwen3-4B", 3.6e9), ("Qwen3-8B", 6.95e9),
     ("Qwen3-14B", 13.2e9), ("Qwen3-32B", 31.2e9)],
)  # fmt: skip
def test_counts_beside_the_embedding_agree_with_report_and_model_cards(name: str, beside_embedding: float) -> None:
    shape = ModelShape.from_hf(PUBLIC[name][0])
    assert shape.num_parameters - shape.embedding_parameters == pytest.approx(beside_embedding, rel=0.011)


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-0.6B", "gemma-3-270m", "gemma-3-4b"])
def test_tensors_are_those_that_transformers_builds(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = PUBLIC[name][0]
    shape = ModelShape.from_hf(config)
    text = {k: v for k, v in config.get("text_config", config).items() if k != "model_type"}
    loaded = AutoConfig.for_model(shape.family, **text)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded)
    theirs = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    assert weight_shapes(shape) == theirs
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    kinds = getattr(loaded, "layer_types", None) or (FULL,) * shape.num_layers
    assert shape.layer_types == tuple(kinds)
    assert shape.max_positions == loaded.max_position_embeddings


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_models_config_gives_its_tensors(family: str, tied: bool, tiny_model: Callable[..., Path]) -> None:
    from safetensors import safe_open

    folder = tiny_model(family, tie_word_embeddings=tied)
    shape = ModelShape.from_hf(read_config(folder))
    with safe_open(folder / "model.safetensors", "np") as stored:
        assert {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()} == weight_shapes(shape)  # noqa: SIM118


def test_stories260k_is_260k(stories: Path) -> None:
    shape = ModelShape.from_hf(read_config(stories))
    assert (shape.num_parameters, shape.intermediate_size, shape.num_kv_heads) == (260_032, 172, 4)


def test_kv_cache_of_sliding_layers_stops_at_the_window() -> None:
    shape = ModelShape.from_hf(PUBLIC["gemma-3-1b"][0])
    assert (shape.layer_types.count(SLIDING), shape.layer_types.count(FULL)) == (22, 4)
    assert shape.kv_bytes(32768) == 2 * 2 * 256 * (22 * 512 + 4 * 32768)
    assert shape.kv_bytes(300) == 2 * 2 * 256 * 26 * 300


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"hidden_size": None}, BadFileError, "no value for hidden_size"),
        ({"hidden_size": "2048"}, BadFileError, "hidden_size = '2048'"),
        ({"intermediate_size": 0}, BadFileError, "intermediate_size = 0"),
        ({"num_key_value_heads": 5}, BadFileError, "32 query heads, 5 key/value heads"),
        ({"model_type": "mamba"}, UnsupportedError, "model_type 'mamba'"),
        ({"attention_bias": True}, UnsupportedError, "attention_bias"),
        ({"layer_types": ["full_attention"]}, BadFileError, "1 entries"),
        ({"layer_types": ["sliding_attention"] * 16}, BadFileError, "sliding_window"),
    ],
)
def test_an_unusable_config_is_refused_plainly(change: dict[str, Any], error: type[NanokitError], says: str) -> None:
    with pytest.raises(error) as raised:
        ModelShape.from_hf({**PUBLIC["Llama-3.2-1B"][0], **change})
    assert says in str(raised.value)


def test_a_broken_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="no such model folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(BadFileError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadFileError, match="not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(BadFileError, match="not a JSON object"):
        read_config(tmp_path)
