"""An int4 folder as a GGUF with the same codes (Q4_0), and llama.cpp behind what `export.bench_worker` measures.

Q4_0 is a float16 scale and 16 bytes a block of 32: code + 8, the first 16 columns in the low nibbles. Scales that are
no float16 are rounded; speed does not see it. Names: gguf-py's table of llama.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT, BATCH = 2048, 128
BLOCK = 32
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "gemma3_text": "gemma3"}
LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
PRE_NORMS = ("attn_norm", "ffn_norm")
POST_NORMS = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")


def write_gguf(int4: Path, path: Path) -> None:
    """Write the GGUF. Its vocabulary has no texts: it is fed ids."""
    import gguf

    from nano.families import EMBEDDING, FINAL_NORM, HEAD, family_of, layer_prefix
    from nano.shapes import read_config
    from quantize.packed import Int4Checkpoint

    with Int4Checkpoint(int4) as checkpoint:
        shape, config = checkpoint.shape, read_config(int4)
        family, architecture = family_of(shape.family), ARCHITECTURES[shape.family]
        writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
        _settings(writer, shape, config)

        def add_linear(module: str, name: str, rotated_heads: int = 0) -> None:
            grid = checkpoint.quantized(module)
            data = q4_0(grid.codes_NK.numpy(), grid.scale_NG.numpy(), rotated_heads)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

        def add_norm(module: str, name: str) -> None:
            weight = checkpoint.dense(f"{module}.weight").float() + family.norm_offset
            writer.add_tensor(f"{name}.weight", weight.numpy())

        add_linear(EMBEDDING, "token_embd")
        add_norm(FINAL_NORM, "output_norm")
        if not shape.tied:
            add_linear(HEAD, "output")
        for layer in range(shape.num_layers):
            prefix, block = layer_prefix(layer), f"blk.{layer}."
            for norm, name in zip(family.layer_norms, POST_NORMS if family.post_norms else PRE_NORMS, strict=True):
                add_norm(prefix + norm, block + name)
            if family.qk_norm:
                add_norm(f"{prefix}self_attn.q_norm", f"{block}attn_q_norm")
                add_norm(f"{prefix}self_attn.k_norm", f"{block}attn_k_norm")
            heads = {"attn_q": shape.num_heads, "attn_k": shape.num_kv_heads} if architecture == "llama" else {}
            for module, name in LINEARS.items():
                add_linear(prefix + module, block + name, heads.get(name, 0))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _settings(writer: Any, shape: Any, config: dict[str, Any]) -> None:
    """The model's dimensions under llama.cpp's keys."""
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(full.get("rope_theta", 10000.0)))
    if shape.sliding_window:
        writer.add_sliding_window(shape.sliding_window)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(2)  # mostly Q4_0
    writer.add_tokenizer_model("no_vocab")


def q4_0(codes_NK: np.ndarray[Any, Any], scale_NG: np.ndarray[Any, Any], rotated_heads: int) -> np.ndarray[Any, Any]:
    """Codes int8 (N, K) and scales (N, K / 32) as uint8 (N, K / 32 * 18).

    Args:
        rotated_heads: for llama's queries and keys the heads whose rows llama.cpp pairs up (it rotates neighbours,
            transformers halves); 0 leaves rows as they are.
    """
    rows, columns = codes_NK.shape
    if rotated_heads:
        half = rows // rotated_heads // 2
        order = np.arange(rows).reshape(rotated_heads, 2, half).swapaxes(1, 2).reshape(-1)
        codes_NK, scale_NG = codes_NK[order], scale_NG[order]
    unsigned = (codes_NK.astype(np.int16) + 8).astype(np.uint8).reshape(rows, columns // BLOCK, BLOCK)
    nibbles = unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4
    repeat = columns // BLOCK // scale_NG.shape[1]
    scales = np.repeat(scale_NG, repeat, axis=1).astype(np.float16).view(np.uint8).reshape(rows, columns // BLOCK, 2)
    return np.ascontiguousarray(np.concatenate([scales, nibbles], -1).reshape(rows, -1))


class LlamaModel:
    """llama.cpp's context, with the two calls that are measured."""

    def __init__(self, model: Any) -> None:
        self._model, self._vocabulary = model, model.n_vocab()

    def prefill(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Logits after a prompt."""
        self._model.reset()
        self._model.eval(list(ids))
        return self._logits()

    def decode(self, token: int) -> np.ndarray[Any, Any]:
        """Logits after one more token."""
        self._model.eval([token])
        return self._logits()

    def _logits(self) -> np.ndarray[Any, Any]:
        import llama_cpp

        row = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,)).copy()


def prepare(folder: Path, threads: int) -> Callable[[], LlamaModel]:
    """Import llama.cpp; a function that loads the model."""
    import llama_cpp

    def load() -> LlamaModel:
        path = str(folder / "model.gguf")
        return LlamaModel(
            llama_cpp.Llama(
                path, n_ctx=CONTEXT, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, verbose=False
            )
        )

    return load
