"""Tile maps: tile states agree with the relation, in natural order and in bricks, at any length."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from attnc import ArgumentError, UnsupportedError, compile_attention
from attnc.runtime.api.attention import Attention
from attnc.runtime.cli import main
from attnc.runtime.commands.analysed import analyse
from attnc.runtime.pictures.draw import make_drawing
from attnc.runtime.pictures.drawing import EMPTY, FULL, PARTIAL
from attnc.runtime.pictures.terminal_text import tile_map_text
from attnc.runtime.pictures.tile_map import ACROSS, make_tile_map
from attnc.runtime.pictures.tile_svg import tile_map_svg


def states(mask: NDArray[np.bool_], tile: int) -> NDArray[np.int8]:
    """Return the tile states of a mask."""
    state_of_tile = np.zeros((-(-mask.shape[0] // tile), -(-mask.shape[1] // tile)), dtype=np.int8)
    for row, column in np.ndindex(state_of_tile.shape):
        part = mask[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile]
        state_of_tile[row, column] = FULL if part.all() else PARTIAL if part.any() else EMPTY
    return state_of_tile


def brick_states(
    mask: NDArray[np.bool_], grid: tuple[int, ...], q_brick: tuple[int, ...], k_brick: tuple[int, ...]
) -> NDArray[np.int8]:
    """Return the brick states of a mask over a grid of tokens; bricks are numbered row by row."""

    def brick_of(brick: tuple[int, ...]) -> NDArray[np.int64]:
        coordinates = np.stack(np.unravel_index(np.arange(prod(grid)), grid))
        counts = tuple(-(-n // side) for n, side in zip(grid, brick, strict=True))
        state_of_brick = np.ravel_multi_index(
            tuple(x // side for x, side in zip(coordinates, brick, strict=True)), counts
        )
        return np.asarray(state_of_brick, dtype=np.int64)

    rows, columns = brick_of(q_brick), brick_of(k_brick)
    state_of_brick = np.zeros((rows.max() + 1, columns.max() + 1), dtype=np.int8)
    for row, column in np.ndindex(state_of_brick.shape):
        part = mask[np.ix_(rows == row, columns == column)]
        state_of_brick[row, column] = FULL if part.all() else PARTIAL if part.any() else EMPTY
    return state_of_brick


@pytest.mark.parametrize(
    ("name", "params", "n_q", "n_k"),
    [
        ("sliding_window", {"window": 300, "sinks": 5}, 2500, 2500),
        ("strided", {"stride": 96, "local": 50}, 1300, 1300),
        ("power", {"window": 2, "block": 64}, 1100, 1700),
        ("document", {}, 1500, 1500),
        ("differential", {}, 1200, 1200),
    ],
)
def test_natural_order(name: str, params: dict[str, Any], n_q: int, n_k: int) -> None:
    attention = compile_attention(name, **params)
    tile_map = make_tile_map(attention, n_q, n_k, tile=64)
    (view,) = tile_map.views
    drawing = make_drawing(attention, n_q, n_k, tile=64)
    assert np.array_equal(view.states, drawing.tiles)
    if name != "document":
        mask = attention.mask(n_q, n_k).numpy()
        assert np.array_equal(view.states, states(mask, 64))


@pytest.mark.parametrize(
    ("height", "width", "params"),
    [(24, 36, {"window": 7}), (20, 30, {"window": [6, 9], "stride": [2, 3]}), (17, 23, {"window": 5, "causal": True})],
)
def test_bricks_follow_the_grid(height: int, width: int, params: dict[str, Any]) -> None:
    attention = compile_attention("neighborhood_2d", height=height, width=width, **params)
    n = height * width
    natural, bricks = make_tile_map(attention, n, n, tile=32).views
    mask = attention.mask(n).numpy()
    assert np.array_equal(natural.states, states(mask, 32))
    order = bricks.order
    assert np.array_equal(bricks.states, brick_states(mask, (height, width), order.q_brick, order.k_brick))
    assert bricks.live < natural.live


def test_the_map_of_a_video_agrees_with_the_ladder() -> None:
    attention = compile_attention("neighborhood_3d", preset="cosmos")
    n = 16 * 44 * 80
    view = make_tile_map(attention, n, n, tile=128).views[-1]
    tiles = attention.simulate(n, heads=1, tile=(128, 128), order="bricks").tiles
    assert (view.states.size, view.live, view.count(FULL)) == (tiles.total, tiles.live, tiles.full)


def test_more_tiles_than_squares_are_merged() -> None:
    view = make_tile_map(compile_attention("sliding_window", window=4096), 1 << 16, 1 << 16, tile=128).views[0]
    live, full = view.shares()
    assert view.factor == 4 and live.shape == (ACROSS, ACROSS)
    assert round(live.sum() * 16) == view.live and round(full.sum() * 16) == view.count(FULL)


def test_maps_of_several_attentions_are_limited_to_counted_pairs() -> None:
    attention = compile_attention("differential")
    assert make_drawing(attention, 2048, 2048).visible == 2048 * 2049 // 2
    with pytest.raises(ArgumentError, match="drawn pair by pair"):
        make_tile_map(attention, 8192, 8192)


def test_keys_other_than_tokens_have_no_map() -> None:
    with pytest.raises(ArgumentError, match="not tokens"):
        make_tile_map(compile_attention("combiner", segment=8), 64, 64)


# --- printed maps ----------------------------------------------------------------------------------------------------


def window() -> Attention:
    return compile_attention("sliding_window", window=24, sinks=2)


def test_svg_is_complete_and_shows_the_counts() -> None:
    tile_map = make_tile_map(window(), 64, 64, tile=16)
    svg = tile_map_svg(tile_map)
    assert svg == tile_map_svg(make_tile_map(window(), 64, 64, tile=16))
    texts = " ".join("".join(e.itertext()) for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"))
    assert "each square: a tile of 16 × 16 pairs" in texts and tile_map.views[0].tiles_text in texts


def test_text() -> None:
    assert tile_map_text(make_tile_map(window(), 64, 64, tile=16), unicode=False) == (
        "sliding_window\n"
        "64 queries x 64 keys - window = 24 - sinks = 2\n"
        "\n"
        "tokens in natural order: tiles of 16 x 16 pairs\n"
        "++......\n"
        "++++....\n"
        "++++++..\n"
        "++++++++\n"
        "10 of 16 tiles live (62.5 %): 0 full, 10 partial\n"
        "\n"
        "## full  ++ partial  .. empty"
    )


def test_show_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "causal", "--tiles", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    (order,) = values["orders"]
    assert values["queries"] == 16384
    assert order == {"order": "natural order", "tile": 128, "total": 16384, "live": 8256, "full": 8128, "partial": 128}
    out = tmp_path / "tiles.svg"
    assert main(["show", "causal", "--tiles", "--len", "512", "-o", str(out)]) == 0
    assert "36 of 64 tiles live" in out.read_text(encoding="utf-8")
    assert "36 of 64 tiles live" in capsys.readouterr().out


def test_the_text_distinguishes_bricks_from_natural_order() -> None:
    """Squares that stand for several tiles are as dark as the share of their tiles that is live."""
    attend = compile_attention("neighborhood_2d", height=64, width=64, window=[16, 16])
    tile_map = make_tile_map(attend, 4096, 4096, tile=64)
    text = tile_map_text(tile_map)
    natural, bricks = (text.split(f"{order}: each square 2 × 2 tiles")[1] for order in ("natural order", "8×8 keys"))
    dark = [part.split(" tiles live")[0].count("▓") for part in (natural, bricks)]
    live = [part.split(" tiles live")[0].count("░") for part in (natural, bricks)]
    assert dark[0] > 500 > dark[1] > 0 and live[1] > 0
    live_share, _ = tile_map.views[0].shares(2)
    first = natural.splitlines()[1]
    assert [first[2 * i] != "·" for i in range(32)] == (live_share[0] > 0).tolist()
    assert "██ all tiles full; of the tiles are live: ░░ up to a third" in text
    tile_map_text(tile_map, unicode=False).encode("ascii")


@pytest.mark.parametrize("n", [256, 2048])
def test_a_branch_beside_a_state_has_no_map(n: int) -> None:
    """Checked at lengths whose pairs are counted from the plan and at lengths whose mask is counted."""
    for pattern in (compile_attention("hybrid_window_linear"), analyse("hybrid_window_linear", {}, None)):
        with pytest.raises(UnsupportedError, match="has a branch with a state, `far`, which has no mask"):
            make_tile_map(pattern, n, n)
