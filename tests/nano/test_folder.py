"""Output folders are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nano.errors import NoSpaceError, OutputExistsError, RequestError
from nano.folder import check_output, human_bytes, require_space, staged_folder


def test_a_folder_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    with pytest.raises(ZeroDivisionError), staged_folder(out, force=True) as folder:
        (folder / "new").write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "old").read_text() == "precious"


def test_force_replaces_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with staged_folder(out, force=True) as folder:
        (folder / "new").write_text("y")
        assert (out / "old").exists()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_existing_output_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="--force"):
        check_output(tmp_path, force=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="should be a folder"):
        check_output(tmp_path / "file", force=True)
    with pytest.raises(RequestError, match=r"a file at .*file\n"):
        check_output(tmp_path / "file" / "below" / "it", force=True)


def test_an_output_never_replaces_what_it_is_made_from(tmp_path: Path) -> None:
    student = tmp_path / "models" / "student"
    student.mkdir(parents=True)
    for out in (student, tmp_path / "models"):
        with pytest.raises(RequestError, match="replace what it is made from"):
            check_output(out, force=True, made_from=[student])
    check_output(student / "int4", force=True, made_from=[student])
    with pytest.raises(OutputExistsError):
        check_output(tmp_path, force=False, made_from=[tmp_path.parent / "elsewhere"])


def test_the_folder_one_stands_in_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    for out in (inside, tmp_path):
        with pytest.raises(RequestError, match="stand in"):
            check_output(out, force=True)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(NoSpaceError, match="disk is full"), staged_folder(tmp_path / "out") as folder:
        (folder / "part").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_before_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(NoSpaceError, match="not enough space"):
        require_space(tmp_path, 1 << 60)


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from nano.folder import staged_folder\n"
        f"with staged_folder(Path({str(tmp_path / 'out')!r})) as f:\n"
        "    (f / 'part').write_text('x'); print('ready', flush=True); time.sleep(30)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGINT)
    start = time.monotonic()
    process.wait(timeout=10)
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 20, "1.0 MiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5120.0 GiB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_a_link_as_output_leads_to_the_folder_that_is_made(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/model")
    for content in ("1", "2", "3"):  # the first time the link leads nowhere
        with staged_folder(tmp_path / "out", force=True) as folder:
            (folder / "a").write_text(content)
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "model" / "a").read_text() == content
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "disk", "model", "out"]


def test_two_writers_of_one_output_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_folder(out) as folder:
        (folder / "a").write_text("first")
        with pytest.raises(RequestError, match="Another run"), staged_folder(out):
            pass
        assert (folder / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    left = tmp_path / "next.partial" / "deep"  # of a run that was killed
    left.mkdir(parents=True)
    (left / "half").write_text("x")
    with staged_folder(tmp_path / "next") as folder:
        assert not list(folder.iterdir())


def test_outputs_that_cannot_be_replaced_are_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(RequestError, match="mount point"):
        check_output(tmp_path, force=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="~"):
        check_output(Path("~/out"), force=False)
    (tmp_path / "~").mkdir()
    check_output(Path("~/out"), force=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_run_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), number)
            time.sleep(5)
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with staged_folder(tmp_path / "out"):
            os.kill(os.getpid(), number)
        assert (tmp_path / "out").is_dir()
    finally:
        signal.signal(number, before)
