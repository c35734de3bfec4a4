"""Which weight gets which grid: ordered rules over module names, the first that matches wins.

What no rule matches stays float, and `describe` says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nano.errors import RequestError
from nano.families import HEAD, linear_names, weight_shapes
from nano.shapes import ModelShape
from quantize.options import QuantizeOptions

CHANNEL = 0
"""As a rule's group size: one scale for the whole input width."""


@dataclass(frozen=True)
class Grid:
    """A symmetric integer grid.

    Attributes:
        bits: 4 or 8.
        group_size: input channels that share a scale.
    """

    bits: int
    group_size: int


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
        pattern: a regular expression that must match the whole module name.
        bits: 4, 8, or None to leave the module float.
        group_size: input channels that share a scale; `CHANNEL` means all of them.
    """

    pattern: str
    bits: int | None = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise RequestError("A rule's pattern is not a regular expression.", found=f"{self.pattern!r}: {error}") from None  # noqa: E501  # fmt: skip
        if self.bits not in (None, 4, 8) or self.group_size < 0:
            raise RequestError(
                "A rule asks for a grid that there is not.",
                found=f"bits {self.bits}, group size {self.group_size} for {self.pattern!r}",
                expected="bits 4, 8 or none; a group size of 0 (whole channel) or more",
            )


@dataclass(frozen=True)
class QuantRecipe:
    """Ordered rules; first match wins; without a match a module stays float."""

    rules: tuple[Rule, ...]

    def grid(self, module: str, columns: int) -> Grid | None:
        """The grid of a module with `columns` input channels, or None where it stays float."""
        for rule in self.rules:
            if re.fullmatch(rule.pattern, module):
                return None if rule.bits is None else Grid(rule.bits, rule.group_size or columns)
        return None

    def grids(self, shape: ModelShape) -> dict[str, Grid]:
        """The grid of every module that gets one, in the model's order."""
        found = {}
        for name, size in weight_shapes(shape).items():
            if len(size) == 2 and (grid := self.grid(name.removesuffix(".weight"), size[1])):
                found[name.removesuffix(".weight")] = grid
        return found

    def describe(self) -> list[dict[str, Any]]:
        """The rules as plain data, for a manifest."""
        return [asdict(rule) for rule in self.rules]


def default_recipe(options: QuantizeOptions) -> QuantRecipe:
    """Every decoder linear int4; embedding and head stay float."""
    return QuantRecipe((Rule(r"model\.layers\.\d+\..*_proj", 4, options.group_size),))


def check_grids(shape: ModelShape, grids: Mapping[str, Grid]) -> None:
    """Every group size divides its module's input channels.

    Raises:
        RequestError: names the first module that does not fit and what to do.
    """
    sizes = weight_shapes(shape)
    for module, grid in grids.items():
        columns = sizes[module + ".weight"][1]
        if columns % grid.group_size:
            fitting = [g for g in (32, 64, 128) if columns % g == 0]
            raise RequestError(
                "The group size does not divide a layer's width.",
                found=f"'{module}' has {columns} input channels, the group size is {grid.group_size}",
                expected="a group size that divides the model's hidden width and heads x head width "
                "(the feed-forward width alone is padded where needed)",
                todo=f"give --group-size {fitting[-1]}" if fitting else "use a model whose widths are multiples of 32",
            )


def targets(shape: ModelShape, grids: Mapping[str, Grid]) -> tuple[dict[tuple[int, int], list[str]], list[str]]:
    """compressed-tensors' view of the grids: targets by (bits, group size), and the modules left float.

    The usual case, all decoder linears on one grid, is said as "Linear"; else modules are listed by name.
    """
    linears = [*linear_names(shape), HEAD]
    ignored = [name for name in linears if name not in grids]
    kinds = {(grid.bits, grid.group_size) for grid in grids.values()}
    if len(kinds) == 1 and set(grids) <= set(linears):
        return {kinds.pop(): ["Linear"]}, ignored
    by_grid: dict[tuple[int, int], list[str]] = {}
    for module, grid in grids.items():
        by_grid.setdefault((grid.bits, grid.group_size), []).append(f"re:^{re.escape(module)}$")
    return by_grid, ignored


def float_modules(shape: ModelShape, grids: Iterable[str]) -> list[str]:
    """Matrices that stay float, for the report."""
    on_grid = set(grids)
    return [
        name.removesuffix(".weight")
        for name, size in weight_shapes(shape).items()
        if len(size) == 2 and name.removesuffix(".weight") not in on_grid
    ]
