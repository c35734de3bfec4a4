"""A bundle to move about, a layout folder, a real registry, and a proxy that breaks what goes to it."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from export.store.artifact import Artifact, describe_bundle
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from nano.manifest import Manifest, write_manifest

REPO = Path(__file__).resolve().parents[3]
BENCHMARKS = REPO / "benchmarks"
SHAPE = {
    "family": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_layers": 2,
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "tied": True, "max_positions": 512,
    "layer_types": ["full_attention"] * 2, "sliding_window": None,
}  # fmt: skip
WEIGHTS = 3_000_000
"""Bytes of the bundle's model file: several pieces, quickly moved."""


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


server, proxying = _tool("registry_server"), _tool("faulty_proxy")
Fault = proxying.Fault


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's store, login or waits as long as a user should."""
    monkeypatch.setenv("NANOKIT_STORE", str(tmp_path / "default-store"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


def make_bundle(folder: Path, *, seed: int = 0, size: int = WEIGHTS, **fields: Any) -> Path:
    """A bundle of random bytes with a manifest as nanokit export writes it."""
    folder.mkdir(parents=True)
    (folder / "model.pte").write_bytes(random.Random(seed).randbytes(size))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer_config.json").write_text("{}")
    given = {
        "kind": "executorch",
        "inputs": {"int4": {"path": "out/int4", "fingerprint": "5" * 64, "manifest": {
            "kind": "int4", "recipe": {"method": "best"},
            "inputs": {"student": {"path": "out/nano-2", "fingerprint": "7" * 64}}}}},
        "footprint": {"context": 2048}, "shape": SHAPE, "created": "2026-11-22T10:00:00+00:00",
        "versions": {"executorch": "1.4.1", "onnxruntime": "1.32.0"}, "command": ("nanokit", "export"),
    }  # fmt: skip
    write_manifest(folder, Manifest(**{**given, **fields}))
    return folder


def measured(profile: str, fits: bool, context: int = 2048, speed: float = 20.0, **more: Any) -> dict[str, Any]:
    """What `nanokit check --measure` leaves in a manifest's results, as far as a store reads it."""
    phases = [{"name": "load", "units_per_second": 1.0}, {"name": "decode", "units_per_second": speed}]
    found = {"fits": fits, "died": None if fits else "prefill", "peak_dirty": 700 << 20, "phases": phases, **more}
    return {f"{profile}@{context}": {"fits": fits, "measured": found}}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def stored(bundle: Path, tmp_path: Path) -> Reference:
    """The bundle in a layout folder, as team/nano-2:1.0."""
    return push_bundle(bundle, parse_reference(f"oci:{tmp_path / 'store'}:team/nano-2:1.0")).reference.at("1.0")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a real registry without login."""
    try:
        with server.serving(tmp_path_factory.mktemp("registry")) as host:
            yield host
    except server.NoRegistryError as error:
        pytest.skip(str(error))


@pytest.fixture
def proxy(registry: str) -> Iterator[Any]:
    """The proxy in front of the registry; faults are put into `proxy.faults`."""
    with proxying.faulty(registry) as running:
        yield running


@pytest.fixture
def repository(registry: str, request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return "test/" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-").replace("--", "-")


@pytest.fixture
def weights(bundle: Path) -> str:
    """The digest of the bundle's model file: what a fault has to hit."""
    artifact, _ = describe_bundle(bundle)
    return blob_of(artifact, "model.pte")


def blob_of(artifact: Artifact, path: str) -> str:
    """The digest of one file."""
    return next(file.blob.digest for file in artifact.files if file.path == path)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same names and bytes."""
    found = [{p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (one, other)]
    return found[0] == found[1]


@pytest.fixture
def program() -> Callable[[str], str]:
    """The path of a program that is not ours; the test is skipped where it is missing."""

    def find(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed")
        return found

    return find


def run(*command: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command's status and output."""
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=120, cwd=cwd,
        env={**os.environ, **environment},
    )  # fmt: skip


@contextlib.contextmanager
def running(handler: Any) -> Iterator[str]:
    """A server in a thread; gives HOST:PORT."""
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=instance.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"127.0.0.1:{instance.server_port}"
    finally:
        instance.shutdown()
        instance.server_close()
