"""Which weight gets which grid: ordered rules over module names, the first that matches wins.

What no rule matches stays float, and `describe` says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nano.errors import RequestError
from nano.families import EMBEDDING, HEAD, linear_names, weight_shapes
from nano.shapes import ModelShape
from quantize.options import QuantizeOptions
from quantize.rules import CHANNEL, DEFAULT_GROUP
from quantize.rules import Rule as Rule

LAYERS = r"model\.layers\.\d+\..*_proj"
"""Every decoder linear."""


@dataclass(frozen=True)
class Grid:
    """An integer grid.

    Attributes:
        bits: 4 or 8.
        group_size: input channels that share a scale (and a zero point).
        symmetric: whether code 0 means 0.0; else each group has a zero point.
    """

    bits: int
    group_size: int
    symmetric: bool = True


@dataclass(frozen=True)
class QuantRecipe:
    """Ordered rules; first match wins; without a match a module stays float."""

    rules: tuple[Rule, ...]

    def grid(self, module: str, columns: int) -> Grid | None:
        """The grid of a module with `columns` input channels, or None where it stays float."""
        rule = self.rule(module)
        found = rule.grid(columns) if rule else None
        return Grid(*found, symmetric=rule.symmetric) if rule and found else None

    def rule(self, module: str) -> Rule | None:
        """The rule that decides about a module."""
        return next((rule for rule in self.rules if rule.matches(module)), None)

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


def default_recipe(options: QuantizeOptions, tied: bool = True) -> QuantRecipe:
    """The rules of the options: those of their own first, then every decoder linear int4, embedding and head.

    Raises:
        RequestError: the embedding and a tied head are asked to differ.
    """
    symmetric = options.symmetry == "symmetric"
    rules = [*options.rules, Rule(LAYERS, 4, options.group_size, symmetric)]
    if tied and options.head not in ("auto", options.embedding):
        raise RequestError(
            "This model's head is its embedding, and they are asked to differ.",
            found=f"--embedding {options.embedding} and --head {options.head}",
            expected="one and the same for both",
            todo=f"leave --head out, or say --embedding {options.head}",
        )
    for module, wish in ((EMBEDDING, options.embedding), (HEAD, options.head)):
        if wish in ("int4", "int8"):
            # phones multiply 8 bits by whole rows only
            rules.append(Rule(re.escape(module), int(wish[3:]), "channel" if wish == "int8" else options.group_size))
    return QuantRecipe(tuple(rules))


def padding_multiple(shape: ModelShape, recipe: QuantRecipe) -> int:
    """What the feed-forward width must be a multiple of, for every grid along it to fit; 1 where all stay float."""
    multiple = 1
    for name in linear_names(shape):
        rule = recipe.rule(name) if name.endswith("down_proj") else None
        if rule is not None and rule.bits in (4, 8):
            size = rule.group_size
            multiple = math.lcm(multiple, size if isinstance(size, int) and size != CHANNEL else DEFAULT_GROUP)
    return multiple


def check_rules(shape: ModelShape, recipe: QuantRecipe, own: tuple[Rule, ...]) -> list[str]:
    """Find rules without effect and widths that "auto" gives another group than usual.

    Args:
        shape: the model's dimensions, padded.
        recipe: all rules.
        own: those that somebody wrote, as opposed to those that the options make.

    Returns:
        Sentences that the user should read.

    Raises:
        RequestError: a rule matches no module of this model.
    """
    modules = {n.removesuffix(".weight"): s[1] for n, s in weight_shapes(shape).items() if len(s) == 2}
    words = []
    for rule in own:
        if not any(rule.matches(module) for module in modules):
            raise RequestError(
                "A rule matches nothing in this model.",
                found=repr(rule.pattern),
                expected=f"the whole name of a module, such as {', '.join(list(modules)[:3])}"
                + (f" ({HEAD} is {EMBEDDING} here: they are tied)" if shape.tied else ""),
                todo="correct its pattern, or take the rule out",
            )
        if all(recipe.rule(module) is not rule for module in modules):
            words.append(f"the rule for {rule.pattern!r} has no effect: rules before it decide about all it matches")
    odd: dict[int, list[str]] = {}
    for module, columns in modules.items():
        decided = recipe.rule(module)
        if decided and decided.bits == 4 and decided.group_size == "auto" and columns % DEFAULT_GROUP:
            odd.setdefault(columns, []).append(module)
    for columns, names in odd.items():
        words.append(
            f"{len(names)} modules such as '{names[0]}' have {columns} input channels, which groups of "
            f"{DEFAULT_GROUP} do not divide: they get 8 bits with one scale a row, which phone kernels take"
        )
    return words


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


Scheme = tuple[int, int, bool]
"""Bits, group size (`CHANNEL`: one scale a row) and symmetry, as compressed-tensors' config groups tell them apart."""


def targets(shape: ModelShape, grids: Mapping[str, Grid]) -> tuple[dict[Scheme, list[str]], list[str]]:
    """compressed-tensors' view of the grids: targets by scheme, and the modules left float.

    The usual case, all decoder linears on one grid, is said as "Linear"; else modules are listed by name. The
    embedding is left out: it is stored dense (see `quantize.packed`).
    """
    sizes = weight_shapes(shape)
    by_scheme: dict[Scheme, list[str]] = {}
    for module, grid in grids.items():
        if module != EMBEDDING:
            by_row = grid.group_size == sizes[module + ".weight"][1]
            scheme = (grid.bits, CHANNEL if by_row else grid.group_size, grid.symmetric)
            by_scheme.setdefault(scheme, []).append(f"re:^{re.escape(module)}$")
    ignored = [name for name in [*linear_names(shape), HEAD] if name not in grids]
    if len(by_scheme) == 1:
        return {scheme: ["Linear"] for scheme in by_scheme}, ignored
    return by_scheme, ignored


def float_modules(shape: ModelShape, grids: Iterable[str]) -> list[str]:
    """Matrices that stay float, for the report."""
    on_grid = set(grids)
    return [
        name.removesuffix(".weight")
        for name, size in weight_shapes(shape).items()
        if len(size) == 2 and name.removesuffix(".weight") not in on_grid
    ]
