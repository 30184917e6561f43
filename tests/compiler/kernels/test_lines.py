"""Loops as kernel text: guarded loops, and loops whose turns run over all heads of a group."""

from __future__ import annotations

import textwrap

from hypothesis import example, given
from hypothesis import strategies as st

from attnc.compiler.kernels.key_gradients import turns_fit
from attnc.compiler.kernels.text_lines import SHIFT, Lines


def written(lines: Lines) -> str:
    with lines.loop("tile", "begin", "end"):
        lines.add("seen.append((head, tile))")
    return str(lines)


def test_a_loop() -> None:
    assert written(Lines()) == "for tile in range(begin, end):\n    seen.append((head, tile))\n"


def test_a_guarded_loop_stands_in_a_branch() -> None:
    expected = "if begin < end:\n    for tile in range(begin, end):\n        seen.append((head, tile))\n"
    assert written(Lines(guarded=True)) == expected


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.booleans())
def test_turns_visit_every_tile_of_every_head(begin: int, count: int, group: int, guarded: bool) -> None:
    """The emitted text is run as Python instead of Triton."""

    class Language:
        int32 = int64 = int

        @staticmethod
        def full(shape: tuple[int, ...], value: int, kind: type) -> int:
            return value

        maximum = staticmethod(max)

    text = written(Lines(guarded=guarded, turns=("head = member",))).replace(".to(tl.int32)", "")
    names = {"tl": Language, "begin": begin, "end": begin + count, "group": group, "seen": []}
    exec(textwrap.dedent(text), names)
    assert names["seen"] == [(head, begin + i) for head in range(group) for i in range(count)]


@given(st.integers(1, 1 << 26), st.integers(1, 1 << 10), st.data())
@example(1 << 21, 1 << 9, None)
def test_turns_are_divided_exactly(count: int, group: int, data: st.DataObject | None) -> None:
    if not turns_fit(group, 16 * count - 1):
        return
    turns = [0, count - 1, group * count - 1]
    if data is not None:
        turns.append(data.draw(st.integers(0, group * count - 1)))
    inverse = (1 << SHIFT) // count + 1
    for turn in turns:
        assert turn * inverse < 1 << 63
        assert turn * inverse >> SHIFT == turn // count


def test_the_limit_of_turns() -> None:
    assert turns_fit(8, 1 << 27)
    assert not turns_fit(8, 1 << 29)
