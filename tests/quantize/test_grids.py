"""Every grid of the recipe, from the command to transformers: what loads has the very values we mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import load_by_transformers, some_sentences
from safetensors.torch import load_file, save_file

from nano.errors import BadFileError, RequestError
from nano.families import EMBEDDING, HEAD
from nano.recipe import read_recipe
from quantize.grid import QuantizedTensor, bf16_exact, code_range
from quantize.lm import load_dequantised
from quantize.options import QuantizeOptions
from quantize.packed import Int4Checkpoint, pack_codes
from quantize.recipe import Grid, default_recipe
from quantize.rtn import round_table, round_to_nearest
from quantize.rules import Rule, read_rules
from quantize.run import run_quantize
from quantize.runtimes import takes
from quantize.scales import search_scales, search_zero_points
from quantize.tables import codes_of, dense_of, half_exact


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return some_sentences(tmp_path_factory.mktemp("text"))


def options(**wishes: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"method": "gptq", "samples": 8, "length": 48, **wishes})


EIGHT = Rule(r"model\.layers\.0\..*down_proj", 8)
WISHES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "channel": ("llama", True, {"group_size": "channel"}),
    "channel rtn": ("gemma3_text", True, {"group_size": "channel", "method": "rtn"}),
    "asymmetric": ("qwen3", True, {"symmetry": "asymmetric", "runtime": "onnx"}),
    "asymmetric channel": ("llama", False, {"symmetry": "asymmetric", "group_size": "channel", "runtime": "onnx"}),
    "asymmetric rtn": ("gemma3_text", True, {"symmetry": "asymmetric", "runtime": "onnx", "method": "rtn"}),
    "int8 layer, int4 embedding": ("gemma3_text", True, {"rules": (EIGHT,), "embedding": "int4"}),
    "int8 layer, int8 embedding": ("qwen3", True, {"rules": (EIGHT,), "embedding": "int8"}),
    "int4 embedding, int8 head": ("llama", False, {"embedding": "int4", "head": "int8"}),
    "trained": (
        "llama",
        True,
        {
            "symmetry": "asymmetric",
            "runtime": "onnx",
            "rules": (EIGHT,),
            "embedding": "int8",
            "method": "best",
            "steps": 3,
            "batch": 2,
            "window": 32,
        },
    ),
    "int8 embedding alone": ("qwen3", False, {"embedding": "int8"}),
    "int4 head alone": ("gemma3_text", False, {"head": "int4"}),
}


@pytest.mark.parametrize("name", WISHES)
def test_transformers_loads_every_grid_to_the_same_logits(
    name: str, tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    family, tied, wishes = WISHES[name]
    out = tmp_path / "int4"
    given = options(**wishes)
    run_quantize(tiny_model(family, tie_word_embeddings=tied), [text], out, given)
    ids = torch.randint(3, 300, (2, 40))
    with Int4Checkpoint(out) as checkpoint, torch.no_grad():
        theirs = load_by_transformers(out)
        assert torch.equal(load_dequantised(checkpoint)(ids).logits, theirs(ids).logits)
        wanted = default_recipe(given, tied).grids(checkpoint.shape)
        assert checkpoint.modules == list(wanted)
        for module, grid in wanted.items():
            layout, found = checkpoint.layout(module), checkpoint.quantized(module)
            assert Grid(layout.bits, layout.group_size, layout.symmetric) == grid
            assert torch.equal(found.dequantize(), checkpoint.dense(module + ".weight"))
            assert torch.equal(found.scale_NG.bfloat16().float(), found.scale_NG)
        assert (given.embedding != "float") == (EMBEDDING in checkpoint)
        stored = load_file(out / "model.safetensors")
        assert (HEAD + ".weight" in stored or HEAD + ".weight_packed" in stored) == (not tied)
        if given.embedding != "float":
            assert stored[EMBEDDING + ".weight"].dtype == torch.float16
        assert theirs.get_output_embeddings().weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr() or not tied  # noqa: E501  # fmt: skip


def test_zero_points_are_packed_as_compressed_tensors_packs_them() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for bits in (4, 8):
        low, high = code_range(bits)
        zero_NG = torch.randint(low, high + 1, (43, 3), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        assert torch.equal(pack_codes(zero_NG.T, bits).T, pack_to_int32(zero_NG, bits, packed_dim=0))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_beat_symmetric_grids_and_never_lose(bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight_NK = torch.randn(32, 128, generator=generator) + 1.5 * torch.randn(32, 1, generator=generator)
    scale_NG, zero_NG = search_zero_points(weight_NK, 32, bits)
    asymmetric = round_to_nearest(weight_NK, Grid(bits, 32, symmetric=False))
    symmetric = round_to_nearest(weight_NK, Grid(bits, 32))
    assert asymmetric.zero_NG is not None
    assert torch.equal(asymmetric.scale_NG, scale_NG)
    assert torch.equal(asymmetric.zero_NG, zero_NG)

    def errors(tensor: QuantizedTensor) -> torch.Tensor:
        return (tensor.dequantize() - weight_NK).square().view(32, 4, 32).sum(-1)

    assert bool((errors(asymmetric) <= errors(symmetric)).all())
    assert float(errors(asymmetric).sum()) < 0.7 * float(errors(symmetric).sum())
    assert torch.equal(bf16_exact(scale_NG), scale_NG)
    # a group of one sign, a group of zeros, a constant
    odd_NK = torch.stack((torch.rand(32, generator=generator), torch.zeros(32), torch.full((32,), 0.37)))
    lost_N = (round_to_nearest(odd_NK, Grid(bits, 32, symmetric=False)).dequantize() - odd_NK).abs().amax(-1)
    assert float(lost_N[0]) < 0.6 / (1 << bits)
    assert float(lost_N[1]) == 0
    assert float(lost_N[2]) < 0.002


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-6, 0.02, 3.0])
def test_a_table_is_float16_exactly_and_its_codes_come_back(bits: int, size: float) -> None:
    weight_VD = size * torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    weight_VD[3] = 0
    table = round_table(weight_VD, Grid(bits, 32))
    dense_VD = dense_of(table)
    assert dense_VD.dtype == torch.float16
    assert torch.equal(dense_VD.float(), table.dequantize())
    assert torch.equal(codes_of(dense_VD, table.scale_NG, bits, "x"), table.codes_NK)
    assert torch.equal(table.scale_NG.bfloat16().float(), table.scale_NG)
    if size > 1e-5:
        plain = round_to_nearest(weight_VD, Grid(bits, 32))
        lost = [float((t.dequantize() - weight_VD).square().mean()) for t in (table, plain)]
        assert lost[0] <= lost[1] * (1.0 if bits == 4 else 1.4)
    broken_VD = dense_VD.float()
    broken_VD[5, 7] += table.scale_NG[5, 0] / 3
    with pytest.raises(BadFileError, match="grid"):
        codes_of(broken_VD, table.scale_NG, bits, "x")


def test_every_product_of_code_and_scale_is_a_float16() -> None:
    scale = torch.rand(4096, generator=torch.Generator().manual_seed(3)).mul(30).sub(26).exp2()
    for bits in (4, 8):
        low, high = code_range(bits)
        exact = half_exact(scale, bits)
        products = torch.arange(low, high + 1)[:, None] * exact
        assert torch.equal(products.half().float(), products)
        coarse = (exact / scale)[scale > 2.0**-16]
        assert float((coarse - 1).abs().max()) <= (2.0**-8 if bits == 4 else 1 / 8)


def test_rules_come_from_toml_and_go_before_the_options(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, nanokit: Callable[..., Any]
) -> None:
    file, out = tmp_path / "rules.toml", tmp_path / "int4"
    file.write_text(
        "[[rule]]\npattern = '.*layers\\.1\\..*(q|k|v)_proj'\nbits = 8\ngroup_size = 'channel'\n"
        "[[rule]]\npattern = '.*o_proj'\nbits = 'float'\n"
        "[[rule]]\npattern = '.*v_proj'\nbits = 4\nsymmetric = false\n"
    )
    small = ("--method", "gptq", "--samples", 8, "--length", 48)
    args = ("--data", text, *small, "--rules", file, "--group-size", 64, "--out", out)
    refused = nanokit("quantize", tiny_model("llama"), *args)
    assert refused.status == 2
    assert "--runtime onnx" in refused.stderr
    done = nanokit("quantize", tiny_model("llama"), *args, "--runtime", "onnx", "--json")
    assert done.status == 0, done.stderr
    with Int4Checkpoint(out) as checkpoint:
        layouts = {m.removeprefix("model.layers."): checkpoint.layout(m) for m in checkpoint.modules}
    assert (layouts["1.self_attn.q_proj"].bits, layouts["1.self_attn.q_proj"].group_size) == (8, 64)
    assert (layouts["0.self_attn.v_proj"].bits, layouts["0.self_attn.v_proj"].symmetric) == (4, False)
    assert layouts["1.self_attn.v_proj"].symmetric
    assert "0.self_attn.o_proj" not in layouts
    assert layouts["0.mlp.down_proj"].group_size == 64
    assert layouts["0.mlp.down_proj"].columns == 128
    recorded = json.loads((out / "manifest.json").read_text())["recipe"]["rules"]
    assert [rule["bits"] for rule in recorded] == [8, "float", 4, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "hold rules"),
        ("rule = 3", "hold rules"),
        ("[[rule]]\nbits = 4", "names no modules"),
        ("[[rule]]\npattern = 'x'\nbit = 4", "bit = 4"),
        ("[[rule]]\npattern = 'x'\nbits = true", "bits = True"),
        ("[[rule]]\npattern = 'x'\nbits = 3", "grid that there is not"),
        ("[[rule]]\npattern = '('", "regular expression"),
        ("[[rule", "TOML"),
    ],
)
def test_bad_rule_files_say_what_is_wrong(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(content)
    with pytest.raises((RequestError, BadFileError), match=message):
        read_rules(path)
    with pytest.raises(BadFileError, match="no such file"):
        read_rules(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"symmetry": "asymmetric"}, "--runtime onnx"),
        ({"symmetry": "asymmetric", "runtime": "executorch"}, "symmetric in groups of a multiple of 32"),
        ({"rules": (Rule(".*q_proj", 8, 32),)}, "8 bits symmetric by channel"),
        ({"rules": (Rule(".*q_proj", "float"),), "runtime": "executorch"}, "q_proj' stays float"),
        ({"rules": (Rule("model.embed_tokens", 4, 32, symmetric=False),), "runtime": "onnx"}, "embed_tokens"),
        ({"rules": (Rule("q_proj", 8),)}, "matches nothing"),
        ({"embedding": "int4", "head": "int8"}, "tied|asked to differ"),
        ({"group_size": 128}, "64 input channels"),
        ({"rules": (Rule(".*q_proj", 4, 48),), "runtime": "torch"}, "does not divide"),
    ],
)
def test_what_no_runtime_could_run_is_refused_before_any_work(
    wishes: dict[str, Any], message: str, tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        run_quantize(tiny_model("llama"), [text], tmp_path / "out", options(**wishes))
    assert list(tmp_path.iterdir()) == []


def test_widths_that_32_does_not_divide_get_8_bits_by_row(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tiny_model("llama", hidden_size=48, head_dim=16), tmp_path / "int4"
    with pytest.raises(RequestError, match="48 input channels"):
        run_quantize(folder, [text], tmp_path / "no", options(group_size=32))
    run_quantize(folder, [text], out, options())
    assert "48 input channels, which groups of 32 do not divide: they get 8 bits" in capsys.readouterr().err
    ids = torch.randint(3, 300, (1, 30))
    with Int4Checkpoint(out) as checkpoint, torch.no_grad():
        layouts = [checkpoint.layout(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "mlp.down_proj")]
        assert [(one.bits, one.group_size) for one in layouts] == [(8, 48), (4, 32)]
        assert torch.equal(load_dequantised(checkpoint)(ids).logits, load_by_transformers(out)(ids).logits)


def test_a_rule_without_effect_warns(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = (Rule(".*_proj", 4, 32), Rule(".*q_proj", 8))
    run_quantize(tiny_model("llama"), [text], tmp_path / "out", options(rules=rules, method="rtn"))
    assert "'.*q_proj' has no effect" in capsys.readouterr().err


def test_a_table_that_something_rewrote_is_found(tiny_model: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    run_quantize(tiny_model("llama"), [text], out, options(embedding="int8", method="rtn"))
    tensors = load_file(out / "model.safetensors")
    tensors[EMBEDDING + ".weight"][5, 7] += 0.001
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with Int4Checkpoint(out) as checkpoint, pytest.raises(BadFileError, match="does not lie on the grid"):
        checkpoint.quantized(EMBEDDING)


def test_the_table_of_runtimes() -> None:
    assert takes("executorch", 128, 4, 32, True, "linear")
    assert takes("executorch", 128, 4, 128, True, "linear")
    assert takes("executorch", 48, 8, 48, True, "both")
    assert not takes("executorch", 48, 4, 48, True, "linear")
    assert not takes("executorch", 128, 8, 32, True, "linear")
    assert takes("executorch", 128, 8, 32, True, "table")
    assert not takes("executorch", 128, 4, 16, True, "linear")
    assert not takes("executorch", 128, 4, 32, False, "linear")
    assert takes("onnx", 128, 8, 32, False, "linear")
    assert not takes("onnx", 128, 4, 32, False, "table")
    assert not takes("onnx", 40, 4, 40, True, "linear")
    assert takes("torch", 40, 4, 40, False, "linear")


def test_asymmetric_search_equals_symmetric_where_that_is_best() -> None:
    codes_NK = torch.randint(-7, 8, (4, 64), generator=torch.Generator().manual_seed(4))
    codes_NK[:, ::32], codes_NK[:, 1::32] = 7, -7
    weight_NK = codes_NK * 0.125
    scale_NG, zero_NG = search_zero_points(weight_NK, 32)
    assert torch.equal(scale_NG, search_scales(weight_NK, 32))
    assert not zero_NG.any()


def test_a_build_recipe_holds_grids_and_rules(tmp_path: Path) -> None:
    path = tmp_path / "build.toml"
    path.write_text(
        'teacher = "x"\ndata = ["a"]\nheldout = ["b"]\n[[student]]\nname = "s"\nsize = "150k"\n'
        '[quantize]\ngroup_size = "channel"\nembedding = "int8"\n[[quantize.rules]]\npattern = ".*q_proj"\nbits = 8\n'
    )
    found = read_recipe(path).quantize
    assert (found.group_size, found.embedding, found.rules) == ("channel", "int8", (Rule(".*q_proj", 8),))
    path.write_text(path.read_text().replace("bits = 8", "bits = 3"))
    with pytest.raises(RequestError, match="grid that there is not"):
        read_recipe(path)
