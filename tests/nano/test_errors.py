"""Messages say what was wrong, what was found, what was expected, what to do; extras name their pip line."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nano import errors
from nano.errors import BadFileError, MissingExtraError, NanokitError, require_module


def test_a_message_has_its_four_parts() -> None:
    error = BadFileError("It broke.", found="a crack", expected="none", todo="glue it")
    assert str(error).splitlines() == ["It broke.", "  found:    a crack", "  expected: none", "  to do:    glue it"]


def test_exit_statuses_are_as_documented() -> None:
    statuses = {
        kind.__name__: kind.exit_status
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, NanokitError)
    }
    assert statuses == {
        "NanokitError": 3,
        "CheckFailedError": 1,
        "RequestError": 2,
        "BadFileError": 2,
        "UnsupportedError": 2,
        "OutputExistsError": 2,
        "NotFoundError": 2,
        "MissingExtraError": 2,
        "WorkError": 3,
        "NoSpaceError": 3,
        "BrokenTransferError": 3,
        "PeerLostError": 3,
    }


def test_a_missing_extra_names_the_exact_pip_line() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'nanokit\[onnx\]'"):
        require_module("no_such_package_here", "onnx")
    assert require_module("json", "onnx").__name__ == "json"


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnx_ir"), ("executorch", "executorch")])
def test_export_without_its_extra(tmp_path: Path, stories: Path, tinystories: Path, format: str, package: str) -> None:
    """The real commands in an interpreter that cannot find the package."""
    code = textwrap.dedent(f"""
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ({package!r}, "onnxruntime"):
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Absent())
        from nano.cli import run
        int4 = {str(tmp_path / "int4")!r}
        assert run(["quantize", {str(stories)!r}, "--method", "rtn", "--out", int4]) == 0
        sys.exit(run(["export", int4, "--format", {format!r}, "--out", {str(tmp_path / "bundle")!r}]))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"pip install 'nanokit[{format}]'" in done.stderr
    assert not (tmp_path / "bundle").exists()
