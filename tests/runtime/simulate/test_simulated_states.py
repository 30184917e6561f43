"""Simulations of patterns whose branches have states: branches run one after another."""

from __future__ import annotations

from typing import Any

import pytest

from attnc import ArgumentError, compile_attention
from attnc.compiler.simulation.recurrent.recurrence_simulation import RUNGS, RecurrenceSimulation
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.cli import main
from attnc.runtime.simulate.simulating_states import WITH_STATES

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
def test_times_of_branches_add_up(stage: Any) -> None:
    """A window beside a state takes the time of the window plus that of the recurrence."""
    combined = simulated("hybrid_window_linear", 8192, stage=stage)
    near = simulated(NEAR, 8192, stage=stage)
    far = simulated(FAR, 8192, stage=stage)
    assert isinstance(far, RecurrenceSimulation)
    assert combined.predicted_ms == pytest.approx(near.predicted_ms + far.predicted_ms)
    assert combined.visible == near.visible
    assert combined.flop == near.flop + far.flop
    assert combined.ideal_ms / combined.rung("attended").speedup == pytest.approx(near.predicted_ms)
    assert combined.traffic.moved == near.traffic.moved + far.traffic.moved


def test_ladder() -> None:
    simulation = simulated("hybrid_window_linear", 4096)
    assert tuple(rung.name for rung in simulation.rungs) == WITH_STATES
    speedups = [rung.speedup for rung in simulation.rungs]
    assert speedups == sorted(speedups, reverse=True)
    assert simulation.rung("predicted").speedup == pytest.approx(simulation.ideal_ms / simulation.predicted_ms)
    text = str(simulation)
    assert "chunks of" in text
    assert "0×0" not in text
    assert all(rung.lost_to in text for rung in simulation.rungs)


def test_a_pattern_of_states_alone_is_a_recurrence() -> None:
    """A mixer with two directions takes twice the time of one direction."""
    combined = simulated("mamba_mixer", 4096)
    assert isinstance(combined, RecurrenceSimulation)
    assert len(combined.passes) == 2
    assert tuple(rung.name for rung in combined.rungs) == RUNGS
    assert combined.times[-1] == combined.predicted_ms == pytest.approx(2 * combined.passes[0].ms)


def test_equal_branches_are_shown_once() -> None:
    simulation = simulated("log_linear", 4096, params={"levels": 12})
    of_states = [choice for choice in simulation.choices if not choice.q_tile]
    assert len(of_states) == 1
    assert "of 12 branches" in simulation.rung("predicted").lost_to


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
