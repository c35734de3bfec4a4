"""The figures against llama.cpp's definitions, written out token by token in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nano.divergence import calibration_error, divergence, joined, token_figures


def random_window(seed: int, t: int = 60, v: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = (rng.normal(size=(t, v)) * 3).astype(np.float32)
    ours = (reference + rng.normal(size=(t, v)) * 0.5).astype(np.float32)
    return rng.integers(0, v, size=t), ours, reference


def plain_softmax(row: np.ndarray) -> list[float]:
    top = max(float(x) for x in row)
    powers = [math.exp(float(x) - top) for x in row]
    return [p / math.fsum(powers) for p in powers]


def mean_and_uncertainty(values: list[float]) -> tuple[float, float]:
    """perplexity.cpp's `mean_and_uncertainty`."""
    n = len(values)
    average = sum(values) / n
    return average, math.sqrt((sum(x * x for x in values) / n - average**2) / (n - 1))


def percentile(values: list[float], fraction: float) -> float:
    """perplexity.cpp's `percentile`."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    place -= low
    return (1 - place) * ordered[low] + place * ordered[min(low + 1, len(ordered) - 1)]


def test_every_figure_follows_llama_cpps_definition() -> None:
    windows = [random_window(0), random_window(1, t=33)]
    found = divergence(joined([token_figures(*window) for window in windows]))
    nll, base, kl, change, same, flips = [], [], [], [], [], []
    for ids, ours, reference in windows:
        for t in range(len(ids) - 1):
            p, q, right = plain_softmax(ours[t]), plain_softmax(reference[t]), int(ids[t + 1])
            nll.append(-math.log(p[right]))
            base.append(-math.log(q[right]))
            kl.append(math.fsum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True)))
            change.append(p[right] - q[right])
            same.append(float(p.index(max(p)) == q.index(max(q))))
            flips.append(float((p.index(max(p)) == right) != (q.index(max(q)) == right)))
    n = len(nll)
    assert n == 59 + 32

    ours, theirs = mean_and_uncertainty(nll), mean_and_uncertainty(base)
    covariance = (sum(a * b for a, b in zip(nll, base, strict=True)) / n - ours[0] * theirs[0]) / (n - 1)
    ratio = ours[0] - theirs[0], math.sqrt(ours[1] ** 2 + theirs[1] ** 2 - 2 * covariance)
    a, b = math.exp(ours[0]), math.exp(theirs[0])
    rms = mean_and_uncertainty([x * x for x in change])
    agreed = sum(same) / n
    expected: dict[str, tuple[float, float | None]] = {
        "Mean PPL(Q)": (a, a * ours[1]),
        "Mean PPL(base)": (b, b * theirs[1]),
        "Cor(ln(PPL(Q)), ln(PPL(base)))": (covariance / (ours[1] * theirs[1]), None),
        "Mean ln(PPL(Q)/PPL(base))": ratio,
        "Mean PPL(Q)/PPL(base)": (math.exp(ratio[0]), math.exp(ratio[0]) * ratio[1]),
        "Mean PPL(Q)-PPL(base)": (
            a - b,
            math.sqrt((a * ours[1]) ** 2 + (b * theirs[1]) ** 2 - 2 * a * b * covariance),
        ),
        "Mean KLD": mean_and_uncertainty(kl),
        "Maximum KLD": (max(kl), None),
        "Median KLD": (percentile(kl, 0.5), None),
        "Mean Δp": mean_and_uncertainty(change),
        "Maximum Δp": (max(change), None),
        "Median Δp": (percentile(change, 0.5), None),
        "Minimum Δp": (min(change), None),
        "RMS Δp": (math.sqrt(rms[0]), 0.5 / math.sqrt(rms[0]) * rms[1]),
        "Same top p": (agreed, math.sqrt(agreed * (1 - agreed) / (n - 1))),
        "Flips": mean_and_uncertainty(flips),
    }
    for share in (0.9, 0.95, 0.99, 0.999):
        expected[f"{share:.1%} KLD"] = (percentile(kl, share), None)
    for share in (0.999, 0.99, 0.95, 0.9, 0.75, 0.25, 0.1, 0.05, 0.01, 0.001):
        expected[f"{share:.1%} Δp"] = (percentile(change, share), None)
    assert set(found) == set(expected)
    for name, (value, error) in expected.items():
        assert found[name].value == pytest.approx(value, rel=1e-6, abs=1e-8), name
        assert found[name].error == (None if error is None else pytest.approx(error, rel=1e-5)), name


def test_a_model_against_itself_has_no_divergence_and_no_doubt() -> None:
    ids, ours, _ = random_window(2)
    found = divergence(token_figures(ids, ours, ours))
    assert found["Mean PPL(Q)/PPL(base)"].value == 1.0
    assert found["Mean PPL(Q)/PPL(base)"].error == 0.0
    assert (found["Maximum KLD"].value, found["RMS Δp"].value, found["RMS Δp"].error) == (0.0, 0.0, 0.0)
    assert (found["Same top p"].value, found["Flips"].value) == (1.0, 0.0)


def test_calibration_error_equals_its_definition() -> None:
    ids, ours, _ = random_window(3, t=400)
    tokens = token_figures(ids, ours)
    slow = 0.0
    for low in range(15):
        inside = [t for t in range(399) if low <= tokens.confidence_T[t] * 15 < low + 1]
        if inside:
            accuracy = sum(bool(tokens.correct_T[t]) for t in inside) / len(inside)
            slow += len(inside) / 399 * abs(accuracy - sum(float(tokens.confidence_T[t]) for t in inside) / len(inside))
    assert calibration_error(tokens) == pytest.approx(slow, rel=1e-9)
    assert divergence(tokens) == {}


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 0.1, 2.0, 20.0])
def test_kl_keeps_its_digits_however_close_or_far_the_two_are(noise: float) -> None:
    """Against the definition in float128, where sum q log(q / p) has digits to spare."""
    rng = np.random.default_rng(4)
    reference = (rng.normal(size=(9, 3000)) * 4).astype(np.float32)
    ours = (reference + noise * rng.normal(size=(9, 3000))).astype(np.float32)
    ours[3, 17], reference[3, 17] = ours[3].max() + 5, reference[3].min() - 150  # no float32 holds its weight
    found = token_figures(rng.integers(0, 3000, size=9), ours, reference)
    assert found.kl_T is not None
    for t in range(8):
        p, q = (np.exp(row.astype(np.longdouble) - row.max()) for row in (ours[t], reference[t]))
        p, q = p / p.sum(), q / q.sum()
        assert float(found.kl_T[t]) == pytest.approx(float((q * np.log(q / p)).sum()), rel=3e-5)
