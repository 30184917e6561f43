"""Simulations of patterns whose branches have states: what they are of is one branch after another."""

from __future__ import annotations

from typing import Any

import pytest

from attnc import ArgumentError, compile_attention
from attnc.compiler.simulation.recurrent.recurrence_simulation import RUNGS, RecurrenceSimulation
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.cli import main
from attnc.runtime.simulating_states import WITH_STATES

SHAPE: dict[str, Any] = {"heads": 8, "head_dim": 128}
NEAR = """pattern near(window: int = 512)
    align   end
    visible 0 <= q - k < window
"""
FAR = """recurrence far
    input g: log_decay[batch, token, head]
    state S: [dk, dv]
    step  S = exp(g) * S + outer(k, v)
    read  scale * q @ S
"""


def simulated(spec: str, n: int, **more: Any) -> Simulation:
    return compile_attention(spec, **more.pop("params", {})).simulate(n, **SHAPE, **more)


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_branches_take_their_times_one_after_another(stage: Any) -> None:
    """A window beside a state is the window's time and the recurrence's."""
    both = simulated("hybrid_window_linear", 8192, stage=stage)
    near = simulated(NEAR, 8192, stage=stage)
    far = simulated(FAR, 8192, stage=stage)
    assert isinstance(far, RecurrenceSimulation)
    assert both.predicted_ms == pytest.approx(near.predicted_ms + far.predicted_ms)
    assert both.visible == near.visible
    assert both.flop == near.flop + far.flop
    assert both.ideal_ms / both.rung("attended").speedup == pytest.approx(near.predicted_ms)
    assert both.traffic.moved == near.traffic.moved + far.traffic.moved


def test_its_ladder() -> None:
    found = simulated("hybrid_window_linear", 4096)
    assert tuple(rung.name for rung in found.rungs) == WITH_STATES
    speedups = [rung.speedup for rung in found.rungs]
    assert speedups == sorted(speedups, reverse=True)
    assert found.rung("predicted").speedup == pytest.approx(found.ideal_ms / found.predicted_ms)
    text = str(found)
    assert "chunks of" in text
    assert "0×0" not in text
    assert all(rung.lost_to in text for rung in found.rungs)


def test_states_alone_are_a_recurrence() -> None:
    """Both directions of a mixer are twice one of them."""
    both = simulated("mamba_mixer", 4096)
    assert isinstance(both, RecurrenceSimulation)
    assert len(both.passes) == 2
    assert tuple(rung.name for rung in both.rungs) == RUNGS
    assert both.times[-1] == both.predicted_ms == pytest.approx(2 * both.passes[0].ms)


def test_branches_alike_are_shown_once() -> None:
    found = simulated("log_linear", 4096, params={"levels": 12})
    of_states = [choice for choice in found.choices if not choice.q_tile]
    assert len(of_states) == 1
    assert "of 12 branches" in found.rung("predicted").lost_to


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match="tile and order apply to pairs"):
        simulated("hybrid_window_linear", 4096, tile=(64, 64))
    with pytest.raises(ArgumentError, match="causal attention is not a valid baseline"):
        simulated("spatial_mamba", 64, params={"height": 8, "width": 8}, baseline="causal")


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "hybrid_window_linear", "--len", "4096"]) == 0
    assert "growth    not known, as a branch has a state" in capsys.readouterr().out
    assert main(["simulate", "hybrid_window_linear", "--len", "4096", "--slider", "window"]) == 2
    assert "has branches with a state" in capsys.readouterr().err
