"""Ways to cover a relation, by name: what may be tried beside the model's first choice, and asked for again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from attnc.compiler.planning.grids import reads_coordinates
from attnc.compiler.planning.schedule import (
    SMALL,
    CoverChoice,
    CoverProblem,
    by_formula,
    by_grid,
    by_residues,
    by_tiles,
    dense_choice,
    halved,
    tile_sizes,
)

Order = Literal["formula", "grid", "residues", "tiles", "whole", "dense"]
BRICKS = 5
"""Shapes of bricks that are tried."""

_ORDERS: tuple[str, ...] = get_args(Order)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a relation is covered: in which order of tokens, with tiles of which side; "whole": one tile for all; of a
    grid `tile` is the place of its bricks among those that the cost model likes, the best first.

    `apart`: full parts of masked stretches by themselves; `halves`: short triangles in two.
    """

    order: Order
    tile: int = 0
    apart: bool = False
    halves: bool = False

    def __str__(self) -> str:
        tile = f" {self.tile}" if self.tile else ""
        return f"{self.order}{tile}{', full parts apart' * self.apart}{', triangles in halves' * self.halves}"


def read_recipe(text: str) -> Recipe | None:
    """The recipe that is written so, None for any other text."""
    head, *more = text.split(", ")
    order, _, tile = head.partition(" ")
    if order not in _ORDERS or (tile and not (tile.isascii() and tile.isdigit() and len(tile) < 10)):
        return None
    found = Recipe(cast("Order", order), int(tile or 0), "full parts apart" in more, "triangles in halves" in more)
    return found if str(found) == text else None


def covered(problem: CoverProblem, recipe: Recipe) -> CoverChoice | None:
    """The cover of a relation by a recipe; None where it has none."""
    if recipe.halves:
        whole = covered(problem, replace(recipe, halves=False))
        return None if whole is None else halved(problem, whole)
    match recipe.order:
        case "formula":
            return by_formula(problem)
        case "grid":
            return by_grid(problem, recipe.tile) if recipe.tile < BRICKS else None
        case "residues":
            return by_residues(problem)
        case "dense":
            return dense_choice(problem)
        case "tiles" | "whole":
            tile = _side(problem, recipe)
            found = [] if tile is None else by_tiles(problem, tile, [])
            return found[recipe.apart] if len(found) > recipe.apart else None


def _side(problem: CoverProblem, recipe: Recipe) -> int | None:
    """The side of tiles; None for one that the model would not look at either."""
    if recipe.order == "whole":
        return max(problem.n_q, problem.n_k, 1) if problem.n_q * problem.n_k <= SMALL else None
    return recipe.tile if recipe.tile in tile_sizes(problem) else None


def recipes(problem: CoverProblem) -> Iterator[tuple[Recipe, CoverChoice]]:
    """Every cover of a relation that there is, with its recipe."""
    plain = [Recipe(order) for order in ("formula", "residues", "dense")]
    plain += [Recipe("grid", rank) for rank in range(BRICKS)] if reads_coordinates(problem.relation) else []
    one = _side(problem, Recipe("whole"))
    for tile in tile_sizes(problem):
        own = Recipe("whole") if tile == one else Recipe("tiles", tile)
        plain += [own, replace(own, apart=True)]
    for recipe in plain:
        choice = covered(problem, recipe)
        if choice is None:
            continue
        yield recipe, choice
        halves = halved(problem, choice)
        if halves is not None:
            yield replace(recipe, halves=True), halves


def alternatives(problem: CoverProblem) -> list[CoverChoice]:
    """Every cover that there is of a relation, the cheapest first, where `choose` stops once it has a good one."""
    return sorted((choice for _, choice in recipes(problem)), key=lambda choice: choice.cost)
