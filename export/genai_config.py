"""genai_config.json: what onnxruntime-genai must know to run model.onnx.

Fields as onnxruntime_genai/models/builders/base.py (0.18, `make_genai_config`) writes them for the CPU.
"""

from __future__ import annotations

from typing import Any

from export.onnx_files import MODEL, SESSION_OPTIONS
from nano.shapes import SLIDING, ModelShape
from nano.tokens import TextTokenizer


def genai_config(
    shape: ModelShape,
    config: dict[str, Any],
    tokenizer: TextTokenizer,
    *,
    context: int,
    chunk: int,
    slack: int | None,
    model: str = MODEL,
) -> dict[str, Any]:
    """The contents of genai_config.json.

    Args:
        shape: the model's dimensions.
        config: config.json, for the ids that begin and pad a text.
        tokenizer: for the ids that end one.
        context: positions that the cache may hold.
        chunk: longest piece of a prompt that one call takes.
        slack: positions kept beyond the window by sliding layers; None where their caches are full-length.
        model: name of the model file.
    """
    eos = list(tokenizer.eos_ids) or [0]
    bos = tokenizer.bos_id if tokenizer.bos_id is not None else config.get("bos_token_id")
    pad = config.get("pad_token_id")
    return {
        "model": {
            "bos_token_id": bos if isinstance(bos, int) else eos[0],
            "context_length": context,
            "decoder": _decoder(shape, slack, model),
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": pad if isinstance(pad, int) else eos[0],
            "type": shape.family,
            "vocab_size": shape.vocab_size,
        },
        "search": {
            "chunk_size": chunk,  # bounds a long prompt's activations: 0.4B, 1,200 tokens: 73 MB beyond load, not 170
            "do_sample": False,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _decoder(shape: ModelShape, slack: int | None, model: str) -> dict[str, Any]:
    """The [model.decoder] part: names of inputs and outputs, the session's options, the sliding window."""
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **SESSION_OPTIONS},
        "filename": model,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
    }
    if slack is not None:
        decoder["sliding_window"] = {
            "window_size": shape.sliding_window,
            "slide_key_value_cache": False,  # the operator evicts by itself
            "slide_inputs": False,
            "layers": [i for i, kind in enumerate(shape.layer_types) if kind == SLIDING],
            "cache_slack": slack,
        }
    return decoder
