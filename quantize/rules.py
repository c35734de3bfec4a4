r"""One line of a quantization recipe, and the TOML file that holds several.

```toml
[[rule]]
pattern = 'model\.layers\.(0|1)\..*_proj'   # must match the whole module name
bits = 8                                    # 4, 8 or "float"
group_size = "channel"                      # 32, 64, ..., "channel", or "auto"
symmetric = true
```

Imports nothing heavy: options and the command line are made of this.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from nano.errors import RequestError
from nano.toml import read_toml

CHANNEL = 0
"""As a group size: one scale for the whole input width."""
DEFAULT_GROUP = 32
"""What "auto" means for 4 bits wherever it divides the width: the group of phones' int4 kernels."""


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
        pattern: a regular expression that must match the whole module name.
        bits: 4, 8, or "float" (None means the same) to leave the module as it is.
        group_size: input channels that share a scale. "channel" (or `CHANNEL`) means all of them. "auto" is 32 for
            4 bits and "channel" for 8; where 32 does not divide the width, it is 8 bits by channel for 4, because
            no phone kernel takes int4 there.
        symmetric: whether code 0 means 0.0; else each group has a zero point.
    """

    pattern: str
    bits: int | Literal["float"] | None = 4
    group_size: int | Literal["auto", "channel"] = "auto"
    symmetric: bool = True

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RequestError("A rule's pattern is not a regular expression.", found=f"{self.pattern!r}: {error}") from None  # noqa: E501  # fmt: skip
        size = self.group_size
        fits = size in ("auto", "channel") if isinstance(size, str) else size >= 0
        if self.bits not in (None, "float", 4, 8) or not fits:
            raise RequestError(
                "A rule asks for a grid that there is not.",
                found=f"bits {self.bits}, group size {size} for {self.pattern!r}",
                expected='bits 4, 8 or "float"; a group size of 1 or more, "channel" or "auto"',
            )

    def matches(self, module: str) -> bool:
        """Whether it speaks of a module."""
        return re.fullmatch(self.pattern, module) is not None

    def grid(self, columns: int) -> tuple[int, int] | None:
        """Bits and group size for `columns` input channels (which it may not divide); None to stay float."""
        if self.bits in (None, "float"):
            return None
        bits = int(self.bits)
        if self.group_size == "auto":
            fits = bits == 4 and columns % DEFAULT_GROUP == 0
            return (4, DEFAULT_GROUP) if fits else (8, columns)
        return bits, columns if self.group_size == "channel" else int(self.group_size) or columns


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Rules of a TOML file with [[rule]] tables, in their order.

    Raises:
        BadFileError: missing or not TOML.
        RequestError: no rule, an unknown key or an unusable value; names the rule.
    """
    raw = read_toml(path, "file of rules", "check the path given to --rules")
    tables = raw.get("rule")
    if set(raw) != {"rule"} or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise RequestError(
            "The file of rules does not hold rules.",
            found=f"{path}: {', '.join(raw) or 'nothing'}",
            expected="[[rule]] tables with pattern, bits, group_size and symmetric, and nothing else",
        )
    return tuple(_rule(table, f"rule {i} of {path}") for i, table in enumerate(tables, 1))


def _rule(table: dict[str, Any], where: str) -> Rule:
    kinds: dict[str, type | tuple[type, ...]] = {
        "pattern": str,
        "bits": (int, str),
        "group_size": (int, str),
        "symmetric": bool,
    }
    known = [f.name for f in fields(Rule)]
    for key, value in table.items():
        kind = kinds.get(key)
        if kind is None or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RequestError(
                "A rule cannot be read.",
                found=f"{key} = {value!r} in {where}",
                expected='pattern = "...", bits = 4, 8 or "float", group_size = a number, "channel" or "auto", '
                "symmetric = true or false"
                if kind
                else "one of " + ", ".join(known),
            )
    if "pattern" not in table:
        raise RequestError("A rule names no modules.", found=where, expected='pattern = "a regular expression"')
    return Rule(**table)
