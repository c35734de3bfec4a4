"""The ONNX writer: every family against transformers, codes read back, the file's layout, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from checks import relative  # noqa: E402

from export.onnx import write_onnx  # noqa: E402
from export.onnx_data import PAGE  # noqa: E402
from export.onnx_files import CONFIG, DATA, MODEL, check_files  # noqa: E402
from export.onnx_readback import read_codes  # noqa: E402
from export.onnx_runtime import OnnxModel, genai_continuation, open_onnx, run_genai  # noqa: E402
from export.options import ExportOptions  # noqa: E402
from nano.errors import BadFileError, RequestError, UnsupportedError  # noqa: E402
from nano.lm import generate  # noqa: E402
from nano.tokens import copy_tokenizer, load_tokenizer  # noqa: E402
from quantize.lm import open_int4_model  # noqa: E402
from quantize.packed import Int4Checkpoint  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
GEMMA_ROPE = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {}, {}),
    ("llama", {"tie_word_embeddings": False, "rope_parameters": LLAMA3}, {"embedding": True, "group": 16}),
    ("llama", {"rope_parameters": LINEAR}, {"embedding": True, "bits": 8}),
    ("llama", {"head_dim": 8}, {"keep": ("model.layers.1.mlp.up_proj", "lm_head")}),
    ("qwen3", {}, {"embedding": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, {}),
    ("gemma3_text", {}, {"embedding": True}),
    ("gemma3_text", {"rope_parameters": GEMMA_ROPE}, {}),
]
IDS = [f"{family}-{i}" for i, (family, _, _) in enumerate(CASES)]


def export(int4: Path, out: Path, **options: Any) -> dict[str, Any]:
    """What the export stage does around the writer."""
    out.mkdir(parents=True)
    with Int4Checkpoint(int4) as checkpoint:
        facts = write_onnx(checkpoint, out, ExportOptions(**options), load_tokenizer(int4))
    copy_tokenizer(int4, out)
    return facts


@pytest.fixture(scope="module")
def text() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(3, 320, 90)


@pytest.mark.parametrize(("family", "changes", "grid"), CASES, ids=IDS)
def test_float_activations_equal_transformers(
    family: str, changes: dict[str, Any], grid: dict[str, Any], tiny_model: Callable[..., Path],
    int4_folder: Callable[..., Path], text: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """Whole windows, chunked prefill and decoding, with the text well past the sliding window of 16."""
    int4 = int4_folder(tiny_model(family, **changes), **grid)
    reference = open_int4_model(int4).logits([text])[0]
    for name, chunk in (("ring", 8), ("full", 300)):
        facts = export(int4, tmp_path / name, logits="all", activations="float", chunk=chunk)
        model = open_onnx(tmp_path / name)
        assert relative(model.logits([text[:5], text])[1], reference) < 2e-6
        assert relative(model.prefill(text[:50].tolist()), reference[49]) < 3e-6
        for position in range(50, 90):
            assert relative(model.decode(int(text[position])), reference[position]) < 3e-6
        windowed = family == "gemma3_text" or "sliding_window" in changes
        slots = [16 + 8 if windowed and name == "ring" and i == (family == "qwen3") else 256 for i in range(2)]
        shape = Int4Checkpoint(int4).shape
        assert facts["footprint"]["kv_cache_bytes"] == 2 * 4 * shape.num_kv_heads * shape.head_dim * sum(slots)


@pytest.mark.parametrize(("family", "changes", "grid"), CASES, ids=IDS)
def test_codes_are_the_checkpoints_and_lie_once_in_the_file(
    family: str, changes: dict[str, Any], grid: dict[str, Any], tiny_model: Callable[..., Path],
    int4_folder: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    int4 = int4_folder(tiny_model(family, **changes), **grid)
    facts = export(int4, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / MODEL, load_external_data=False).graph
    places = {i.name: {e.key: e.value for e in i.external_data} for i in graph.initializer if i.external_data}
    data = (tmp_path / "out" / DATA).read_bytes()
    with Int4Checkpoint(int4) as checkpoint:
        found = dict(read_codes(tmp_path / "out"))
        assert list(found) == list(facts["modules"]) == [n for n in checkpoint.modules if n in found]
        assert set(found) == set(checkpoint.modules)
        for name, tensor in found.items():
            expected = checkpoint.quantized(name)
            assert (tensor.bits, tensor.group_size) == (expected.bits, expected.group_size)
            assert torch.equal(tensor.codes_NK, expected.codes_NK)
            assert torch.equal(tensor.scale_NG, expected.scale_NG)
            place = places[facts["modules"][name]["codes"]]
            raw = data[int(place["offset"]) :][: int(place["length"])]
            low = np.frombuffer(raw, np.uint8) & (15 if expected.bits == 4 else 255)
            flat = expected.codes_NK.flatten().numpy().astype(int)[:: 2 if expected.bits == 4 else 1]
            assert np.array_equal(low.astype(int) - (8 if expected.bits == 4 else 128), flat)
        tied = checkpoint.shape.tied
    assert all(int(p["offset"]) % PAGE == 0 for p in places.values() if int(p["length"]) >= PAGE)
    ends = sorted({(int(p["offset"]), int(p["offset"]) + int(p["length"])) for p in places.values()})
    assert all(a[1] <= b[0] for a, b in pairwise(ends)), "regions overlap only where they are one"
    assert facts["footprint"]["file_bytes"] == len(data) + (tmp_path / "out" / MODEL).stat().st_size
    parts = ("linear_bytes", "embedding_bytes", "float_weight_bytes")
    assert sum(facts["footprint"][part] for part in parts) == sum(b - a for a, b in ends)
    head = next(n for n in graph.node if n.output[0] == "logits")
    look_up = next(n for n in graph.node if n.name == "model.embed_tokens")
    if tied:
        weight = look_up.input[0] if "Quantized" in look_up.op_type or look_up.op_type == "Gather" else ""
        assert places[head.input[1]] == places[weight]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_genai_continues_as_the_plain_session_does(
    family: str, tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """32 greedy tokens past the window of 16; logits of the last row only, as phones take it."""
    int4 = int4_folder(tiny_model(family), embedding=True)
    export(int4, tmp_path / "out", chunk=8)
    model = open_onnx(tmp_path / "out")
    ours = generate(model, "Once upon a time there was", 32)
    tokenizer, theirs = genai_continuation(tmp_path / "out", "Once upon a time there was", 32)
    assert theirs[: len(ours)] == ours
    assert len(ours) == 32 or theirs[len(ours)] in model.tokenizer.eos_ids
    assert tokenizer.encode("Ünï 12").tolist() == model.tokenizer.encode("Ünï 12")
    short = genai_continuation(tmp_path / "out", "O", 3)[1]  # a text shorter than the window
    assert short == generate(model, "O", 3)
    rest = ours[: len(ours) - 1]
    assert np.array_equal(model.prefill(model.tokenizer.prompt("Once upon a time there was") + rest).argmax(), ours[-1])


def test_the_oldest_runtime_is_named(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    cases = (("llama", False, 300, "1.20"), ("llama", True, 300, "1.23"), ("gemma3_text", True, 300, "1.24"),
             ("gemma3_text", True, 8, "1.29"))  # fmt: skip
    for i, (family, embedding, chunk, version) in enumerate(cases):
        facts = export(int4_folder(tiny_model(family), embedding=embedding), tmp_path / str(i), chunk=chunk)
        assert facts["graph"]["minimum_onnxruntime"] == version
        assert (facts["graph"]["opset"], facts["graph"]["ir_version"]) == (21, 10)


def test_last_row_equals_all_rows(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], text: Any, tmp_path: Path
) -> None:
    int4 = int4_folder(tiny_model("gemma3_text"))
    models: dict[str, OnnxModel] = {}
    for logits in ("all", "last"):
        export(int4, tmp_path / logits, logits=logits, activations="float", chunk=16)
        models[logits] = open_onnx(tmp_path / logits)
    assert relative(*(model.logits([text[:40]])[0] for model in models.values())) < 2e-6
    assert relative(*(model.prefill(text.tolist()) for model in models.values())) < 2e-6
    with pytest.raises(RequestError, match="does not fit"):
        models["all"].logits([np.zeros(257, np.int64)])


def test_a_tokenizer_config_is_made_where_there_is_none(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = int4_folder(tiny_model("llama"), bits=8)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (bare / name).write_bytes((source / name).read_bytes())
    export(bare, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["bos_token"] == "<s>"
    assert isinstance(run_genai(tmp_path / "out", "Once", 4), str)


@pytest.mark.parametrize(
    ("config", "options", "found"),
    [
        ({"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "dynamic"),
        ({}, {"context": 257}, "--context 257"),
        ({}, {"chunk": 0}, "--chunk 0"),
        ({}, {"kv_cache": "int8"}, "--kv-cache int8"),
    ],
)
def test_what_the_graph_cannot_carry_is_refused_before_work(
    config: dict[str, Any], options: dict[str, Any], found: str, tiny_model: Callable[..., Path],
    int4_folder: Callable[..., Path], tmp_path: Path,
) -> None:  # fmt: skip
    source = int4_folder(tiny_model("llama"))
    changed = tmp_path / "int4"
    changed.mkdir()
    for path in source.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    written = json.loads((source / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**written, **config}))
    with pytest.raises(UnsupportedError, match=found):
        export(changed, tmp_path / "out", **options)
    assert not list((tmp_path / "out").iterdir())


def test_a_grid_without_a_kernel_is_refused(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    int4 = int4_folder(tiny_model("llama", hidden_size=40, intermediate_size=40, head_dim=8, num_attention_heads=5,
                                  num_key_value_heads=5), group=40)  # fmt: skip
    with pytest.raises(UnsupportedError, match="groups of 40"):
        export(int4, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_broken_bundles_are_named(
    tiny_model: Callable[..., Path], int4_folder: Callable[..., Path], tmp_path: Path
) -> None:
    int4 = int4_folder(tiny_model("llama"))
    out = tmp_path / "out"
    export(int4, out)
    check_files(out)
    data, model = (out / DATA).read_bytes(), (out / MODEL).read_bytes()
    (out / DATA).write_bytes(data[:-100])
    for read in (open_onnx, lambda folder: run_genai(folder, "a", 1), lambda folder: list(read_codes(folder))):
        with pytest.raises(BadFileError, match="truncated"):
            read(out)
    (out / DATA).unlink()
    with pytest.raises(BadFileError, match="missing"):
        open_onnx(out)
    (out / DATA).write_bytes(data)
    (out / MODEL).write_bytes(model[: len(model) // 2])
    with pytest.raises(BadFileError, match="not ONNX"):
        open_onnx(out)
    (out / MODEL).write_bytes(model)
    (out / CONFIG).unlink()
    with pytest.raises(BadFileError, match=CONFIG):
        run_genai(out, "a", 1)
