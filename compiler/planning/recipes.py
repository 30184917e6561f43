"""Recipes: named ways to cover a relation, which tuning tries besides the cost model's choice and stores as text."""

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
    tile_sizes,
    with_halves,
)

Order = Literal["formula", "grid", "residues", "tiles", "whole", "dense"]
BRICKS = 5
"""Number of shapes of bricks that are tried."""

_ORDERS: tuple[str, ...] = get_args(Order)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to cover a relation: the order of tokens and the side of tiles.

    `order`: "whole" is one tile of everything. `tile`: the side of tiles; for "grid" the rank of the bricks in the cost
    model, 0 the cheapest. `apart`: whether full parts of masked stretches are split off. `halves`: whether short
    triangles are split in two.
    """

    order: Order
    tile: int = 0
    apart: bool = False
    halves: bool = False

    def __str__(self) -> str:
        tile = f" {self.tile}" if self.tile else ""
        return f"{self.order}{tile}{', full parts apart' * self.apart}{', triangles in halves' * self.halves}"


def read_recipe(text: str) -> Recipe | None:
    """Return the recipe whose text this is, None for any other text."""
    head, *options = text.split(", ")
    order, _, tile = head.partition(" ")
    if order not in _ORDERS or (tile and not (tile.isascii() and tile.isdigit() and len(tile) < 10)):
        return None
    recipe = Recipe(
        cast("Order", order), int(tile or 0), "full parts apart" in options, "triangles in halves" in options
    )
    return recipe if str(recipe) == text else None


def covered(problem: CoverProblem, recipe: Recipe) -> CoverChoice | None:
    """Return the cover of a relation by a recipe, None if the recipe does not apply."""
    if recipe.halves:
        undivided = covered(problem, replace(recipe, halves=False))
        return None if undivided is None else with_halves(problem, undivided)
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
            covers = [] if tile is None else by_tiles(problem, tile, [])
            return covers[recipe.apart] if len(covers) > recipe.apart else None


def _side(problem: CoverProblem, recipe: Recipe) -> int | None:
    """Return the side of a recipe's tiles, None if the cost model would not try it either."""
    if recipe.order == "whole":
        return max(problem.n_q, problem.n_k, 1) if problem.n_q * problem.n_k <= SMALL else None
    return recipe.tile if recipe.tile in tile_sizes(problem) else None


def recipes(problem: CoverProblem) -> Iterator[tuple[Recipe, CoverChoice]]:
    """Yield every cover of a relation that some recipe gives, with its recipe."""
    plain = [Recipe(order) for order in ("formula", "residues", "dense")]
    plain += [Recipe("grid", rank) for rank in range(BRICKS)] if reads_coordinates(problem.relation) else []
    whole_side = _side(problem, Recipe("whole"))
    for tile in tile_sizes(problem):
        tile_recipe = Recipe("whole") if tile == whole_side else Recipe("tiles", tile)
        plain += [tile_recipe, replace(tile_recipe, apart=True)]
    for recipe in plain:
        choice = covered(problem, recipe)
        if choice is None:
            continue
        yield recipe, choice
        halves = with_halves(problem, choice)
        if halves is not None:
            yield replace(recipe, halves=True), halves


def alternatives(problem: CoverProblem) -> list[CoverChoice]:
    """Return all covers of a relation, the cheapest first; `choose` stops earlier, at the first good cover."""
    return sorted((choice for _, choice in recipes(problem)), key=lambda choice: choice.cost)
