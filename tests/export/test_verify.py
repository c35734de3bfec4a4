"""What verify finds: damage of any file, one changed code or scale, another checkpoint; and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.options import ExportOptions
from export.run import run_export
from export.verify import require_verified, summary, verify_bundle
from nano.errors import BadFileError, CheckFailedError, RequestError
from nano.manifest import read_manifest

Folders = tuple[Path, Path]
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["onnx", "executorch"])
def made(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], int4_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Folders:  # fmt: skip
    """(bundle, int4 folder) of each format."""
    pytest.importorskip("onnxruntime" if request.param == "onnx" else "executorch")
    int4 = int4_folder(tiny_model("llama"), embedding=True)
    bundle = tmp_path_factory.mktemp(request.param) / "bundle"
    run_export(int4, request.param, bundle, ExportOptions(context=64, chunk=16))
    return bundle, int4


@pytest.fixture
def copied(made: Folders, tmp_path: Path) -> Folders:
    """The same, free to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "bundle")), Path(shutil.copytree(made[1], tmp_path / "int4"))


def changed(int4: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change one tensor of a checkpoint in place."""
    path = int4 / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors[name])
    save_file(tensors, path)


def test_a_whole_bundle_passes(made: Folders) -> None:
    bundle, int4 = made
    verification = verify_bundle(bundle, int4)
    manifest = read_manifest(bundle)
    assert verification.ok
    assert verification.same_checkpoint is True
    assert verification.files == len(manifest.files) == len(list(bundle.iterdir())) - 1
    assert verification.bytes == sum(path.stat().st_size for path in bundle.iterdir() if path.name != "manifest.json")
    assert verification.exact is not None
    # 2 layers of q, k, v, o (64 x 64, 64 x 32 twice, 64 x 64) and an MLP of 64 x 96 three times; embedding 320 x 64
    assert (verification.exact.modules, verification.exact.codes) == (15, 2 * (12288 + 18432) + 20480)
    assert [(a.role, a.depth, a.fingerprint) for a in verification.history] == [
        ("int4", 1, manifest.inputs["int4"]["fingerprint"])
    ]
    assert ("codes and scales as in the checkpoint", "81,920 codes in 15 tensors: all") in summary(verification)
    require_verified(verification, bundle)


@pytest.mark.parametrize("damage", ["byte", "short", "gone"])
def test_damage_to_any_file_is_found(copied: Folders, damage: str) -> None:
    bundle, _ = copied
    for path in [p for p in bundle.iterdir() if p.name != "manifest.json"]:
        whole = path.read_bytes()
        if damage == "gone":
            path.unlink()
        elif damage == "short":
            path.write_bytes(whole[:-1])
        else:
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        verification = verify_bundle(bundle)
        found = [(fault.file, fault.problem) for fault in verification.faults]
        assert found == [(path.name, {"byte": "sha256", "short": "size", "gone": "missing"}[damage])]
        with pytest.raises(CheckFailedError, match=path.name):
            require_verified(verification, bundle)
        path.write_bytes(whole)
    assert verify_bundle(bundle).ok


def test_one_code_of_the_checkpoint_is_found(copied: Folders) -> None:
    bundle, int4 = copied

    def flip(words: torch.Tensor) -> None:
        words[3, 2] ^= 1 << 4

    changed(int4, f"{FIRST}.weight_packed", flip)
    verification = verify_bundle(bundle, int4)
    assert verification.exact is not None
    assert verification.exact.differing == (FIRST,)
    assert verification.exact.first == "1 of 4,096 codes"
    with pytest.raises(CheckFailedError, match=rf"1 tensors differ, the first is '{FIRST}': 1 of 4,096 codes"):
        require_verified(verification, bundle)


def test_a_scale_is_found_and_the_first_tensor_in_the_models_order_is_named(copied: Folders) -> None:
    bundle, int4 = copied
    for name in ("model.layers.1.mlp.down_proj", FIRST):
        changed(int4, f"{name}.weight_scale", lambda scales: scales[:2].mul_(2))
    verification = verify_bundle(bundle, int4)
    assert verification.exact is not None
    assert verification.exact.differing == (FIRST, "model.layers.1.mlp.down_proj")
    assert verification.exact.first == "4 of 128 scales"


def test_a_changed_code_in_an_onnx_file_is_named(copied: Folders) -> None:
    bundle, int4 = copied
    if read_manifest(bundle).kind != "onnx":
        pytest.skip("a .pte's own hashes find this before codes are compared")
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    codes = next(i for i in graph.initializer if i.name == f"{FIRST}.codes")
    offset = next(int(e.value) for e in codes.external_data if e.key == "offset")
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[offset + 40] ^= 0x30
    (bundle / "model.onnx.data").write_bytes(data)
    with pytest.raises(
        CheckFailedError, match=rf"the first is '{FIRST}': 1 of 4,096 codes\n.*model.onnx.data': sha256"
    ):
        require_verified(verify_bundle(bundle, int4), bundle)


def test_another_models_checkpoint_is_found(
    made: Folders, tiny_model: Callable[..., Path], int4_folder: Callable[..., Path]
) -> None:
    verification = verify_bundle(made[0], int4_folder(tiny_model("llama", num_hidden_layers=3), embedding=True))
    assert verification.same_checkpoint is False
    assert verification.exact is not None
    assert "model.layers.2.mlp.down_proj" in verification.exact.differing


def test_files_that_nothing_vouches_for_are_told(copied: Folders) -> None:
    bundle, _ = copied
    (bundle / "extra").mkdir()
    (bundle / "extra" / "notes.txt").write_text("mine")
    verification = verify_bundle(bundle)
    assert verification.ok
    assert verification.unlisted == ("extra/notes.txt",)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("../outside", {"sha256": "0" * 64, "bytes": 1}),
        ("/etc/hostname", {"sha256": "0" * 64, "bytes": 1}),
        ("tokenizer.json", {"sha256": "xyz", "bytes": 1}),
        ("tokenizer.json", {"sha256": None}),
    ],
)
def test_a_manifest_that_points_elsewhere_or_nowhere_is_refused(copied: Folders, name: str, entry: Any) -> None:
    path = copied[0] / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {name: entry}}))
    with pytest.raises(BadFileError, match="a form that is not known"):
        verify_bundle(copied[0])


def test_history_goes_back_as_far_as_it_was_recorded(copied: Folders) -> None:
    path = copied[0] / "manifest.json"
    teacher = {"path": "t", "fingerprint": "aa"}
    student = {"path": "s", "fingerprint": "bb", "manifest": {"kind": "student", "inputs": {"teacher": teacher}}}
    int4 = {"path": "q", "fingerprint": "cc", "manifest": {"kind": "int4", "inputs": {"student": student, "odd": 3}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": {"int4": int4}}))
    history = verify_bundle(copied[0]).history
    assert [(a.role, a.kind, a.path, a.depth) for a in history] == [
        ("int4", "int4", "q", 1), ("student", "student", "s", 2), ("teacher", "", "t", 3), ("odd", "", "", 2),
    ]  # fmt: skip


def test_against_is_for_bundles_and_int4_folders(made: Folders, stories: Path, tmp_path: Path) -> None:
    bundle, int4 = made
    with pytest.raises(BadFileError, match=r"no config\.json"):
        verify_bundle(bundle, tmp_path)
    with pytest.raises(BadFileError, match="not an int4 folder"):
        verify_bundle(bundle, stories)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"schema_version": 1, "kind": "int4", "files": {}}))
    with pytest.raises(RequestError, match="Only a bundle"):
        verify_bundle(tmp_path, int4)


def test_hashing_needs_no_torch(made: Folders) -> None:
    script = f"""
import sys
from pathlib import Path
from export.verify import verify_bundle
assert verify_bundle(Path({str(made[0])!r})).ok
heavy = {{'torch', 'onnx', 'onnxruntime', 'executorch', 'transformers'}}
print(sorted(heavy & {{m.split('.')[0] for m in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command(copied: Folders, nanokit: Callable[..., Any]) -> None:
    bundle, int4 = copied
    good = nanokit("verify", bundle, "--against", int4, "--json")
    assert good.status == 0
    assert good.json() == {
        "folder": str(bundle),
        "ok": True,
        **json.loads(json.dumps(asdict(verify_bundle(bundle, int4)))),
    }
    (bundle / "tokenizer.json").write_text("{}")
    bad = nanokit("verify", bundle, "--json")
    assert bad.status == 1
    assert bad.json()["faults"][0]["file"] == "tokenizer.json"
    assert "'tokenizer.json': 2 bytes" in bad.stderr
