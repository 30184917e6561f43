"""A stop of the sliders, with its simulation."""

from __future__ import annotations

from dataclasses import dataclass

from attnc.compiler.simulation.print_simulation import count, ms, size, times
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.pictures.drawing import Drawing, percent
from attnc.runtime.report.markup import SliderFrame
from attnc.spec.meaning.parameter_values import shown
from attnc.spec.program import Value


@dataclass(frozen=True)
class ReportPoint:
    """A simulation at a length and a value of the parameter that the report varies (None: no parameter varies).

    `drawing`: the picture whose tiles are shown at this point, at its length or a shorter one.
    """

    length: int
    value: int | None
    simulation: Simulation
    drawing: Drawing | None = None

    @property
    def place(self) -> tuple[int, int]:
        """The key of the point in the table; without a parameter, its value counts as 0."""
        return self.length, self.value or 0


def point_of(simulation: Simulation, drawing: Drawing | None, parameter: str | None) -> ReportPoint:
    """Return the point of a simulation, whose length and value come from the simulation itself."""
    value = simulation.params.get(parameter) if parameter is not None else None
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    return ReportPoint(length_of(simulation), number, simulation, drawing)


def length_of(simulation: Simulation) -> int:
    """Return the number of tokens of a call; in decoding, the number of tokens in the cache."""
    shape = simulation.shape
    return shape.n_k if simulation.stage == "decode" else shape.n_q


def parameters_text(simulation: Simulation) -> str:
    """Return the parameters as text, such as `window = 64`."""
    return ", ".join(f"{name} = {_value_text(value)}" for name, value in simulation.params.items())


def _value_text(value: Value) -> str:
    # Simulations hold values of the language; any other value, in a simulation made by hand, is written as it is.
    return shown(value) or str(value)


def size_text(simulation: Simulation) -> str:
    """Return the tokens, batch size, heads and dtype as text."""
    shape = simulation.shape
    tokens = f"{shape.n_q:,} tokens" if shape.n_q == shape.n_k else f"{shape.n_q:,} queries, {shape.n_k:,} keys"
    heads = f"{shape.heads} heads" if shape.heads == shape.kv_heads else f"{shape.heads}/{shape.kv_heads} heads"
    sides = f"{shape.dk}" if shape.dk == shape.dv else f"{shape.dk} and {shape.dv}"
    return f"{tokens}, batch {shape.batch}, {heads} of {sides}, {shape.dtype}"


def rival(simulation: Simulation) -> str:
    """Return the name of the rival of a simulation."""
    return "dense" if simulation.baseline == "full" else "causal dense"


def density_text(simulation: Simulation) -> str:
    """Return the visible share of all pairs as text."""
    return "not counted" if simulation.density is None else percent(simulation.density)


def facts_frame(simulation: Simulation) -> SliderFrame:
    """Return the numbers at the head of the page."""
    dense, moved = rival(simulation), simulation.traffic
    params = parameters_text(simulation)
    visible = "of all pairs" if simulation.visible is None else f"{simulation.visible:,} pairs"
    return SliderFrame(
        {
            "subject": f"{size_text(simulation)}{' · ' + params if params else ''}",
            "time": ms(simulation.predicted_ms),
            "time-beside": f"{dense} attention {ms(simulation.dense_ms)}",
            "speedup": times(simulation.speedup),
            "speedup-beside": f"{dense} at its ideal {ms(simulation.ideal_ms)}",
            "bound": times(simulation.rung("element").speedup),
            "bound-beside": f"tile bound {times(simulation.rung('tile').speedup)}",
            "density": density_text(simulation),
            "density-beside": visible,
            "moved": size(moved.moved),
            "moved-beside": f"{size(moved.least)} at least, {size(moved.held)} held",
            "work": f"{count(simulation.flop)}FLOP",
            "work-beside": "in products of visible pairs",
        }
    )
