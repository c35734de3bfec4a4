"""The catalogue in headless Chromium: shown, searched, filtered, sorted; and strangers' text is text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import look

from export.store.catalog import catalog_page, gather, write_catalog
from export.store.push import push_bundle
from export.store.reference import Reference, parse_reference
from nano.errors import NanokitError, OutputExistsError

from .conftest import make_bundle, measured

EVIL = '"><script>document.title="hacked"</script><img src=x onerror=alert(1)>'


@pytest.fixture
def store(tmp_path: Path) -> Path:
    scores = {"scorecard": {"capabilities": {"factuality": 0.9, "coding": 0.5}}}
    made: list[tuple[str, dict[str, Any]]] = [
        ("nano-2:1.0-pte", {"created": "2026-03-01T00:00:00+00:00",
                            "results": {"checks": {**measured("pixel-8", True), **measured("low-end", False)},
                                        **scores}}),
        ("nano-2:1.0-onnx", {"kind": "onnx", "created": "2026-02-01T00:00:00+00:00",
                             "results": {"checks": measured("pixel-8", True, speed=8.5)}}),
        ("nano-1:1.0-pte", {"created": "2026-01-01T00:00:00+00:00", "results": {"checks": measured("low-end", True)}}),
        ("evil:1", {"created": "2025-01-01T00:00:00+00:00", "results": {"checks": measured(EVIL, True)},
                    "inputs": {"int4": {"path": EVIL}}}),
    ]  # fmt: skip
    for number, (name, fields) in enumerate(made):
        bundle = make_bundle(tmp_path / f"b{number}", seed=number, size=1_000 * (4 - number), **fields)
        push_bundle(bundle, parse_reference(f"oci:{tmp_path / 'store'}:{name}"))
    return tmp_path / "store"


@pytest.fixture
def dom(tmp_path: Path) -> Callable[..., str]:
    """The page as Chromium has it after its script ran, and after one of the test's."""

    def opened(page: Path, state: str = "", script: str = "", width: int = 1280) -> str:
        return look(page, tmp_path, state=state, script=script, width=width).dom

    return opened


def shown(dom: str) -> list[str]:
    """References of the cards that are visible, in their order."""
    return [
        found[1] for found in re.findall(r'<li class="card"([^>]*)><h2>([^<]*)</h2>', dom) if " hidden" not in found[0]
    ]


def test_everything_is_there_newest_first(store: Path, tmp_path: Path, dom: Callable[..., str]) -> None:
    assert write_catalog(str(store), tmp_path / "site", title="Ours & theirs") == 4
    page = dom(tmp_path / "site" / "index.html")
    assert "<h1>Ours &amp; theirs</h1>" in page
    assert shown(page) == ["nano-2:1.0-pte", "nano-2:1.0-onnx", "nano-1:1.0-pte", "evil:1"]
    assert f"nanokit pull nano-2:1.0-pte --store {store}" in page
    assert "killed in the phase 'prefill', context 2,048, 700.0 MiB written" in page.replace("&#x27;", "'")
    assert "8.5 tokens/s" in page
    assert '<i style="width:90.0%"></i></td><td>90%</td>' in page
    rows = json.loads((tmp_path / "site" / "artifacts.json").read_text())["artifacts"]
    assert rows[0]["verdicts"]["pixel-8"]["passed"] is True


VIEWS = {
    "phone=pixel-8": ["nano-2:1.0-pte", "nano-2:1.0-onnx"],
    "phone=low-end": ["nano-1:1.0-pte"],
    "format=onnx": ["nano-2:1.0-onnx"],
    "phone=low-end&format=onnx": [],
    "q=1.0%20EXECUTORCH": ["nano-2:1.0-pte", "nano-1:1.0-pte"],
    "q=1.0&sort=size": ["nano-1:1.0-pte", "nano-2:1.0-onnx", "nano-2:1.0-pte"],
    "sort=name": ["evil:1", "nano-1:1.0-pte", "nano-2:1.0-onnx", "nano-2:1.0-pte"],
    "sort=score&phone=pixel-8": ["nano-2:1.0-pte", "nano-2:1.0-onnx"],
    "phone=nonsense&sort=nonsense&q=nano-1": ["nano-1:1.0-pte"],
}


def test_a_view_is_an_address(store: Path, tmp_path: Path, dom: Callable[..., str]) -> None:
    write_catalog(str(store), tmp_path / "site")
    script = (
        f"const views = {json.dumps(list(VIEWS))};"
        "(async () => { const seen = []; for (const view of views) { location.hash = view;"
        "await new Promise(done => setTimeout(done, 20));"
        "seen.push([...document.querySelectorAll('.card:not([hidden]) h2')].map(h => h.textContent),"
        "document.getElementById('none').hidden); } document.title = JSON.stringify(seen); })()"
    )
    page = dom(tmp_path / "site" / "index.html", script=script)
    found = re.search(r"<title>(.*)</title>", page)
    assert found is not None
    seen = json.loads(found[1])
    assert dict(zip(VIEWS, seen[::2], strict=True)) == VIEWS
    assert seen[1::2] == [bool(wanted) for wanted in VIEWS.values()]


def test_typing_searches_and_is_kept_in_the_address(store: Path, tmp_path: Path, dom: Callable[..., str]) -> None:
    write_catalog(str(store), tmp_path / "site")
    script = (
        "const q = document.getElementById('q'); q.value = 'onnx';"
        "q.dispatchEvent(new Event('input', {bubbles: true}));"
        "document.title = location.hash + ' ' + document.getElementById('count').textContent;"
    )
    page = dom(tmp_path / "site" / "index.html", script=script)
    assert shown(page) == ["nano-2:1.0-onnx"]
    assert "<title>#q=onnx 1 of 4</title>" in page
    cleared = dom(tmp_path / "site" / "index.html", "q=none", "document.getElementById('clear').click()")
    assert len(shown(cleared)) == 4


def test_text_of_strangers_is_text(store: Path, tmp_path: Path, dom: Callable[..., str]) -> None:
    write_catalog(str(store), tmp_path / "site", title=EVIL)
    page = dom(tmp_path / "site" / "index.html", script="document.body.dataset.images = document.images.length")
    assert "<title>hacked" not in page
    assert 'data-images="0"' in page


@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_sticks_out(store: Path, tmp_path: Path, dom: Callable[..., str], width: int) -> None:
    push_bundle(make_bundle(tmp_path / "long", size=10), parse_reference(f"oci:{store}:a/{'very-' * 20}long-name:1"))
    write_catalog(str(store), tmp_path / "site")
    script = (
        "const seen = [...document.querySelectorAll('.card, .controls, h1')].map(e => e.getBoundingClientRect().right);"
        "document.body.dataset.out = Math.max(...seen, document.documentElement.scrollWidth) > innerWidth"
    )
    assert 'data-out="false"' in dom(tmp_path / "site" / "index.html", script=script, width=width)


def test_a_thousand_artifacts(store: Path, tmp_path: Path, dom: Callable[..., str]) -> None:
    one = gather(str(store))[0]
    from dataclasses import replace

    many = [replace(one, reference=Reference("team/nano", f"1.{n}", folder=store)) for n in range(1_000)]
    (tmp_path / "many.html").write_text(catalog_page(many, "Many"))
    assert shown(dom(tmp_path / "many.html", "q=1.77")) == [
        f"team/nano:1.{n}" for n in range(1_000) if f"1.{n}".startswith("1.77")
    ]


def test_an_empty_store_and_folders_in_the_way(tmp_path: Path, store: Path, nanokit: Callable[..., Any]) -> None:
    assert "Nothing has been pushed" in catalog_page([], "Empty")
    (tmp_path / "site").mkdir()
    with pytest.raises(OutputExistsError):
        write_catalog(str(store), tmp_path / "site")
    with pytest.raises(NanokitError):
        write_catalog(str(store), store, force=True)
    with pytest.raises(NanokitError):
        write_catalog(str(tmp_path / "nowhere"), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    done = nanokit("catalog", store, "--out", tmp_path / "made", "--json")
    assert done.json() == {"out": str(tmp_path / "made"), "artifacts": 4}
