"""What no phone runtime of ours can compute, found in a config.json: `export` refuses it, earlier stages warn of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nano.families import Family
from nano.progress import warn

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotations whose angles do not depend on the length of the text, so a table holds them."""

UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")


@dataclass(frozen=True)
class Obstacle:
    """Why a model cannot be exported: what is wrong, what was found, what was expected."""

    problem: str
    found: str
    expected: str


def obstacle(config: Mapping[str, Any], family: Family) -> Obstacle | None:
    """The first obstacle, or None.

    Args:
        config: config.json as transformers 5 writes it (`rope_parameters`) or as older ones did (`rope_scaling`).
        family: of the model.
    """
    for key in UNSUPPORTED:
        if config.get(key):
            return Obstacle("This model's attention is not supported.", f"{key} = {config[key]}", "none")
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation:
        return Obstacle("This model's activation is not supported.", str(activation), family.activation)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # in the order of transformers 5
    kinds = rope.items() if rope and all(isinstance(value, Mapping) for value in rope.values()) else [("", rope)]
    for kind, one in kinds:
        rope_type = one.get("rope_type") or one.get("type") or "default"
        if rope_type not in STATIC_ROPE or one.get("partial_rotary_factor", 1.0) != 1.0:
            return Obstacle(
                "This model's rotary positions are not supported.",
                f"{kind} rope_parameters {dict(one)}".strip(),
                f"rope_type one of {', '.join(STATIC_ROPE)}, over the whole head",
            )
    return None


def warn_of_export(config: Mapping[str, Any], family: Family) -> None:
    """Say what `export` will refuse, before anything is spent on the model."""
    found = obstacle(config, family)
    if found:
        warn(f"export will refuse this model. {found.problem} Found: {found.found}; expected: {found.expected}")
