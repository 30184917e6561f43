"""The roofline: the machine's limit at an arithmetic intensity, and the predicted rate.

S. Williams, A. Waterman and D. Patterson, Roofline (CACM 2009). Operations count visible pairs only, bytes are those
moved: work on hidden pairs of live tiles appears as distance to the roof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnc.compiler.simulation.machine import Machine, MachineError, find_machine
from attnc.compiler.simulation.print_simulation import count
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.report.chart_svg import LogScale, axes, figure, label, log_scale
from attnc.runtime.report.markup import Markup, SliderFrame, element, px

WIDTH, HEIGHT = 520, 340
LEFT, TOP, RIGHT, BOTTOM = 84, 24, 496, 284


@dataclass(frozen=True)
class Roofline:
    """The axes and ceilings of a machine.

    `others`: compared simulations with their numbers. `peak`: operations per second. `bandwidth`: bytes per second.
    """

    title: str
    dtype: str
    peak: float
    bandwidth: float
    x: LogScale
    y: LogScale
    others: Sequence[tuple[int, Simulation]] = ()

    def roof(self, intensity: float) -> float:
        """Return the maximum operations per second at an intensity in operations per byte."""
        return min(self.peak, intensity * self.bandwidth)


def intensity(simulation: Simulation) -> float:
    """Return the operations per byte moved; 0 if no byte is moved."""
    return simulation.flop / simulation.traffic.moved if simulation.traffic.moved else 0.0


def rate(simulation: Simulation) -> float:
    """Return the predicted operations per second."""
    return simulation.flop / (simulation.predicted_ms / 1e3) if simulation.predicted_ms else 0.0


def machine_of(simulation: Simulation) -> Machine | None:
    """Return the machine with the simulation's device name, if it is the simulated one, else None."""
    try:
        machine = find_machine(simulation.device)
    except (MachineError, OSError):
        return None
    return machine if machine.title == simulation.title else None


def roofline_of(shown: Sequence[Simulation], compared: Sequence[Simulation], machine: Machine | None) -> Roofline | str:
    """Return the chart for all shown simulations, or a sentence that says why there is none."""
    if shown[0].device == "cpu":
        return "No roofline on the CPU: its rates are measured for whole torch kernels."
    if machine is None:
        return f"No roofline: the figures of {shown[0].title} are not available."
    dtype = shown[0].shape.dtype
    try:
        peak = machine.sms * machine.hertz * machine.tensor_flop(dtype)
    except MachineError as error:
        return f"No roofline: {error}."
    bandwidth = machine["hbm_tb_per_s"] * 1e12
    same_machine = [
        (number, other)
        for number, other in enumerate(compared, 2)
        if (other.device, other.shape.dtype) == (shown[0].device, dtype) and rate(other)
    ]
    with_rate = [other for other in (*shown, *(other for _, other in same_machine)) if rate(other)]
    x = log_scale([peak / bandwidth, *map(intensity, with_rate)], LEFT, RIGHT, room=4)
    y = log_scale([peak, *map(rate, with_rate)], BOTTOM, TOP, room=2.5)
    return Roofline(machine.title, dtype, peak, bandwidth, x, y, same_machine)


def roofline_frame(roofline: Roofline, simulation: Simulation) -> SliderFrame:
    """Return the point, and the line from it up to the roof."""
    byte_intensity, speed = intensity(simulation), rate(simulation)
    if not byte_intensity or not speed:
        reason = "its visible pairs were not counted" if simulation.visible is None else "there is nothing to do"
        hidden = {"visibility": "hidden"}
        return SliderFrame(
            {"roofline-rate": f"No point: {reason}.", "roofline-said": f"Roofline without a point: {reason}."},
            {
                "roofline-point": {"cx": "0", "cy": "0", **hidden},
                "roofline-gap": {"x1": "0", "x2": "0", "y1": "0", "y2": "0", **hidden},
            },
        )
    roof = roofline.roof(byte_intensity)
    x, y, top = px(roofline.x.at(byte_intensity)), px(roofline.y.at(speed)), px(roofline.y.at(roof))
    side = "memory" if byte_intensity < roofline.peak / roofline.bandwidth else "compute"
    words = f"{count(speed)}FLOP/s at {count(byte_intensity)}FLOP a byte: {speed / roof:.0%} of the {side} roof"
    spoken = f"{roofline.title}, {roofline.dtype}: {_ceilings(roofline)}. The call: {words}."
    return SliderFrame(
        {"roofline-rate": words, "roofline-said": spoken},
        {
            "roofline-point": {"cx": x, "cy": y, "visibility": "visible"},
            "roofline-gap": {"x1": x, "x2": x, "y1": y, "y2": top, "visibility": "visible"},
        },
    )


def _ceilings(roofline: Roofline) -> str:
    return f"at most {count(roofline.peak)}FLOP/s and {roofline.bandwidth / 1e12:.3g} TB/s"


def draw_roofline(roofline: Roofline, frame: SliderFrame) -> Markup:
    """Draw the chart."""
    x, y = roofline.x, roofline.y
    ridge, top = x.at(roofline.peak / roofline.bandwidth), y.at(roofline.peak)
    first = max(x.low, y.low / roofline.bandwidth)
    slope = f"M{px(x.at(first))} {px(y.at(roofline.roof(first)))}L{px(ridge)} {px(top)}"
    return figure(
        "roofline-chart",
        "Roofline",
        frame.text("desc", "roofline-said"),
        WIDTH,
        HEIGHT,
        *axes(x, y, lambda tick: count(tick).strip(), lambda tick: f"{count(tick)}FLOP/s"),
        element("path", class_="roof", d=f"{slope}H{px(x.end)}"),
        label(x.end - 4, top - 7, f"{count(roofline.peak)}FLOP/s {roofline.dtype}", "small", anchor="end"),
        _slope_label(roofline, first),
        frame.shape("line", "roofline-gap", class_="dashed"),
        *(_diamond(roofline, number, simulation) for number, simulation in roofline.others),
        frame.shape("circle", "roofline-point", class_="dot", r=6),
        frame.text("text", "roofline-rate", class_="strong", x=0, y=HEIGHT - 4),
        label(RIGHT, BOTTOM + 34, "FLOP of visible pairs a byte moved", "quiet small", anchor="end"),
    )


def _slope_label(roofline: Roofline, first: float) -> Markup:
    """Return the label of the slope, near its upper end."""
    x, y = roofline.x, roofline.y
    byte_intensity = first * (roofline.peak / roofline.bandwidth / first) ** 0.7
    left, top = x.at(byte_intensity), y.at(roofline.roof(byte_intensity))
    return label(left - 8, top - 4, f"{roofline.bandwidth / 1e12:.3g} TB/s", "small", anchor="end")


def _diamond(roofline: Roofline, number: int, simulation: Simulation) -> Markup:
    """Return a diamond with the simulation's number in the table of compared simulations."""
    x, y = roofline.x.at(intensity(simulation)), roofline.y.at(rate(simulation))
    return element(
        "g",
        element("title", f"{number}: {simulation.pattern}"),
        element("path", class_="other", d=f"M{px(x)} {px(y - 6)}l6 6l-6 6l-6 -6z"),
        label(x + 9, y + 4, str(number), "small"),
    )
