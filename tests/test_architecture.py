"""The house stands as drawn: one-way imports, lazy doors, sizes of files and functions, public docstrings."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from nano.cli import COMMANDS

REPO = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "nano": set(),
    "device_profiles": {"nano"},
    "quantize": {"nano", "device_profiles"},
    "distill": {"nano", "device_profiles", "quantize"},
    "export": {"nano", "device_profiles", "quantize"},
}
ROOMS = tuple(MAY_IMPORT)
FILES = sorted(p for room in ROOMS for p in (REPO / room).rglob("*.py"))
TOOLS = sorted(p for folder in ("benchmarks", "examples") for p in (REPO / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 60


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_a_room_imports_only_what_stands_to_its_left(path: Path) -> None:
    room = path.relative_to(REPO).parts[0]
    forbidden = (imports(path) & set(ROOMS)) - MAY_IMPORT[room] - {room}
    assert not forbidden, f"{path.relative_to(REPO)} imports {sorted(forbidden)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES
    assert len(path.relative_to(REPO).parts) <= 3, "folders are at most two deep"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            docstring = ast.get_docstring(node)
            lines -= docstring.count("\n") + 1 if docstring else 0
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_modules_and_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


UNPICKLERS = {
    "torch.load", "torch.jit.load", "torch.package.PackageImporter", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle", "pd.read_pickle",
}  # fmt: skip
SHARDED_STATE = "distill/sharded_state.py"
"""The one exception: torch.distributed.checkpoint's own index is a pickle. A run reads its own state alone."""


@pytest.mark.parametrize("path", [*FILES, *TOOLS], ids=lambda p: p.relative_to(REPO).as_posix())
def test_nothing_is_unpickled(path: Path) -> None:
    """No call and no import that turns a file into code, and nothing that switches a library's own guard off."""
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {ast.unparse(node.func) for node in calls} & UNPICKLERS
    switched = {(word.arg, ast.unparse(word.value)) for node in calls for word in node.keywords}
    assert not switched & {("allow_pickle", "True"), ("weights_only", "False"), ("trust_remote_code", "True")}
    assert not imports(path) & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    if path.relative_to(REPO).as_posix() != SHARDED_STATE:
        assert "FileSystemReader" not in path.read_text()


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are in memory after running `code` in a fresh interpreter."""
    script = f"{code}\nimport sys; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import nano",
        "import nano.cli; nano.cli.run(['--help'])",
        "import nano.cli; nano.cli.run(['--version'])",
        *(f"import nano.cli; nano.cli.run(['{command}', '--help'])" for command in COMMANDS),
        "import nano.cli; nano.cli.run(['plan', '--student', 'nano-1'])",
        "import export.store.push, export.store.pull, export.store.check, export.store.catalog, export.store.manage",
    ],
)
def test_help_and_plan_load_no_torch(code: str) -> None:
    assert not loaded_by(code) & {"torch", "transformers", "onnxruntime", "executorch", "safetensors"}


def test_a_users_file_that_hides_a_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "export.py").write_text("print('mine')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import nano"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert str(tmp_path / "export.py") in done.stderr
    assert "Rename that file" in done.stderr
