"""The measurement: a real bundle in a real runtime, alive under a roomy limit and killed under a tight one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from device_profiles.caps import Cap, _parents, open_cap
from device_profiles.check import bundle_facts
from device_profiles.footprint import BundleFacts
from device_profiles.measure import Measurement, Phase, measure_bundle
from device_profiles.worker import DROPPED_ALWAYS, PREPARED, memory, status
from nano.errors import RequestError, WorkError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
ROOMY = 4_000_000_000
EATER = "import sys; sys.stdin.readline(); x = b'x' * int(sys.argv[1]); print(len(x))"


def test_a_process_that_takes_too_much_is_killed() -> None:
    """The same program under the same cap, once with less than its memory and once with more."""
    with open_cap() as cap:
        if cap.group is None:
            pytest.skip("this machine gives no control group")
        assert cap.kind in ("cgroup v1", "cgroup v2")
        ends = []
        for size in (20_000_000, 400_000_000):
            child = subprocess.Popen([sys.executable, "-c", EATER, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: E501  # fmt: skip
            cap.hold(child.pid)
            cap.limit(100_000_000)
            child.communicate(b"\n")
            ends.append((child.returncode, cap.killed()))
        group = cap.group
    assert ends == [(0, False), (-9, True)]
    assert not group.exists(), "the group is gone afterwards"


def test_without_groups_the_kind_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cap(allow_groups=False) as cap:
        assert cap == Cap("rlimit")
        cap.hold(os.getpid())
        cap.limit(1)
        assert not cap.killed()
        assert cap.anonymous() == 0
    monkeypatch.setattr("device_profiles.caps._parents", list)
    with open_cap() as cap:
        assert cap.kind == "rlimit"


def test_the_group_is_made_below_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """v2 first; in v2 every group above one's own is a candidate, in v1 only one's own."""
    (tmp_path / "v2" / "user" / "me").mkdir(parents=True)
    (tmp_path / "v2" / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "v1" / "own").mkdir(parents=True)
    texts = {
        "/proc/self/mounts": f"cg {tmp_path}/v1 cgroup rw,memory 0 0\ncg {tmp_path}/v2 cgroup2 rw 0 0\n",
        "/proc/self/cgroup": "4:memory:/own\n0::/user/me\n",
    }
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: texts.get(str(path)) or read(path, *a, **k))
    v2 = tmp_path / "v2"
    assert _parents() == [
        ("cgroup v2", v2 / "user" / "me"), ("cgroup v2", v2 / "user"), ("cgroup v2", v2),
        ("cgroup v1", tmp_path / "v1" / "own"),
    ]  # fmt: skip


def test_what_the_kernel_counts_is_consistent() -> None:
    rollup, cheap = memory(), status()
    assert rollup["rss"] == rollup["clean"] + rollup["dirty"]
    assert rollup["pss"] <= rollup["rss"]
    assert abs(rollup["anonymous"] - cheap["RssAnon"]) < 4_000_000


def test_nothing_is_imported_after_the_limit_is_set(small_bundle: Path) -> None:
    """Else Python's own memory would be taken for the bundle's."""
    code = (
        "import importlib, sys; from pathlib import Path; from device_profiles.worker import PREPARED; import nano.lm\n"
        "for door in PREPARED['onnx']: importlib.import_module(door.partition(':')[0])\n"
        "before = set(sys.modules); nano.lm.open_model(Path(sys.argv[1])).prefill([3])\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(small_bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_is_prepared_can_be_imported() -> None:
    """The doors are strings, which no other check reads."""
    for doors in PREPARED.values():
        for door in doors:
            module, _, function = door.partition(":")
            found = pytest.importorskip(module)
            assert not function or callable(getattr(found, function))


@pytest.fixture(scope="module")
def lived(small_bundle: Path) -> Measurement:
    facts = bundle_facts(small_bundle)
    return measure_bundle(small_bundle, facts, resident=ROOMY, dirty=ROOMY, decode=4)


def test_a_bundle_lives_under_a_roomy_limit(lived: Measurement, small_bundle: Path) -> None:
    facts = bundle_facts(small_bundle)
    assert lived.fits
    assert lived.killer == ""
    names = [phase.name for phase in lived.phases]
    assert names[:4] == ["load", "first chunk", "prefill", "decode"]
    assert names[-1] == DROPPED_ALWAYS
    prefill = lived.phase("prefill")
    assert prefill is not None
    assert prefill.units == lived.prefilled == facts.context - 4 - 2
    assert facts.kv_cache_bytes < lived.peak_dirty < 60_000_000
    assert lived.samples["rss"] >= lived.base
    assert json.loads(json.dumps(lived.as_dict()))["fits"] is True


def test_dropped_pages_are_read_again(lived: Measurement) -> None:
    dropped, warm = lived.phase(DROPPED_ALWAYS), lived.phase("decode")
    assert dropped is not None
    assert warm is not None
    if lived.phases[0].bytes_read == 0:
        pytest.skip("the file system of the temporary folder keeps its pages")
    assert dropped.bytes_read > 0
    assert warm.bytes_read == 0
    assert dropped.seconds is not None
    assert warm.per_second > dropped.per_second


def test_a_shorter_prompt_still_takes_the_caches_memory(small_bundle: Path, lived: Measurement) -> None:
    short = measure_bundle(small_bundle, bundle_facts(small_bundle), resident=ROOMY, dirty=None, tokens=16, decode=4)
    assert short.prefilled == 16
    assert short.phase("unused cache") is not None
    assert abs(short.peak_dirty - lived.peak_dirty) < 3_000_000


def test_the_watcher_kills_what_writes_too_much(small_bundle: Path, lived: Measurement) -> None:
    tight = lived.peak_dirty // 2
    measured = measure_bundle(small_bundle, bundle_facts(small_bundle), resident=ROOMY, dirty=tight, decode=4)
    assert not measured.fits
    assert measured.died in ("load", "first chunk", "prefill", "decode")
    assert "watcher" in measured.killer
    assert measured.phases[-1].seconds is None
    assert measured.peak_dirty > tight


def test_without_a_group_the_kernel_refuses_memory(small_bundle: Path, lived: Measurement) -> None:
    tight = lived.peak_dirty // 4
    measured = measure_bundle(small_bundle, bundle_facts(small_bundle), resident=tight, dirty=None, decode=4, allow_groups=False)  # noqa: E501  # fmt: skip
    assert measured.cap == "rlimit"
    assert not measured.fits
    assert "RLIMIT_DATA" in measured.killer


def test_time_that_is_over_is_no_verdict(small_bundle: Path) -> None:
    with pytest.raises(WorkError, match="took too long") as raised:
        measure_bundle(small_bundle, bundle_facts(small_bundle), resident=ROOMY, dirty=None, timeout=0)
    assert "--measure-tokens" in str(raised.value)


def test_a_bundle_that_fails_otherwise_is_no_verdict(small_bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_bundle, broken)
    facts = bundle_facts(broken)
    (broken / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(WorkError, match="not for want of memory"):
        measure_bundle(broken, facts, resident=ROOMY, dirty=None)


@pytest.mark.parametrize("tokens", [0, -1, 300])
def test_more_tokens_than_the_context_are_refused(tokens: int, small_bundle: Path) -> None:
    with pytest.raises(RequestError, match="cannot hold the measurement"):
        measure_bundle(small_bundle, bundle_facts(small_bundle), resident=ROOMY, dirty=None, tokens=tokens)


def _measured(bytes_read: int, units: int, facts: BundleFacts) -> Measurement:
    phase = Phase("decode", units, 1.0, {}, 10, bytes_read)
    return Measurement("cgroup v2", 1, 1, 0, 8, 8, (phase,), None, "", {}, facts.mapped_bytes)


def test_reading_a_first_time_is_no_paging_but_again_is(small_bundle: Path) -> None:
    facts = bundle_facts(small_bundle)
    assert _measured(facts.mapped_bytes, 16, facts).fits
    paging = _measured(facts.mapped_bytes * 3, 16, facts)
    assert paging.pages
    assert not paging.fits


def test_check_measures_records_and_reports(nanokit: Callable[..., Any], small_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    before = json.loads((bundle / "manifest.json").read_text())
    junit, picture = tmp_path / "junit.xml", tmp_path / "memory.png"
    done = nanokit("check", bundle, "--profile", "low-end", "--measure", "--measure-tokens", 32, "--junit", junit, "--picture", picture)  # noqa: E501  # fmt: skip
    assert done.status == 0, done.stderr
    assert "Measured under" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert ElementTree.parse(junit).getroot().get("failures") == "0"
    assert picture.read_bytes().startswith(b"\x89PNG")
    after = json.loads((bundle / "manifest.json").read_text())
    evidence = after["results"].pop("checks")["low-end@256"]
    assert evidence["fits"] is True
    assert evidence["measured"]["peak_dirty"] > 0
    assert after == before, "nothing else of the manifest has changed"
    again = nanokit("check", bundle, "--profile", "low-end", "--json")
    assert again.status == 0
    assert "measured" not in again.json()


def test_check_says_no_after_a_kill(nanokit: Callable[..., Any], small_bundle: Path, lived: Measurement, tmp_path: Path) -> None:  # noqa: E501  # fmt: skip
    phone = tmp_path / "phone.toml"
    fact = 'unit = "kB"\nsource = "a test"\ndate = 2026-01-01\n'
    # An eighth of what it took: below the forecast too, whose error for a bundle this small is large.
    phone.write_text(f"[app_dirty_memory]\nvalue = {lived.peak_dirty // 8000}\n{fact}")
    junit = tmp_path / "junit.xml"
    failed = nanokit("check", small_bundle, "--profile", phone, "--measure", "--no-record", "--junit", junit)
    assert failed.status == 1
    assert "It was killed on phone" in failed.stderr
    assert "too much" in failed.stderr
    assert "forecast" in failed.stderr
    assert "Traceback" not in failed.stderr
    failure = ElementTree.parse(junit).getroot().find(".//failure")
    assert failure is not None
    assert "killed" in (failure.get("message") or "")


def test_options_that_do_not_go_together(nanokit: Callable[..., Any], small_bundle: Path, tmp_path: Path) -> None:
    for arguments, says in (
        (("--measure-tokens", "5"), "is for --measure"),
        (("--junit", tmp_path / "no" / "x.xml"), "cannot be written"),
        (("--picture", tmp_path), "cannot be written"),
    ):
        refused = nanokit("check", small_bundle, "--profile", "low-end", *arguments)
        assert refused.status == 2
        assert says in refused.stderr
