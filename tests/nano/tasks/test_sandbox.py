"""Generated code: what passes, and what cannot do harm."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nano.tasks.sandbox import CHILD, SandboxLimits, code_of, passes, run_python

SHORT = SandboxLimits(seconds=1, wall_seconds=10.0)
ADD = "def add(a, b):\n    return a + b\n"


def test_right_and_wrong_code() -> None:
    assert run_python(ADD, ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"]).passed
    wrong = run_python(ADD, ["assert add(1, 2) == 4"])
    assert (wrong.passed, wrong.reason) == (False, "AssertionError: ")
    assert run_python("def add(a, b)\n", ["add(1, 2)"]).reason.startswith("SyntaxError")
    assert run_python("import numpy", []).reason.startswith("ModuleNotFoundError")
    assert run_python("import math, re, heapq\nprint(math.pi)", ["assert re.match('a', 'ab')"]).passed
    assert passes(f"Sure:\n```python\n{ADD}```\nThat adds.", ["assert add(2, 2) == 4"])
    assert code_of("```\nx = 1\n") == "x = 1\n"


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "import os; os.abort()",
     "def __eq__(a, b): return True\nassert = 1"],
)  # fmt: skip
def test_leaving_early_is_not_passing(code: str) -> None:
    assert not run_python(code, ["assert False"], SHORT).passed


def test_an_endless_loop_ends() -> None:
    start = time.monotonic()
    ran = run_python("while True: pass", [], SHORT)
    assert not ran.passed
    assert ran.reason in ("out of time", "killed by SIGXCPU", "killed by SIGKILL")
    assert time.monotonic() - start < 20
    asleep = run_python("import time\ntime.sleep(60)", [], SandboxLimits(wall_seconds=2.0))
    assert asleep.reason == "out of time"


def test_a_memory_bomb_fails() -> None:
    assert run_python("x = [0] * 10**9", [], SHORT).reason.startswith("MemoryError")
    assert not run_python("x = []\nwhile True: x.append('a' * 10**7)", [], SHORT).passed


def test_processes_cannot_be_started() -> None:
    for code in ("while True: os.fork()", "os.system('true')", "os.posix_spawn('/bin/true', ['true'], {})"):
        assert "not allowed" in run_python(f"import os\n{code}", [], SHORT).reason
    assert not run_python("import subprocess\nsubprocess.run(['true'])", [], SHORT).passed


def test_the_kernel_refuses_processes_too() -> None:
    """The limits without Python's hooks, as code would find them that had got around those."""
    script = (
        "import os, sys; space = {'__name__': 'child'}; exec(open(sys.orig_argv[-1]).read(), space);"
        "space['limit']({'seconds': 5, 'memory_bytes': 1 << 29, 'file_bytes': 1, 'open_files': 9}); os.fork()"
    )
    done = subprocess.run([sys.executable, "-c", script, str(CHILD)], capture_output=True, text=True, check=False)
    assert "BlockingIOError" in done.stderr


def test_files_outside_cannot_be_touched(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("here")
    kept.chmod(0o666)
    tmp_path.chmod(0o777)
    for code in (f"open({str(kept)!r}, 'w')", f"open({str(kept)!r})", f"import os; os.remove({str(kept)!r})",
                 f"import os; os.rename({str(kept)!r}, 'mine')", f"import os; os.listdir({str(tmp_path)!r})",
                 f"import os; os.symlink({str(kept)!r}, 'link')", f"import os; os.truncate({str(kept)!r}, 0)",
                 f"import os; os.mkdir({str(tmp_path / 'x')!r})", "open('/etc/passwd')"):  # fmt: skip
        assert "not allowed" in run_python(code, [], SHORT).reason, code
    assert kept.read_text() == "here"
    assert run_python("open('mine', 'w').write('x')", ["assert open('mine').read() == 'x'"]).passed
    big = run_python("open('mine', 'w').write('x' * 10**7)", [], SHORT)
    assert not big.passed


def test_there_is_no_network_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert not run_python(code, [], SHORT).passed
    assert run_python(
        "import os", ["assert 'SECRET_TOKEN' not in os.environ", "assert 'PATH' not in os.environ"]
    ).passed


def test_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_python("open('a', 'w').write('x')\nwhile True: pass", [], SHORT)
    assert list(tmp_path.iterdir()) == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    mine = [line for line in running.splitlines() if "sandbox_child" in line and str(os.getpid()) in line]
    assert mine == []


def test_real_solutions_pass(eval_data: Path) -> None:
    """MBPP's own solutions, every 40th."""
    rows = [json.loads(line) for line in (eval_data / "mbpp.jsonl").open(encoding="utf-8")][::40]
    ran = {row["task_id"]: run_python(row["code"], [row["test_setup_code"], *row["test_list"]]) for row in rows}
    assert {number: one.reason for number, one in ran.items() if not one.passed} == {}
