"""The .pte writer: every family against the simulation, codes read back, kernels, metadata, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

pytest.importorskip("executorch")

from export.executorch import adapt_tokenizer, write_pte
from export.executorch_file import MODEL, check_whole
from export.executorch_readback import open_pte, read_codes
from export.executorch_runtime import open_executorch, run_llm_runner
from export.options import ExportOptions
from nano.errors import BadFileError, RequestError, UnsupportedError, WorkError
from nano.lm import generate
from nano.tokens import copy_tokenizer, load_tokenizer
from quantize.grid import QuantizedTensor, bf16_exact, round_to_codes
from quantize.lm import open_int4_model
from quantize.packed import PACKED, SCALE, SHAPE, Int4Checkpoint, write_int4

Ids = npt.NDArray[np.int64]
EXACT = 1e-5
"""Below this no code flipped at a rounding border: what remains is the order of additions in float32."""
GEMMA_ROPE = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": False}, {"group": 64, "keep": ("lm_head",)}),
    ("llama", {}, {"embedding": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, {}),
    ("gemma3_text", {"rope_parameters": GEMMA_ROPE}, {"embedding": True}),
]
IDS = [f"{family}-{i}" for i, (family, _, _) in enumerate(CASES)]


@pytest.fixture(scope="module")
def texts() -> list[Ids]:
    """Well past the sliding window of 16, and over the border of several chunks."""
    return [np.random.default_rng(seed).integers(3, 320, 90) for seed in range(4)]


@pytest.fixture(params=CASES, ids=IDS)
def int4(request: pytest.FixtureRequest, tiny_model: Callable[..., Path], int4_folder: Callable[..., Path]) -> Path:
    family, changes, grid = request.param
    return int4_folder(tiny_model(family, **changes), **grid)


def errors(found: list[npt.NDArray[np.float32]], expected: list[npt.NDArray[np.float32]]) -> list[float]:
    """Relative error of each window's logits."""
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(found, expected, strict=True)]


def test_logits_are_the_simulations(int4: Path, exported: Callable[..., Any], texts: list[Ids]) -> None:
    """Random weights leave rounding borders few enough that some windows have no flipped code at all."""
    folder, _ = exported(int4, logits="all", chunk=24)
    model = open_executorch(folder)
    assert (model.context, model.chunk, model.vocab_size, model.activations) == (256, 24, 320, "int8-xnnpack")
    expected = open_int4_model(int4, "int8-xnnpack").logits(texts)
    found = errors(model.logits(texts), expected)
    assert min(found) < EXACT
    assert max(found) < 5e-3
    float_errors = errors(expected, open_int4_model(int4).logits(texts))
    assert min(float_errors) > 1e-3, "the test would not see float activations"
    # the same text token by token, and as a prompt in chunks; one flipped code stays in the cache
    rows = model.logits(texts)[0]
    steps = [model.prefill(texts[0][:50].tolist()), *(model.decode(int(i)) for i in texts[0][50:])]
    found = errors(steps, list(rows[49:]))
    assert min(found) < EXACT
    assert max(found) < 2e-2


def test_codes_in_the_file_are_the_checkpoints(int4: Path, exported: Callable[..., Any]) -> None:
    folder, facts = exported(int4, logits="all", chunk=24)
    with Int4Checkpoint(int4) as checkpoint:
        found = dict(read_codes(folder))
        assert set(found) == set(checkpoint.modules)
        for name, tensor in found.items():
            expected = checkpoint.quantized(name)
            assert (tensor.bits, tensor.group_size) == (expected.bits, expected.group_size)
            assert torch.equal(tensor.codes_NK, expected.codes_NK)
            assert torch.equal(tensor.scale_NG, expected.scale_NG)
        raw = (folder / MODEL).read_bytes()
        q_proj = checkpoint.quantized("model.layers.1.self_attn.q_proj")
        nibbles = (q_proj.codes_NK + 8).to(torch.uint8).flatten()
        assert (nibbles[0::2] | nibbles[1::2] << 4).numpy().tobytes() in raw
        shape, tied = checkpoint.shape, checkpoint.shape.tied
    assert facts["delegation"]["linears_int4"] == 14
    assert facts["delegation"]["delegates"] == 5
    footprint = facts["footprint"]
    assert footprint["file_bytes"] == len(raw) == check_whole(folder).end
    assert footprint["linear_bytes"] == shape.linear_parameters * (0.5 + 2 / q_proj.group_size)
    table = 320 * 64
    if "model.embed_tokens" in found:
        assert footprint["packed_copy_bytes"] - footprint["linear_bytes"] == table * 0.5625
        assert footprint["embedding_bytes"] == table * 0.5625, "codes, and scales in float16 where that is exact"
        assert footprint["head_bytes"] == table / 32 * 2, "bfloat16 scales: the codes are the embedding's"
        assert tied
    else:
        assert footprint["head_bytes"] == footprint["embedding_bytes"] == 4 * table
    parts = ("linear_bytes", "head_bytes", "embedding_bytes", "float_weight_bytes")
    program = footprint["file_bytes"] - sum(footprint[part] for part in parts)
    assert 0 < program < 60_000, "what is no weight: the program, the delegates' graphs, padding"


def test_caches_are_rings_where_layers_slide(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any]
) -> None:
    """gemma: one layer with a window of 16, one full; 2 key/value heads of 32, float32, keys and values."""
    int4 = int4_folder(tiny_model("gemma3_text", rope_parameters=GEMMA_ROPE), embedding=True)
    folder, facts = exported(int4, logits="all", chunk=24)
    assert facts["footprint"]["kv_cache_bytes"] == (16 + 24 - 1 + 256) * 2 * 32 * 4 * 2
    with open_pte(folder) as pte:
        assert pte.planned_bytes == facts["footprint"]["planned_bytes"] + facts["footprint"]["kv_cache_bytes"]
        assert pte.operators["llama::update_cache"] == pte.operators["llama::update_cache_with_indices"] == 2


def test_the_cpp_runner_continues_as_we_do(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """TextLLMRunner reads the metadata methods, takes a prompt longer than a chunk, and stays off our screen."""
    int4 = int4_folder(tiny_model("llama"), embedding=True)
    folder, _ = exported(int4, context=96, chunk=8)
    model = open_executorch(folder)
    prompt = "Once upon a time there was a fox. "
    ours = model.tokenizer.decode(generate(model, prompt, 24))
    capfd.readouterr()
    theirs = run_llm_runner(folder, prompt, 24)
    assert capfd.readouterr() == ("", "")
    printable = "".join(c for c in ours if c.isascii())  # the C++ tokenizer may cut broken UTF-8 differently
    assert "".join(c for c in theirs if c.isascii()) == printable
    assert len(printable) > 8


def test_metadata_methods(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any]
) -> None:
    int4 = int4_folder(tiny_model("llama"), embedding=True)
    folder, facts = exported(int4, context=96, chunk=8)
    with open_pte(folder) as pte:
        plans = [plan for plan in pte.program.execution_plan if plan.name != "forward"]
    plain = {plan.name: next(iter(vars(plan.values[0].val).values())) for plan in plans}
    expected = {
        "get_max_seq_len": 8, "get_max_context_len": 96, "use_kv_cache": True, "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True, "get_vocab_size": 320, "get_n_layers": 2, "get_bos_id": 1, "get_eos_ids": 2,
    }  # fmt: skip
    assert plain == expected
    assert facts["footprint"]["logits_bytes"] == 4 * 320


def test_an_int8_head_with_a_scale_a_row(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any],
    texts: list[Ids], tmp_path: Path,
) -> None:  # fmt: skip
    """XNNPACK has no blockwise int8, but one with a scale a row: tied embedding and head in 8 bits."""
    source = int4_folder(tiny_model("llama"))
    int4 = rewritten(source, tmp_path / "int4", bits=8, group=64)
    folder, facts = exported(int4, logits="all", chunk=1)  # also the shortest chunk there is
    assert facts["modules"]["model.embed_tokens"]["bits"] == 8
    assert facts["delegation"]["fully_connected"]["qcint8"] == 1
    found = dict(read_codes(folder))
    with Int4Checkpoint(int4) as checkpoint:
        assert torch.equal(found["model.embed_tokens"].codes_NK, checkpoint.quantized("model.embed_tokens").codes_NK)
        assert set(found) == set(checkpoint.modules)
    expected = open_int4_model(int4, "int8-xnnpack").logits(texts)
    assert min(errors(open_executorch(folder).logits(texts), expected)) < EXACT


def rewritten(source: Path, folder: Path, *, bits: int, group: int, exact: bool = True) -> Path:
    """An int4 folder with its embedding put on a grid of its own."""
    folder.mkdir(parents=True)
    with Int4Checkpoint(source) as checkpoint:
        tensors: list[tuple[str, torch.Tensor | QuantizedTensor]] = []
        for name in dict.fromkeys(n.removesuffix(PACKED).removesuffix(SCALE).removesuffix(SHAPE) for n in checkpoint.store.names()):  # noqa: E501  # fmt: skip
            if name in checkpoint:
                tensors.append((f"{name}.weight", checkpoint.quantized(name)))
            elif name == "model.embed_tokens.weight":
                weight_VD = checkpoint.store.tensor(name)
                scale = bf16_exact(weight_VD.view(320, -1, group).abs().amax(-1) / ((1 << (bits - 1)) - 1))
                scale = scale if exact else scale * 1.001
                codes = round_to_codes(weight_VD, scale, group, bits)
                tensors.append((name, QuantizedTensor(codes, scale, group, bits)))
            else:
                tensors.append((name, checkpoint.store.tensor(name)))
        write_int4(folder, checkpoint.config, tensors)
    copy_tokenizer(source, folder)
    return folder


def refused(int4: Path, **options: Any) -> str:
    """The message with which an export is refused."""
    with Int4Checkpoint(int4) as checkpoint, pytest.raises(UnsupportedError) as caught:
        write_pte(checkpoint, Path("/nowhere"), ExportOptions(**options), load_tokenizer(int4))
    return str(caught.value)


def test_what_the_kernels_cannot_take_is_refused_first(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    llama = tiny_model("llama")
    plain = int4_folder(llama)
    assert "always takes int8 activations" in refused(plain, activations="float")
    assert "--chunk 0" in refused(plain, chunk=0)
    assert "at most the 256 positions" in refused(plain, context=257)
    assert "groups of 16" in refused(int4_folder(llama, group=16))
    assert "8 bits" in refused(int4_folder(llama, bits=8))
    float_linear = int4_folder(llama, keep=("model.layers.1.mlp.up_proj",))
    assert "'model.layers.1.mlp.up_proj' is float" in refused(float_linear)
    assert "8 bits symmetric by channel" in refused(rewritten(plain, tmp_path / "grouped", bits=8, group=32))
    inexact = refused(rewritten(plain, tmp_path / "inexact", bits=4, group=32, exact=False))
    assert "no bfloat16" in inexact
    capped = tiny_model("gemma3_text", final_logit_softcapping=30.0)
    assert "final_logit_softcapping = 30.0" in refused(int4_folder(capped))


def test_truncated_and_damaged_files_are_errors_not_crashes(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any], tmp_path: Path
) -> None:
    int4 = int4_folder(tiny_model("llama"), embedding=True)
    folder, _facts = exported(int4, context=96, chunk=8)
    whole = (folder / MODEL).read_bytes()
    copy_tokenizer(folder, tmp_path)
    with pytest.raises(BadFileError, match="no model"):
        open_executorch(tmp_path)
    for size in (0, 20, 60, 5000, len(whole) // 2, len(whole) - 1):
        (tmp_path / MODEL).write_bytes(whole[:size])
        for use in (open_executorch, lambda path: list(read_codes(path)), lambda path: run_llm_runner(path, "a", 1)):
            with pytest.raises(BadFileError, match="truncated"):
                use(tmp_path)
    (tmp_path / MODEL).write_bytes(b"PK" + whole[2:4] + b"ZIPP" + whole[8:])
    with pytest.raises(BadFileError, match="not an ExecuTorch program"):
        open_executorch(tmp_path)
    program = check_whole(folder).program_bytes
    for seed in range(12):  # the flatbuffer itself damaged: an error or, where it does not matter, none
        position = int(np.random.default_rng(seed).integers(40, program))
        (tmp_path / MODEL).write_bytes(whole[:position] + bytes(16) + whole[position + 16 :])
        for use in (open_executorch, lambda path: list(read_codes(path))):
            try:
                use(tmp_path)
            except (BadFileError, RequestError) as error:
                assert str(tmp_path) in str(error)  # noqa: PT017


def test_one_flipped_bit_in_a_weight_is_found(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any], tmp_path: Path
) -> None:
    int4 = int4_folder(tiny_model("llama"), embedding=True)
    folder, _facts = exported(int4, context=96, chunk=8)
    whole = bytearray((folder / MODEL).read_bytes())
    with Int4Checkpoint(int4) as checkpoint:
        down = checkpoint.quantized("model.layers.0.mlp.down_proj").codes_NK
        embedding = checkpoint.quantized("model.embed_tokens")
    nibbles = (down + 8).to(torch.uint8).flatten()
    place = whole.find((nibbles[0::2] | nibbles[1::2] << 4).numpy().tobytes())
    whole[place + 7] ^= 1
    (tmp_path / MODEL).write_bytes(whole)
    with pytest.raises(BadFileError, match="changed since it was written"):
        list(read_codes(tmp_path))
    whole[place + 7] ^= 1
    rows = (embedding.codes_NK + 8).to(torch.uint8).flatten()
    place = whole.find((rows[0::2] | rows[1::2] << 4).numpy().tobytes())
    assert place > 0
    whole[place + 7] ^= 1
    (tmp_path / MODEL).write_bytes(whole)
    with pytest.raises(BadFileError, match="changed since it was written"):  # the head's hash covers the table of both
        list(read_codes(tmp_path))


def test_sentencepiece_decoders_keep_spaces_token_by_token(stories: Path, tmp_path: Path) -> None:
    copy_tokenizer(stories, tmp_path)
    before = load_tokenizer(tmp_path)
    assert adapt_tokenizer(tmp_path)
    assert not adapt_tokenizer(tmp_path), "once is enough"
    after = load_tokenizer(tmp_path)
    ids = before.encode("Once upon a time  there was é")
    assert after.encode("Once upon a time  there was é") == ids
    assert after.decode(ids).strip() == before.decode(ids)
    assert "".join(after.decode([i]) for i in ids[:8]) == after.decode(ids[:8])
    assert json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]["type"] == "Sequence"


def test_a_linear_without_the_kernel_is_an_error(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], exported: Callable[..., Any]
) -> None:
    from dataclasses import replace

    from export.executorch_facts import require_kernels
    from export.executorch_readback import named_filters

    int4 = int4_folder(tiny_model("llama"), embedding=True)
    folder, _ = exported(int4, context=96, chunk=8)
    with open_pte(folder) as pte, Int4Checkpoint(int4) as checkpoint:
        filters = dict(named_filters(pte))
        require_kernels(filters, checkpoint.shape)
        name = "model.layers.1.mlp.gate_proj"
        filters[name] = replace(filters[name], kind="xnn_datatype_fp32")
        with pytest.raises(WorkError, match=r"1 of 14, the first is 'model\.layers\.1\.mlp\.gate_proj'"):
            require_kernels(filters, checkpoint.shape)
