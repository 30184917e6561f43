"""Goals say ahead, behind or not measured here, of rows that are made up."""

from __future__ import annotations

import math
from dataclasses import replace

import all_goals
import causes
import goals
import measures
import pytest
import suites
from benchmark_part import Row
from goals import Goal, How, combined, shown, verdict

SPEED = Goal("speed", "cpu", "plan", "times theirs", 1.5, 1.0, True, "×", "here", ("cpu-plan",), measures.over("dense"))


def _row(key: str, ours: float, theirs: float, **more: object) -> Row:
    times = {name: {"median": x, "low": x, "high": x, "rounds": 1} for name, x in (("attnc", ours), ("dense", theirs))}
    return {"key": key, "ms": times, **more}


ROWS = {"cpu-plan": [_row("a", 1, 4), _row("b", 1, 1)], "cpu-dense": [_row("not looked at", 1, 0.01)]}


def test_ahead_with_the_rows_that_are_behind() -> None:
    found = verdict(SPEED, ROWS, lambda goal, one: f"why of {one.label}")
    assert (found.word, found.count) == ("ahead", 2)
    assert found.value == pytest.approx(2.0)
    assert [(one.label, one.value, one.why) for one in found.behind] == [("b", 1.0, "why of b")]


def test_behind() -> None:
    found = verdict(replace(SPEED, how="least"), ROWS, causes.why)
    assert (found.word, found.value) == ("behind", 1.0)
    assert "behind: 1× (least of 2), asked ≥ 1.5×" in found.line()


def test_not_measured() -> None:
    found = verdict(SPEED, {"cpu-dense": ROWS["cpu-dense"]}, causes.why)
    assert (found.word, found.value, found.count, found.behind) == ("not measured here", None, 0, ())


def test_a_wrong_result_is_behind_however_fast() -> None:
    rows = {"cpu-plan": [_row("a", 1, 400), _row("b", 1, 400, ok=False)]}
    found = verdict(SPEED, rows, causes.why)
    assert found.word == "behind"
    assert found.wrong == ("cpu-plan: b",)
    assert found.count == 1


def test_at_most() -> None:
    goal = replace(SPEED, least=False, target=2.0, how="most")
    assert verdict(goal, ROWS, causes.why).word == "behind"
    assert [one.label for one in verdict(goal, ROWS, causes.why).behind] == ["a"]
    assert verdict(replace(goal, target=4.0), ROWS, causes.why).word == "ahead"


VALUES = [1.0, 2.0, 4.0, 8.0]
COMBINED: dict[How, float] = {
    "geometric mean": 2**1.5,
    "median": 3.0,
    "least": 1.0,
    "most": 8.0,
    "95th percentile": 8.0,
}


@pytest.mark.parametrize(("how", "value"), COMBINED.items())
def test_combined(how: How, value: float) -> None:
    assert combined(how, VALUES) == pytest.approx(value)


def test_shares_and_single_values() -> None:
    assert combined("share", [1, 0, 1, 1]) == 75
    assert combined("one value", [3.0]) == 3
    with pytest.raises(ValueError, match="too many"):
        combined("one value", [3.0, 4.0])
    goal = replace(SPEED, how="share", target=90.0, read=measures.each(lambda row: float(row["key"] == "a")))
    found = verdict(goal, ROWS, causes.why)
    assert (found.value, [one.label for one in found.behind]) == (50, ["b"])


def test_every_goal_is_read_from_parts_that_exist() -> None:
    found = all_goals.GOALS
    assert len({(goal.where, goal.key) for goal in found}) == len(found)
    for goal in found:
        places = {suites.find(part)[0] for part in goal.parts}
        assert places == {goal.where}, goal.key
        assert goal.suite in {suites.find(part)[1].suite for part in goal.parts}, goal.key
        assert goal.floor is None or (goal.floor <= goal.target) == goal.least, goal.key
        assert verdict(goal, {}, causes.why).word == "not measured here", goal.key


def test_every_suite_of_a_cpu_has_a_goal() -> None:
    assert {goal.suite for goal in all_goals.GOALS if goal.where == "cpu"} == set(suites.SUITES) - {"correct"}


def test_kendall() -> None:
    rising = [(float(i), float(i * i)) for i in range(1, 6)]
    assert measures.kendall(rising) == 1
    assert measures.kendall([(x, -y) for x, y in rising]) == -1
    assert measures.kendall([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)
    assert measures.kendall([(1, 1), (1, 2)]) is None


def test_break_even() -> None:
    assert measures.break_even([(1000, 0.5), (4000, 2.0)]) == pytest.approx(2000)
    assert measures.break_even([(1000, 1.5), (4000, 2.0)]) == 1000
    assert measures.break_even([(1000, 1.5), (4000, 0.5)]) == math.inf
    assert measures.break_even([(1000, 2.0), (2000, 0.5), (8000, 2.0)]) == pytest.approx(4000)
    assert measures.break_even([]) is None


def test_shown() -> None:
    told = [shown(1.234, "×"), shown(12345.6, "ms"), shown(0.5, "%"), shown(3, ""), shown(math.inf, "tokens")]
    assert told == ["1.23×", "12,346 ms", "0.5 %", "3", "none"]


def test_causes_are_tried_in_order() -> None:
    row = _row("window 512 n=4096 d=64 bfloat16 forward", 2, 1, pattern="window 512", n=4096, dtype="bfloat16")
    found = goals.Measurement(row["key"], 0.5, row)
    assert causes.why(replace(SPEED, key="G9.flex.bf16"), found) != causes.UNKNOWN
    assert causes.why(replace(SPEED, key="no such goal"), goals.Measurement("nothing", 0.5)) == causes.UNKNOWN
