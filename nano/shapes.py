"""`ModelShape`: the dimensions of a decoder, read from and written to config.json, with its exact size.

Nothing here imports torch: a shape is known, checked and counted before anything heavy is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nano.errors import BadFileError, UnsupportedError
from nano.families import family_of, linear_shapes, weight_shapes
from nano.model_files import read_json_object, refuse_adapter

FULL, SLIDING = "full_attention", "sliding_attention"

_GEMMA3_OMITTED: Mapping[str, Any] = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "sliding_window": 4096, "max_position_embeddings": 131_072,
}  # fmt: skip
"""What the published text_config of Gemma 3 4B to 27B leaves out: defaults of transformers' `Gemma3TextConfig`."""


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder-only network.

    Attributes:
        family: key of `nano.families.FAMILIES`.
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: V D F L H G A.
        tied: whether the output head is the embedding.
        max_positions: positions the rotary embedding was trained for.
        layer_types: per layer "full_attention" or "sliding_attention".
        sliding_window: positions that a sliding layer sees, itself included; None without sliding layers.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    max_positions: int
    layer_types: tuple[str, ...]
    sliding_window: int | None

    def __post_init__(self) -> None:
        family_of(self.family)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadFileError(
                    "A model's dimension is not usable.", found=f"{name} = {value!r}", expected="a positive integer"
                )
        if self.num_heads % self.num_kv_heads:
            raise BadFileError(
                "The query heads cannot be shared out evenly among the key/value heads.",
                found=f"{self.num_heads} query heads, {self.num_kv_heads} key/value heads",
                expected="a number of query heads that the number of key/value heads divides",
            )
        if len(self.layer_types) != self.num_layers or set(self.layer_types) - {FULL, SLIDING}:
            raise BadFileError(
                "layer_types does not describe the layers.",
                found=f"{len(self.layer_types)} entries {sorted(set(self.layer_types))}",
                expected=f"{self.num_layers} entries, each '{FULL}' or '{SLIDING}'",
            )
        if SLIDING in self.layer_types and not self.sliding_window:
            raise BadFileError(
                "There are sliding-attention layers but no sliding_window.", expected="sliding_window in config.json"
            )

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters, a tied embedding counted once."""
        return sum(math.prod(size) for size in weight_shapes(self).values())

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, and of the head where it is not tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def linear_parameters(self) -> int:
        """Parameters of all decoder linears: what int4 applies to."""
        return self.num_layers * sum(math.prod(size) for size in linear_shapes(self).values())

    def kv_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Bytes of the KV cache at `context` positions; a sliding layer holds at most its window."""
        total = 0
        for kind in self.layer_types:
            slots = min(context, self.sliding_window or context) if kind == SLIDING else context
            total += 2 * slots * self.num_kv_heads * self.head_dim * bytes_per_value
        return total

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape that a config.json describes.

        Raises:
            BadFileError: a key is missing or makes no sense.
            UnsupportedError: a family or feature we do not support.
        """
        if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping):
            config = {**_GEMMA3_OMITTED, **config["text_config"], "model_type": "gemma3_text"}
        family = family_of(str(_needed(config, "model_type")))
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UnsupportedError(
                    "Linears with a bias are not supported.",
                    found=f"{key} = true",
                    expected="a model of the family without them",
                    todo="where all of them are zero, set it to false in config.json and take them out of the weights",
                )
        heads, hidden, layers = (
            int(_number(config, k)) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers")
        )
        head_dim = config.get("head_dim")
        if head_dim is None:
            head_dim = family.head_dim_default or hidden // max(heads, 1)
        _check_numbers(config)
        layer_types = _layer_types(config, layers)
        return cls(
            family=family.model_type,
            vocab_size=_number(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_number(config, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
            max_positions=config.get("max_position_embeddings") or 2048,
            layer_types=layer_types,
            sliding_window=config.get("sliding_window") if SLIDING in layer_types else None,
        )

    def to_hf(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A config.json for this shape; what is no dimension (rotary base, token ids, eps) comes from `base`."""
        family = family_of(self.family)
        config = dict(base or {})
        for legacy in ("sliding_window_pattern", "_sliding_window_pattern", "quantization_config"):
            config.pop(legacy, None)
        config.update(
            model_type=family.model_type,
            architectures=[family.architecture],
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            max_position_embeddings=self.max_positions,
        )
        if self.sliding_window is not None or self.family == "gemma3_text":
            config.update(layer_types=list(self.layer_types), sliding_window=self.sliding_window)
        elif "layer_types" in config:  # Qwen3's lists them even where all are alike
            config.update(layer_types=list(self.layer_types))
        return config

    def resized(self, **dimensions: Any) -> ModelShape:
        """This shape with some dimensions replaced."""
        return replace(self, **dimensions)


def _needed(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise BadFileError(
            "config.json lacks a key that is needed.",
            found="no value for " + key,
            expected=f"'{key}' as transformers writes it",
            todo="save the model again with save_pretrained, or copy the config.json it was published with",
        )
    return config[key]


def _number(config: Mapping[str, Any], key: str) -> int:
    value = _needed(config, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadFileError("config.json has an unusable value.", found=f"{key} = {value!r}", expected="an integer")
    return value


def _check_numbers(config: Mapping[str, Any]) -> None:
    """What is no dimension and yet a number that the model computes with.

    Raises:
        BadFileError: a key is there, and its value is no positive number.
    """
    for key in ("rms_norm_eps", "rope_theta"):
        value = config.get(key, 1.0)
        if value is None and key == "rope_theta":  # transformers 5 keeps it in rope_parameters
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise BadFileError(
                "config.json has an unusable value.", found=f"{key} = {value!r}", expected="a positive number"
            )
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise BadFileError(
                "config.json has an unusable value.", found=f"{key} = {config[key]!r}", expected="an object, or null"
            )


def _layer_types(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Which layers slide: as listed, or by Gemma's older `sliding_window_pattern` (every n-th layer is full)."""
    listed = config.get("layer_types")
    if listed:
        if not isinstance(listed, list):
            raise BadFileError(
                "config.json has an unusable value.", found=f"layer_types = {listed!r}", expected="a list, one a layer"
            )
        return tuple(str(kind) for kind in listed)
    if config.get("model_type") == "gemma3_text":
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        return tuple(FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers))
    if config.get("use_sliding_window"):
        first = config.get("max_window_layers", layers)
        return tuple(SLIDING if i >= first else FULL for i in range(layers))
    return (FULL,) * layers


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder as a dictionary.

    Raises:
        BadFileError: the folder or the file is missing, the file is not JSON, or the folder holds an adapter.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise BadFileError("There is no such model folder.", found=str(folder), todo="check the path")
    refuse_adapter(folder)
    if not path.is_file():
        others = sorted(entry.name for entry in folder.glob("*.gguf"))
        raise BadFileError(
            "This folder is not a Hugging Face model.",
            found=f"no config.json in {folder}" + (f", but {others[0]}" if others else ""),
            expected="config.json, *.safetensors and a tokenizer, as save_pretrained writes them",
            todo="name the folder of the float model that the GGUF file was made from" if others else None,
        )
    return read_json_object(path)
