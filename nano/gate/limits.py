"""gate.toml: what may be lost, with its defaults and the checks of its values. docs/gate.md says it for users."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nano.errors import BadFileError
from nano.toml import read_toml


@dataclass(frozen=True)
class Limits:
    """What may be lost. A limit of None is not judged (`false` in gate.toml).

    Attributes:
        max_perplexity_rise: of the candidate over the baseline, a fraction.
        max_accuracy_loss: of the share of tokens that are the most likely ones, a difference of shares.
        max_drift: how far the candidate may be from the baseline itself, nats a token, where both are folders of one
            kind that run in float, or bundles with the same maker, runtime and machine: KL(baseline || candidate) where
            the baseline was the candidate's reference; else half the squared change of a unit's log-likelihood, which
            is that KL where tokens change independently, and more where they change together.
        max_runtime_drift: the same where a runtime with int8 activations is on either side, and not the same on both.
        max_kl_rise: of KL(reference || model) over the baseline's, a fraction; needs a reference in both.
        max_kl: of the candidate's mean KL, nats a token; needs a reference.
        min_top1: least share of positions with the reference's most likely token; needs a reference.
        max_capability_loss: of a capability's score, a difference of shares; of scorecards, as are the next three.
        max_score_loss: of the mean over capabilities.
        max_flips: share of questions that one model had right and the other wrong, where both are meant to be the same
            model (see `nano.gate.verdicts.drift_limit`) or gate.toml names it.
        capabilities: capability to its own max_capability_loss.
        same_tokens: whether both must read the text as the same token ids.
        confidence: share of resampled values that an interval holds.
        undecided: what becomes of a figure whose interval holds its limit.
        resamples: R.
        seed: of the resampling.
    """

    max_perplexity_rise: float | None = 0.01
    max_accuracy_loss: float | None = 0.01
    max_drift: float | None = 0.00005
    max_runtime_drift: float | None = 0.0008
    max_kl_rise: float | None = 0.05
    max_kl: float | None = None
    min_top1: float | None = None
    max_capability_loss: float | None = 0.02
    max_score_loss: float | None = 0.01
    max_flips: float | None = 0.05
    capabilities: Mapping[str, float | None] = field(default_factory=dict)
    same_tokens: bool = True
    confidence: float = 0.95
    undecided: Literal["pass", "fail"] = "pass"
    resamples: int = 5000
    seed: int = 0


CARD_LIMITS = ("max_capability_loss", "max_score_loss", "max_flips")
REFERENCE_LIMITS = ("max_kl", "min_top1", "max_kl_rise")


def read_limits(path: Path | None) -> tuple[Limits, frozenset[str]]:
    """gate.toml over the defaults, and the keys it names.

    Raises:
        BadFileError: missing, not TOML, an unknown key, or a value out of its range.
    """
    if path is None:
        return Limits(), frozenset()
    table = read_toml(path, "gate file")
    known = [item.name for item in dataclasses.fields(Limits)]
    for key, value in table.items():
        if key not in known:
            raise BadFileError(
                "The gate file has a key that is not known.", found=f"{path}: {key}", expected=", ".join(known)
            )
        if wanted := _wrong(key, value):
            raise BadFileError("The gate file has a value that cannot be.", found=f"{path}: {key} = {value!r}", expected=wanted)  # noqa: E501  # fmt: skip
    values: dict[str, Any] = {key: _limit(value) if _is_limit(key) else value for key, value in table.items()}
    if "capabilities" in table:
        values["capabilities"] = {name: _limit(value) for name, value in table["capabilities"].items()}
    return dataclasses.replace(Limits(), **values), frozenset(table)


def _is_limit(key: str) -> bool:
    return key.startswith(("max_", "min_"))


def _limit(value: Any) -> Any:
    return None if value is False else value


def _wrong(key: str, value: object) -> str:
    """What a key should hold; "" where it does."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if key == "capabilities":
        wrong = not isinstance(value, dict) or any(_wrong("max_capability_loss", one) for one in value.values())
        return "a table of capabilities, each with a share from 0 to below 1, or false for no limit" if wrong else ""
    if key == "undecided":
        return "" if value in ("pass", "fail") else '"pass" or "fail"'
    if key == "same_tokens":
        return "" if isinstance(value, bool) else "true or false"
    if key in ("resamples", "seed"):
        low, high = (2000, 100_000) if key == "resamples" else (0, 1 << 32)
        sound = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return "" if sound else f"a whole number of {low:,} to {high:,}"
    low_share = 0.5 if key == "confidence" else 0.0
    if key in ("confidence", "min_top1", "max_accuracy_loss", *CARD_LIMITS):
        sound = number and low_share <= float(value) < 1  # type: ignore[arg-type]
        wanted = f"a share from {low_share:g} to below 1"
    else:
        sound, wanted = number and float(value) >= 0, "0 or more"  # type: ignore[arg-type]
    if key == "confidence":
        return "" if sound else wanted
    return "" if sound or value is False else f"{wanted}, or false for no limit"
