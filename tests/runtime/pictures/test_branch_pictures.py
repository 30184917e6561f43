"""Pictures of patterns with states, one drawing per branch: visible pairs, and how much of a token's value is left."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from attnc import compile_attention
from attnc.runtime.call.call_errors import ArgumentError
from attnc.runtime.pictures.branch_svg import branches_svg
from attnc.runtime.pictures.branch_views import BranchesDrawing
from attnc.runtime.pictures.branches import make_branches
from attnc.runtime.pictures.terminal_text import branches_text
from command_calls import run

HALVES = "recurrence halves\n    state S: [dk, dv]\n    step S = S / 2 + outer(k, v)\n    read q @ S\n"
BACK = HALVES.replace("    state", "    scan -t\n    state").replace("halves", "back")


def drawing_of(spec: str, n: int, **params: object) -> BranchesDrawing:
    return make_branches(compile_attention(spec, **params), n, n, {})  # type: ignore[arg-type]


def test_a_decay_is_drawn_exactly() -> None:
    """The state halves at every token: 1/2^distance of a value is left, and nothing of later tokens."""
    (view,) = drawing_of(HALVES, 12).views
    assert view.shares is not None
    q, k = np.arange(12)[:, None], np.arange(12)[None]
    np.testing.assert_allclose(view.shares, np.where(q >= k, 0.5 ** np.maximum(q - k, 0), 0), atol=1e-6)
    np.testing.assert_allclose(view.left, 0.5 ** np.arange(12), atol=1e-6)
    assert view.visible is None
    assert view.words[1:] == ("derivation:", *compile_attention(HALVES).derivation().splitlines())


def test_a_backward_scan_is_drawn_above_the_diagonal() -> None:
    (view,) = drawing_of(BACK, 8).views
    (forward,) = drawing_of(HALVES, 8).views
    assert view.shares is not None and forward.shares is not None
    np.testing.assert_allclose(view.shares, forward.shares.T, atol=1e-6)


def test_long_sequences_are_drawn_in_larger_cells() -> None:
    (view,) = drawing_of(HALVES, 130).views
    assert view.cell == 3 and view.shares is not None and view.shares.shape == (44, 44)
    assert view.words[0] == "less than half of a token's value is left after 3 tokens"


def test_a_window_beside_a_state() -> None:
    drawing = drawing_of("hybrid_window_linear", 24, window=5)
    near, far = drawing.views
    window_mask = compile_attention("sliding_window", window=5).mask(24)
    assert (near.name, far.name) == ("near", "far")
    assert near.shares is not None and torch.equal(torch.from_numpy(near.shares > 0), window_mask)
    assert near.visible == int(window_mask.sum())
    assert "    S[dk, dv]: a scalar decay" in branches_text(drawing)
    drawn_text = branches_text(drawing, 100)
    assert "near: visible share" in drawn_text.splitlines()[3] and "far: share left" in drawn_text.splitlines()[3]
    assert max(map(len, branches_text(drawing, 40).splitlines()[3:20])) <= 40
    branches_text(drawing, unicode=False).encode("ascii")


@pytest.mark.parametrize(
    ("spec", "params"),
    [
        ("gla", {}),
        ("delta_net", {}),
        ("mamba_mixer", {}),
        ("memora_linear", {}),
        ("spatial_mamba", {"height": 3, "width": 4}),
    ],
)
def test_states_of_the_library(spec: str, params: dict[str, object]) -> None:
    """Every state is drawn as an SVG: with and without a derivation, forward and backward, and on a grid."""
    drawing = drawing_of(spec, 12, **params)
    assert all(view.shares is not None and view.shares.max() > 0 for view in drawing.views)
    ElementTree.fromstring(branches_svg(drawing))


@pytest.mark.parametrize("spec", ["hybrid_window_linear", "retention", "mamba_mixer"])
def test_texts_stay_inside_the_picture(spec: str) -> None:
    """No text is cut off: lines wrap, and each line of a derivation keeps its indentation."""
    drawing = drawing_of(spec, 12)
    root = ElementTree.fromstring(branches_svg(drawing))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        em = 0.61 if text.get("class") == "code ink" else 0.5
        end = float(text.get("x", 0)) + em * float(text.get("font-size", 0)) * len(text.text or "")
        assert end <= float(root.get("width", 0)) - 8, text.text
    shown = " ".join(" ".join(text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")).split())
    for view in drawing.views:
        assert all(" ".join(line.split()) in shown for line in view.words)
    last = drawing.views[-1].words[-2]
    indent = len(last) - len(last.lstrip())
    starts = {text.text: float(text.get("x", 0)) for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert indent and starts[last.strip()] - starts["derivation:"] == pytest.approx(indent * 0.61 * 11, abs=1e-2)


def test_the_show_command(tmp_path: Path) -> None:
    done = run("show", "hybrid_window_linear", "-p", "window=8", "--len", "16")
    assert done.status == 0 and "far: share left" in done.out and "a scalar decay" in done.out
    path = tmp_path / "far.svg"
    done = run("show", "hybrid_window_linear", "-p", "window=8", "--len", "16", "-o", str(path))
    assert done.status == 0 and done.out.startswith(f"{path}: near: ")
    texts = [x.text for x in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert "near" in texts and "far" in texts and "derivation:" in texts
    done = run("show", "gla", "--len", "16", "--json")
    (branch,) = json.loads(done.out)["branches"]
    assert done.status == 0 and branch["state"] and len(branch["left"]) == 16
    attend = compile_attention("gla")
    assert attend.picture(16) == branches_svg(make_branches(attend, 16, 16, {}))


def test_refused_drawings() -> None:
    with pytest.raises(ArgumentError, match="12 queries and 9 keys: a picture of a state needs as many"):
        make_branches(compile_attention("gla"), 12, 9, {})
    with pytest.raises(ArgumentError, match=r"would need 1\.94 GiB for the values alone, and the limit is 256 MiB"):
        drawing_of("gla", 500_000)
    with pytest.raises(ArgumentError, match="drawn pair by pair, up to 16,777,216 pairs"):
        drawing_of("hybrid_window_linear", 5000)
