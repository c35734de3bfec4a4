"""The built wheel works alone, with the source out of reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nano.tasks.file import packaged_names

REPO = Path(__file__).resolve().parent.parent
ROOMS = ("nano", "distill", "quantize", "export", "device_profiles")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the source, so that no build folder is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        place = REPO / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(place, source / name, ignore=ignored) if place.is_dir() else shutil.copy(place, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_all_rooms_and_the_shipped_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(entry.compress_size for entry in archive.infolist())
    for wanted in (*(f"{room}/__init__.py" for room in ROOMS), *(f"{room}/py.typed" for room in ROOMS)):
        assert wanted in names
    assert {"nano/demo/recipe.toml", "nano/demo/teacher/model.safetensors", "device_profiles/low-end.toml"} <= set(
        names
    )
    assert {path.relative_to(REPO).as_posix() for room in ROOMS for path in (REPO / room).rglob("*.py")} <= set(names)
    assert {f"nano/tasks/{name}.toml" for name in packaged_names()} <= set(names)
    assert size < 10 << 20
    assert not [name for name in names if name.startswith("tests/")]


def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import nano, nano.cli, sys; print(nano.__file__); sys.exit(nano.cli.run(['plan', '--student', 'nano-1']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "site", env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "site" / "nano" / "__init__.py")
    assert "1,80" in done.stdout
