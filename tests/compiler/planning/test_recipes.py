"""Recipes: every recipe covers its relation exactly and can be read back from its text."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from attnc.compiler.planning.build_plan import Relations, build_plan
from attnc.compiler.planning.recipes import Recipe, alternatives, covered, read_recipe, recipes
from attnc.compiler.planning.schedule import CoverChoice, CoverProblem, choose
from plan_calls import call, from_library
from plan_checks import check_plan

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("causal", {}, 300),
    ("sliding_window", {"window": 40, "sinks": 3}, 333),
    ("dilated_window", {"window": 9, "dilation": 5}, 271),
    ("strided", {"stride": 16, "local": 24}, 260),
    ("power", {"window": 2, "block": 16}, 257),
    ("neighborhood_2d", {"height": 14, "width": 17, "window": 5}, 238),
]
ORDERS = {
    "causal": {"formula", "tiles", "dense", "whole"},
    "sliding_window": {"tiles", "dense", "whole"},
    "dilated_window": {"residues", "dense"},
    "strided": {"residues", "dense"},
    "power": {"tiles", "dense"},
    "neighborhood_2d": {"grid", "dense"},
}
"""Orders that must be among the recipes of the pattern."""


@pytest.mark.parametrize(("name", "params", "n"), CASES, ids=[case[0] for case in CASES])
def test_every_recipe_covers_the_relation(name: str, params: dict[str, Any], n: int) -> None:
    """Each recipe of a problem is a plan of exactly the visible pairs, and its text leads to the same cover."""
    pattern = from_library(name, **params)
    relations = Relations(pattern, call(n, n))
    problems: list[CoverProblem] = []

    def noted(problem: CoverProblem) -> CoverChoice:
        problems.append(problem)
        return choose(problem)

    build_plan(relations, noted)
    (problem,) = problems
    relation = relations.mask(0, 0, 0, n, 0, n)[None, None]
    recipe_list = list(recipes(problem))
    assert {recipe.order for recipe, _ in recipe_list} >= ORDERS[name]
    assert len({recipe for recipe, _ in recipe_list}) == len(recipe_list)
    for recipe, choice in recipe_list:
        assert read_recipe(str(recipe)) == recipe
        again = covered(problem, recipe)
        assert again is not None
        assert (again.cover.pieces, again.cost) == (choice.cover.pieces, choice.cost)
        check_plan(build_plan(relations, partial(_taken, choice)), relation)
    costs = [choice.cost for choice in alternatives(problem)]
    assert costs == sorted(costs)
    assert costs[0] <= choose(problem).cost


def _taken(choice: CoverChoice, problem: CoverProblem) -> CoverChoice:
    return choice


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tiles",
        "model",
        "tiles -1",
        "tiles 1e9",
        "tiles ٣",
        "tiles 64, other",
        "dense, full parts apart, x",
        "tiles 064",
    ],
)
def test_other_texts_are_not_recipes(text: str) -> None:
    recipe = read_recipe(text)
    assert recipe is None or (text == "tiles" and recipe == Recipe("tiles"))


def test_only_tile_sizes_of_the_model_are_accepted() -> None:
    """A table from another machine cannot ask for a million tiles."""
    problem = _problem(4096)
    for recipe in (Recipe("tiles"), Recipe("tiles", 1), Recipe("tiles", 12345), Recipe("tiles", 1 << 30)):
        assert covered(problem, recipe) is None
    assert covered(problem, Recipe("grid")) is None
    assert covered(problem, Recipe("residues")) is None
    assert covered(problem, Recipe("formula")) is None
    assert covered(problem, Recipe("whole")) is None  # 16 million pairs


def _problem(n: int) -> CoverProblem:
    problems: list[CoverProblem] = []

    def noted(problem: CoverProblem) -> CoverChoice:
        problems.append(problem)
        return choose(problem)

    build_plan(Relations(from_library("sliding_window", window=40, sinks=3), call(n, n)), noted)
    return problems[0]
