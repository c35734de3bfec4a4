"""The gate's arithmetic and rule: against known values, on made-up units, and on how often it cries wolf."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nano.baseline import Baseline, Unit
from nano.errors import BadFileError, RequestError
from nano.gate.limits import Limits, read_limits
from nano.gate.verdicts import Verdict, drift_limit, expanded_tail, judge, resampled

MODEL = {"path": "m", "fingerprint": "f" * 64, "kind": "int4"}
DATA = {"files": [{"path": "t", "sha256": "0"}], "tokens": 8192, "sequence_length": 256}
ONLY_PERPLEXITY = Limits(max_accuracy_loss=None, max_drift=None, max_kl_rise=None)


def baseline(nll: np.ndarray, correct: np.ndarray | None = None, kl: np.ndarray | None = None, tokens: int = 100,
             same: int | None = None) -> Baseline:  # fmt: skip
    units = [
        Unit(f"unit {i}", f"{i:012x}", tokens, float(value), 50 if correct is None else int(correct[i]),
             None if kl is None else float(kl[i]), same if kl is not None else None)
        for i, value in enumerate(nll)
    ]  # fmt: skip
    return Baseline(MODEL, DATA, tuple(units))


def by_name(verdicts: list[Verdict]) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in verdicts}


def test_the_expanded_tail_reaches_as_far_as_students_t() -> None:
    """t's 97.5% quantiles from any table: 2.2622 for 9 degrees of freedom, 2.0930 for 19, 1.9842 for 99."""
    for n, t in ((10, 2.2622), (20, 2.0930), (100, 1.9842)):
        expected = statistics.NormalDist().cdf(-t * math.sqrt(n / (n - 1)))
        assert expanded_tail(0.025, n) == pytest.approx(expected, rel=0.01)


def test_the_interval_of_a_paired_difference_is_students() -> None:
    """Documents differ by far more than the models do: only a paired test sees a rise of 1%."""
    random = np.random.default_rng(0)
    before = random.normal(150, 40, 30)
    change = random.normal(1.0, 0.5, 30)
    verdict = by_name(judge(baseline(before), baseline(before + change), ONLY_PERPLEXITY))["perplexity"]
    half = 2.0452 * change.std(ddof=1) / math.sqrt(30) / 100
    assert verdict.value == pytest.approx(math.expm1(change.mean() / 100), rel=1e-9)
    assert verdict.low == pytest.approx(math.expm1(change.mean() / 100 - half), abs=0.0003)
    assert verdict.high == pytest.approx(math.expm1(change.mean() / 100 + half), abs=0.0003)


def test_resampling_is_the_slow_way_done_at_once() -> None:
    columns = {"a": np.arange(12.0), "b": np.arange(12.0) ** 2}
    found = resampled(columns, 2000, seed=3)
    counts = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=2000)
    for r in (0, 7, 1999):
        drawn = [i for i in range(12) for _ in range(counts[r, i])]
        assert len(drawn) == 12
        assert found["a"][r] == sum(drawn)
        assert found["b"][r] == sum(i * i for i in drawn)


@pytest.mark.parametrize(
    ("rise", "spread", "outcome"), [(0.03, 0.001, "failed"), (0.005, 0.001, "passed"), (0.011, 0.02, "undecided")]
)
def test_the_rule(rise: float, spread: float, outcome: str) -> None:
    random = np.random.default_rng(1)
    before = random.normal(150, 40, 40)
    change = random.normal(0, spread * 100, 40)
    after = before + change - change.mean() + 100 * math.log1p(rise)
    verdict = by_name(judge(baseline(before), baseline(after), ONLY_PERPLEXITY))["perplexity"]
    assert verdict.value == pytest.approx(rise, rel=1e-6)
    assert verdict.outcome == outcome
    if outcome == "failed":
        assert verdict.sentence.startswith("perplexity rose 3.00% (95% interval 2.9")
        assert verdict.sentence.endswith("more than the 1.00% allowed")


def test_worst_units_come_first_and_those_that_gained_are_left_out() -> None:
    before = np.full(12, 150.0)
    after = before.copy()
    after[[3, 7]] += (5.0, 9.0)
    after[1] -= 50.0
    verdict = by_name(judge(baseline(before), baseline(after), ONLY_PERPLEXITY))["perplexity"]
    assert verdict.worst == (("9 nats less likely", "unit 7"), ("5 nats less likely", "unit 3"))


def test_every_figure_is_what_it_says() -> None:
    n = 20
    before = baseline(np.full(n, 150.0), np.full(n, 60), np.full(n, 2.0), same=95)
    after = baseline(np.full(n, 152.0), np.full(n, 57), np.full(n, 3.0), same=90)
    found = by_name(judge(before, after, Limits(max_kl=0.02, min_top1=0.95)))
    assert found["perplexity"].value == pytest.approx(math.expm1(0.02))
    assert found["next-token accuracy"].value == pytest.approx(0.03)
    assert found["KL rise"].value == pytest.approx(0.5)
    assert found["KL"].value == pytest.approx(0.03)
    assert found["same most likely token"].value == pytest.approx(0.10)
    assert found["drift"].value == pytest.approx(2.0**2 / 2 / 100)
    assert {verdict.outcome for name, verdict in found.items() if name != "tokens"} == {"failed"}
    direct = replace(after, reference=MODEL)  # the baseline was the reference: its KL is the drift
    assert by_name(judge(before, direct, Limits()))["drift"].value == pytest.approx(0.03)


def test_drift_is_held_against_what_the_two_can_agree_to() -> None:
    one = baseline(np.full(12, 150.0))

    def of(kind: str, activations: str = "float") -> Baseline:
        return replace(one, model={**MODEL, "kind": kind}, activations=activations)

    assert drift_limit(of("int4"), of("int4")) == drift_limit(of("student"), of("student")) == "max_drift"
    assert drift_limit(of("int4"), of("executorch")) == drift_limit(of("onnx"), of("onnx")) == "max_runtime_drift"
    assert drift_limit(of("int4"), of("int4", "int8-ort")) == "max_runtime_drift"
    assert drift_limit(of("student"), of("int4")) == "", "quantization is meant to move a model"
    found = by_name(judge(of("student"), of("int4"), Limits()))
    assert "drift" not in found
    after = replace(of("onnx"), units=tuple(replace(unit, nll=unit.nll + 0.3) for unit in one.units))
    (drift,) = (v for v in judge(of("onnx"), after, Limits()) if v.name == "drift")
    assert (drift.limit, drift.outcome) == (0.0008, "passed")
    assert drift.value == pytest.approx(0.3**2 / 2 / 100)


def test_other_ids_fail_and_too_little_text_is_refused() -> None:
    one = baseline(np.full(12, 150.0))
    other = replace(one, units=tuple(replace(unit, ids="x") for unit in one.units))
    assert judge(one, other, Limits())[0].outcome == "failed"
    assert "tokens" not in by_name(judge(one, other, Limits(same_tokens=False)))
    longer = baseline(np.full(12, 150.0), tokens=101)
    (only,) = judge(one, replace(longer, units=(*longer.units[:11], replace(longer.units[11], ids="x"))), Limits())
    assert (only.name, only.outcome) == ("tokens", "failed")
    with pytest.raises(RequestError, match="other numbers of tokens"):
        judge(one, longer, Limits(same_tokens=False))
    with pytest.raises(RequestError, match="too little text"):
        judge(baseline(np.full(9, 1.0)), baseline(np.full(9, 1.0)), Limits())


def test_the_gate_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "gate.toml"
    path.write_text("max_perplexity_rise = 0.02\nmax_drift = false\nconfidence = 0.99\n")
    limits, named = read_limits(path)
    assert (limits.max_perplexity_rise, limits.max_drift, limits.confidence) == (0.02, None, 0.99)
    assert named == {"max_perplexity_rise", "max_drift", "confidence"}
    path.write_text("capabilities = { coding = 0.1, reasoning = false }\n")
    assert read_limits(path)[0].capabilities == {"coding": 0.1, "reasoning": None}
    assert read_limits(None) == (Limits(), frozenset())
    wrong = 'max_perplexity = 1|max_kl = true|max_kl = -1|max_kl = "1"|confidence = 95|min_top1 = 90|resamples = 100'
    more = ("max_flips = 2", "capabilities = 1", "capabilities.a = -1", "seed = -1", "max_kl = nan", "x = [")
    for bad in (*wrong.split("|"), *more, 'undecided = "maybe"', "same_tokens = 1"):
        path.write_text(bad + "\n")
        with pytest.raises(BadFileError):
            read_limits(path)
    with pytest.raises(BadFileError, match="no such gate file"):
        read_limits(tmp_path / "none.toml")
