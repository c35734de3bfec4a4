"""nanokit report: numbers as the manifests hold them, strangers' text as text, a page that Chromium shows whole."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import look
from checks import Balanced, some_sentences

from device_profiles.check import check_bundle
from device_profiles.profile import decimal_bytes, profile_names
from nano.errors import BadFileError, NanokitError, OutputExistsError, RequestError
from nano.evaluate import EvaluateOptions, measure_folders
from nano.families import LAYER_LINEARS
from nano.history import history_of, lineage
from nano.lm import open_model
from nano.manifest import Manifest, add_results, fingerprint, input_entry, read_manifest, write_manifest
from nano.report.charts import stacked_bar
from nano.report.facts import gather
from nano.report.measure import measure_divergence
from nano.report.page import report_page
from nano.report.parts import percent, short
from nano.report.run import check_page, default_page, find_teacher, run_report
from nano.shapes import ModelShape

EVIL = '"><script>document.title="hacked"</script><img src=x onerror=alert(1)>\x00\u202e'
SHAPE: dict[str, Any] = {
    "family": "llama", "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 4,
    "num_heads": 16, "num_kv_heads": 4, "head_dim": 128, "tied": True, "max_positions": 8192,
    "layer_types": ["full_attention"] * 4, "sliding_window": None,
}  # fmt: skip
FOOTPRINT = {
    "runtime": "executorch", "file_bytes": 900_000_000, "linear_bytes": 700_000_000, "packed_copy_bytes": 740_000_000,
    "embedding_bytes": 40_000_000, "float_weight_bytes": 2_000_000, "kv_cache_bytes": 67_108_864,
    "logits_bytes": 128_000, "context": 4096, "chunk": 128, "kv_cache_dtype": "float32",
}  # fmt: skip
LINEARS = {f"model.layers.{layer}.{linear}": 0.001 * (n + 1) + 0.0001 * layer for layer in range(4) for n, linear in enumerate(LAYER_LINEARS)}  # noqa: E501  # fmt: skip
FIGURES = {
    "Mean KLD": (0.0123, 0.0004), "Median KLD": (0.00211, None), "90.0% KLD": (0.0301, None),
    "95.0% KLD": (0.0702, None), "99.0% KLD": (0.233, None), "99.9% KLD": (0.814, None), "Maximum KLD": (3.21, None),
    "Mean Δp": (-0.0031, 0.0002), "RMS Δp": (0.0456, 0.001), "1.0% Δp": (-0.171, None), "Same top p": (0.9432, 0.0031),
    "Flips": (0.0211, 0.001), "Mean PPL(Q)/PPL(base)": (1.0123, 0.0011),
}  # fmt: skip


def scorecard(**scores: tuple[float, float]) -> dict[str, Any]:
    found = {
        name: {"score": score, "error": 0.02, "questions": 150, "of_teacher": share}
        for name, (score, share) in scores.items()
    }
    worst = [{"task": "facts", "label": "What does Fay keep? Answer:", "expected": "a yaffle", "said": "a drum"}]
    return {"capabilities": found, "tasks": {}, "data": {}, "flips": {"lost": 7, "gained": 2, "worst": worst}}


def divergence(**more: Any) -> dict[str, Any]:
    flip = {"before": "once\nupon a", "right": " time", "said": "\n", "reference_p": 0.91, "right_p": 0.04, "said_p": 0.5}  # noqa: E501  # fmt: skip
    return {
        "measured": "2026-11-22T10:00:00+00:00", "tokens": 4096, "lost": 61, "gained": 22, "flips": [flip],
        "reference": {"path": "/models/big", "fingerprint": "b" * 64, "kind": "student"},
        "data": {"files": [{"path": "held.jsonl", "sha256": "d" * 64}], "tokens": 4096},
        "figures": {name: {"value": value, "error": error} for name, (value, error) in FIGURES.items()}, **more,
    }  # fmt: skip


def folder_of(folder: Path, kind: str, inputs: dict[str, Path], **fields: Any) -> Path:
    """A stage's output with a few bytes in it."""
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(kind.encode() * 1000)
    (folder / "tokenizer.json").write_text("{}")
    entries = {role: input_entry(source) for role, source in inputs.items()}
    given = {"shape": SHAPE, "command": ("nanokit", kind, "--out", "a b"), "created": "2026-11-22T09:08:07+00:00"}
    write_manifest(folder, Manifest(kind, inputs=entries, **{**given, **fields}))
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A bundle with its whole history beside it: big → nano-9/student → nano-9/int4 → nano-9/executorch."""
    teacher = tmp_path / "big"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    trained = {"files": [{"path": "/text/train.jsonl", "sha256": "a" * 64}], "tokens": 123_456, "seed": 0}
    results = {"parameters": 1_000_000, "teacher_parameters": 4_000_000_000, "scorecard": scorecard(coding=(0.72, 0.9))}
    student = folder_of(tmp_path / "nano-9" / "student", "student", {"teacher": teacher}, data=trained, results=results)
    errors = {"relative_error": LINEARS, "rounding_error": {name: 3 * value for name, value in LINEARS.items()},
              "bits": dict.fromkeys(LINEARS, 4), "bits_per_weight": 4.53}  # fmt: skip
    calibrated = {**trained, "checked": {"warnings": ["the text is < odd"]}}
    int4 = folder_of(
        tmp_path / "nano-9" / "int4", "int4", {"student": student}, results=errors, recipe={"method": "best"},
        data=calibrated,
    )  # fmt: skip
    parity = {"tokens": 2048, **{name: {"top1": 0.9951, "logit_error": 0.0123, "kl": 4.2e-6} for name in ("simulated", "float")}}  # noqa: E501  # fmt: skip
    spread = {"median": 31.4, "least": 30.1, "most": 32.7}
    return folder_of(
        tmp_path / "nano-9" / "executorch", "executorch", {"int4": int4}, footprint=FOOTPRINT,
        versions={"nanokit": "0.1.0", "executorch": "1.4.1"},
        results={"exact": {"modules": 28, "codes": 9_876_543, "differing": []}, "parity": parity,
                 "bench": {"decoding": spread, "runtime": "executorch 1.4.1", "machine": "a machine"},
                 "scorecard": scorecard(coding=(0.6, 0.75), factuality=(0.81, 0.9)), "divergence": divergence()},
    )  # fmt: skip


def words(html: str) -> str:
    """The text of a page as people read it."""
    text = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).replace("\u00a0", " ").split())


def made(folder: Path, **options: Any) -> str:
    return report_page(gather(folder, **options), "today")


def test_the_page_tells_what_the_manifests_hold(chain: Path) -> None:
    html = made(chain)
    said = words(html)
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert all(one.startswith("#") for one in parser.loads)
    assert "nano-9 for ExecuTorch" in said
    for figure, (value, _error) in FIGURES.items():
        share = figure.endswith("p") or figure == "Flips"
        assert (
            percent(value, 2).replace("\u00a0", " ") if share else short(value, 4 if "PPL" in figure else 3)
        ) in said
    parameters = ModelShape(**{**SHAPE, "layer_types": tuple(SHAPE["layer_types"])}).num_parameters
    share = percent(parameters / 4_000_000_000, 0).replace("\u00a0", " ") + " of the teacher’s"
    for fact in (
        fingerprint(chain), fingerprint(chain.parent / "int4"), fingerprint(chain.parents[1] / "big"),
        "nanokit executorch --out 'a b'", "2026-11-22T09:08:07", "train.jsonl", "a" * 64, "executorch 1.4.1", "123,456",
        "9,876,543 codes", "99.51 %", "4.2×10⁻⁶", "31.4", "30.1 to 32.7", "best, 4.53 bits", share,
        "once ⏎ upon a", "91.0 %", "61 are right in big", "7 right answers", "a yaffle", "What does Fay keep?",
    ):  # fmt: skip
        assert fact in said, fact
    for entry in read_manifest(chain).files.values():
        assert entry["sha256"] in said
    worst = max(LINEARS, key=LINEARS.__getitem__)
    assert f"{worst.removeprefix('model.')} 4 {percent(LINEARS[worst], 2)}".replace("\u00a0", " ") in said
    assert f"is {percent(sum(LINEARS.values()) / len(LINEARS), 2)}".replace("\u00a0", " ") in said
    assert html.count("<polyline") == 1 + 2 * len(LAYER_LINEARS)
    assert len(html) < 100_000


def test_the_ladder_has_every_stage_and_the_teacher_by_its_shares(chain: Path) -> None:
    cards = {card.stage: card for card in gather(chain).cards}
    assert list(cards) == ["teacher", "student", "ExecuTorch"]
    assert cards["teacher"].derived
    assert cards["teacher"].capabilities["coding"].score == pytest.approx(0.72 / 0.9)
    assert cards["teacher"].capabilities["factuality"].score == pytest.approx(0.81 / 0.9)
    html = made(chain)
    coding = html[html.index("coding <small>") : html.index("factuality <small>")]
    assert re.findall(r'class="bar" width="([\d.]+)"', coding) == ["800.0", "720.0", "600.0"]
    assert "mean of 2" in words(html)
    assert "82 %" in words(html)  # (75 + 90) / 2 of the teacher


def test_stages_that_were_asked_other_questions_are_no_rung(chain: Path) -> None:
    other = {**scorecard(coding=(0.5, 0.6)), "data": {"tasks": ["another.toml"], "limit": None}}
    add_results(chain.parent / "student", {"scorecard": other})
    report = gather(chain)
    assert ([card.stage for card in report.cards], report.others) == (["teacher", "ExecuTorch"], ("student",))
    assert "Asked other questions, and not shown: student." in words(made(chain))


def test_memory_and_speed_are_those_of_check(chain: Path) -> None:
    report = gather(chain)
    assert report.phones is not None
    phones = {phone.name: phone for phone in report.phones.phones}
    for name in ("low-end", "iphone-15-pro"):
        verdict = check_bundle(chain, name)
        assert phones[name].fits == verdict.fits
        assert report.phones.dirty == verdict.footprint.dirty
        assert {x.name: x.needed for x in verdict.limits} == {k: v["needed"] for k, v in phones[name].limits.items()}
    said = words(made(chain))
    assert decimal_bytes(report.phones.resident) in said
    assert set(phones) | set(report.phones.unjudged) == set(profile_names())
    high = check_bundle(chain, "high-end").speed
    assert high is not None
    assert f"high-end {short(high.likely, 2)} {short(high.low, 2)} to {short(high.high, 2)}" in said
    assert [phone.name for phone in gather(chain, profiles=["low-end"]).phones.phones] == ["low-end"]  # type: ignore[union-attr]


def test_a_measurement_outweighs_the_forecast(chain: Path) -> None:
    killed = {"fits": False, "died": "prefill", "peak_dirty": 1_234_000_000, "phases": [], "prediction_error": None}
    lived = {"fits": True, "died": None, "peak_dirty": 850_000_000, "prediction_error": -0.021,
             "phases": [{"name": "decode", "units_per_second": 9.5}]}  # fmt: skip
    checks = {"low-end@4096": {"measured": killed, "machine": "Linux"}, "pixel-6a@4096": {"measured": lived},
              "galaxy-s23@512": {"measured": killed}, "mine@4096": {"measured": lived}}  # fmt: skip
    add_results(chain, {"checks": checks})
    report = gather(chain)
    assert report.phones is not None
    fits = {phone.name: phone.fits for phone in report.phones.phones}
    assert (fits["low-end"], fits["pixel-6a"], fits["galaxy-s23"], fits["mine"]) == (False, True, True, True)
    said = words(made(chain))
    assert "killed in the phase ‘prefill’, 1.23 GB written at most" in said
    assert "850.0 MB written at most (forecast −2.1 %)" in said
    assert "low-end at context 4,096, it was killed" in said
    assert made(chain).count('class="peak"') == 3  # the legend, low-end, pixel-6a


def test_what_is_missing_names_its_command(chain: Path) -> None:
    manifest = read_manifest(chain)
    bare = chain.with_name("bare ' one")
    bare.mkdir()
    for name in ("weights", "tokenizer.json"):
        (bare / name).write_bytes((chain / name).read_bytes())
    write_manifest(bare, replace(manifest, results={}, inputs={}))
    said = words(made(bare))
    quoted = f"'{bare}'".replace("bare ' one", "bare '\"'\"' one")
    for command in ("nanokit evaluate {} --tasks", "nanokit report {} --data", "nanokit bench {} --record",
                    "nanokit check {} --profile", "nanokit verify {} --against"):  # fmt: skip
        assert command.format(quoted) in said
    assert "no error of any linear" in said


def test_other_stages_and_what_is_none(chain: Path, tmp_path: Path) -> None:
    int4, student = (words(made(chain.parent / kind)) for kind in ("int4", "student"))
    assert "nano-9, int4" in int4
    assert "There is no bundle yet" in int4
    assert "the text is < odd" in int4
    assert "It is not quantized." in student
    with pytest.raises(BadFileError, match=r"no manifest\.json"):
        gather(tmp_path / "big")
    with pytest.raises(BadFileError, match="no such folder"):
        gather(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="no such device profile"):
        gather(chain, profiles=["pixel-99"])


def test_history_is_read_from_the_folders_and_else_from_the_manifest(chain: Path) -> None:
    add_results(chain.parent / "int4", {"divergence": divergence(tokens=77)})
    assert [one.tokens for one in gather(chain).divergences] == [77, 4096]
    moved = chain.parents[1] / "elsewhere"
    (chain.parent / "int4").rename(moved)
    steps = {step.ancestor.role: step for step in lineage(chain, read_manifest(chain))}
    assert steps["int4"].folder is None  # another name
    assert steps["student"].folder == chain.parent / "student"
    assert steps["int4"].command == ("nanokit", "int4", "--out", "a b")
    report = gather(chain)
    assert report.layers is not None
    assert report.layers.results["relative_error"] == pytest.approx(LINEARS)
    assert [one.tokens for one in report.divergences] == [4096]
    kinds = [one.role for one in history_of(read_manifest(chain).inputs)]
    assert kinds == ["int4", "student", "teacher"]


def test_damage_and_overlap_are_warned_of(chain: Path) -> None:
    add_results(chain, {"divergence": divergence(data={"files": [{"path": "x/train.jsonl", "sha256": "a" * 64}]})})
    weights = chain / "weights"
    weights.write_bytes(b"X" + weights.read_bytes()[1:])
    (chain / "extra").write_text("?")
    warnings = " ".join(gather(chain).warnings)
    assert "weights is not what the manifest says: sha256" in warnings
    assert "extra" in warnings
    assert "measured on train.jsonl, which training or calibration read" in warnings
    assert not any("weights" in one for one in gather(chain, hashed=False).warnings)
    assert "1 file of 2 had not the recorded sha256" in words(made(chain))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything within plain data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield (*path, key)
        yield from leaves(entry, (*path, key))


JUNK = (EVIL, -1, 10**60, "\ud800", 10**400, float("nan"), None, [], [EVIL], {EVIL: EVIL}, True, 1e-320)


def test_no_manifest_brings_it_down(chain: Path) -> None:
    """Each part of a manifest in turn is replaced by what cannot be: a page without it, or an error that says so."""
    add_results(chain, {"checks": {"low-end@4096": {"measured": {"fits": True, "phases": [{"name": "decode"}]}}}})
    original = json.loads((chain / "manifest.json").read_text())
    paths = list(leaves(original))
    pages = 0
    for number, path in enumerate(paths[:: max(1, len(paths) // 120)]):
        broken = copy.deepcopy(original)
        place = broken
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = JUNK[number % len(JUNK)]
        (chain / "manifest.json").write_text(json.dumps(broken))
        try:
            html = made(chain, profiles=["low-end"], hashed=False)
        except NanokitError:
            continue
        pages += 1
        assert "<script" not in html
        assert "<img" not in html
        html.encode()
    assert pages > 100


@pytest.fixture
def evil(chain: Path) -> Path:
    """The bundle, every text in its manifest a stranger's."""
    path = chain / "manifest.json"
    raw = json.loads(path.read_text())

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            named = ("capabilities", "versions", "relative_error")
            return {EVIL if key in named else k: poison(entry, k) for k, entry in value.items()}
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return EVIL if isinstance(value, str) and key not in ("kind", "sha256", "family") and value != "full_attention" else value  # noqa: E501  # fmt: skip

    parts = ("inputs", "recipe", "data", "results", "created", "command", "versions")
    path.write_text(json.dumps({key: poison(value, key) if key in parts else value for key, value in raw.items()}))
    return chain


def test_strangers_text_is_text(evil: Path, tmp_path: Path) -> None:
    run_report(evil, tmp_path / "page.html", title=EVIL)
    seen = look(tmp_path / "page.html", tmp_path, script="document.body.dataset.seen = document.images.length")
    assert "<title>hacked" not in seen.dom
    assert 'data-seen="0"' in seen.dom
    assert seen.dom.count("<script>") == 1  # the test's own
    assert seen.console == ()


LOOK = """
const wide = document.documentElement.scrollWidth > innerWidth;
const out = [...document.querySelectorAll("main *")].filter(e => !e.closest(".wide") &&
  e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
  .map(x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!c.endsWith(", 0)")) return c; } return "rgb(255, 255, 255)"; };
const pale = [...document.querySelectorAll("main *:not(svg *)")].filter(e =>
  [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).filter(e => {
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5; }).map(e => e.outerHTML.slice(0, 80));
const levels = [...document.querySelectorAll("h1, h2, h3")].map(e => +e.tagName[1]);
const skipped = levels.some((l, i) => i && l > levels[i - 1] + 1);
const unnamed = document.querySelectorAll("svg:not([aria-label]):not([aria-hidden])").length;
const dead = [...document.querySelectorAll("a")].filter(a => !document.querySelector(a.getAttribute("href"))).length;
document.title = JSON.stringify({wide, out, pale, skipped, unnamed, dead,
  loaded: performance.getEntriesByType("resource").length, page: getComputedStyle(document.body).backgroundColor});
"""


@pytest.mark.parametrize(("width", "dark"), [(360, False), (800, False), (1280, True)])
def test_chromium_shows_it_whole(chain: Path, tmp_path: Path, width: int, dark: bool) -> None:
    """Nothing sticks out, is pale or is loaded; the console is silent; headings and pictures have their names."""
    add_results(chain.parent / "int4", {"divergence": divergence(), "scorecard": scorecard(coding=(0.7, 0.87))})
    run_report(chain, tmp_path / "page.html")
    seen = look(tmp_path / "page.html", tmp_path, script=LOOK, width=width, dark=dark)
    title = re.search(r"<title>(.*?)</title>", seen.dom)
    assert title is not None
    page = "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
    assert json.loads(unescape(title[1])) == {
        "wide": False, "out": [], "pale": [], "skipped": False, "unnamed": 0, "dead": 0, "loaded": 0, "page": page,
    }  # fmt: skip
    assert seen.console == ()


def test_the_page_goes_where_it_may(chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = default_page(chain)
    assert page == Path("nano-9-executorch-report.html")
    run_report(chain, page)
    run_report(chain, page)  # its own page is replaced
    page.write_text("<p>somebody's</p>")
    with pytest.raises(OutputExistsError):
        run_report(chain, page)
    assert page.read_text() == "<p>somebody's</p>"
    run_report(chain, page, force=True)
    with pytest.raises(RequestError, match="in the folder it speaks of"):
        check_page(chain / "page.html", chain, force=True)
    with pytest.raises(RequestError):
        check_page(tmp_path / "nowhere" / "page.html", chain, force=False)
    assert find_teacher(chain) == tmp_path / "big"
    (tmp_path / "big" / "config.json").write_text('{"other": 1}')
    with pytest.raises(RequestError, match="is not there"):
        find_teacher(chain)


def test_bars_stand_where_their_sizes_are() -> None:
    svg = stacked_bar({"a": 30.0, "b": 0.0, "c": 20.0}, 100.0, 'a "b"', [("written", 80.0)], 45.0)
    assert re.findall(r'class="bar (\w)" x="([\d.]+)" width="([\d.]+)"', svg) == [("a", "0.0", "300.0"), ("c", "300.0", "200.0")]  # noqa: E501  # fmt: skip
    assert 'class="written" x1="800.0"' in svg
    assert 'class="peak" d="M450.0 5h0"' in svg
    assert "a &quot;b&quot;" in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.09251, "0.0925"),
        (-0.5, "−0.5"),
        (1204.3, "1,204"),
        (2.14e-6, "2.14×10⁻⁶"),
        (999.9, "1000"),
        (17, "17"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert short(value) == text


def test_divergence_is_measured_and_recorded(
    tiny_model: Callable[..., Path], tmp_path: Path, nanokit: Callable[..., Any]
) -> None:
    """The command on real models: figures as evaluate's, flips as a plain loop finds them."""
    reference, text = tiny_model("llama"), some_sentences(tmp_path)
    folder = tmp_path / "nano-8"
    folder.mkdir()
    for path in tiny_model("llama", num_hidden_layers=1).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    write_manifest(folder, Manifest("student", inputs={"teacher": input_entry(reference)}))
    ran = nanokit("report", folder, "--data", text, "--tokens", 600, "--out", tmp_path / "p.html", "--json")
    assert ran.status == 0, ran.stderr
    recorded = read_manifest(folder).results["divergence"]
    (shown,) = ran.json()["divergences"]
    options = EvaluateOptions(600, 256)
    measured = measure_folders(folder, [text], reference, options)
    assert measured.scores.divergence is not None
    for name, figure in measured.scores.divergence.items():
        assert recorded["figures"][name]["value"] == pytest.approx(figure.value)
        assert shown["figures"][name]["value"] == pytest.approx(figure.value)
    assert recorded["reference"]["fingerprint"] == fingerprint(reference)
    ours, theirs = open_model(folder), open_model(reference)
    lost = []
    for ids in measured.windows.ids:
        mine, wanted = ours.logits([ids])[0], theirs.logits([ids])[0]
        for t, right in enumerate(ids[1:]):
            if wanted[t].argmax() == right != mine[t].argmax():
                p, q = (np.exp(row[right] - np.logaddexp.reduce(row)) for row in (mine[t], wanted[t]))
                lost.append(float(q - p))
    assert recorded["lost"] == len(lost)
    fallen = [one["reference_p"] - one["right_p"] for one in recorded["flips"]]
    assert fallen == pytest.approx(sorted(lost, reverse=True)[: len(fallen)], abs=2e-4)
    assert len(fallen) == min(len(lost), 12)
    with pytest.raises(RequestError, match="the model itself"):
        measure_divergence(folder, folder, [text])


def test_the_command_refuses_plainly(chain: Path, tmp_path: Path, nanokit: Callable[..., Any]) -> None:
    out = tmp_path / "p.html"
    for arguments, said in (
        ((tmp_path / "big",), "no manifest.json"),
        ((chain, "--reference", tmp_path / "big"), "--reference is for --data"),
        ((chain, "--profile", "pixel-99"), "no such device profile"),
        ((chain, "--data", tmp_path / "none.txt"), "none.txt"),
    ):
        ran = nanokit("report", *arguments, "--out", out)
        assert ran.status == 2, ran.stderr
        assert said in ran.stderr
        assert "Traceback" not in ran.stderr
        assert not out.exists()
    assert "divergence" in read_manifest(chain).results
    found = nanokit("report", chain, "--out", out, "--json").json()
    assert found["out"] == str(out)
    assert [one["kind"] for one in found["history"]] == ["", "student", "int4", "executorch"]
    assert found["files"]["weights"][0] == (chain / "weights").stat().st_size
