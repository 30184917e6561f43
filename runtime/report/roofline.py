"""The roofline: what the machine could do with so many operations a byte, and what is predicted.

S. Williams, A. Waterman and D. Patterson, Roofline (CACM 2009). Operations are those of visible pairs, bytes those that
are moved: work on hidden pairs of live tiles shows as distance to the roof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnc.compiler.simulation.machine import Machine, MachineError, find_machine
from attnc.compiler.simulation.print_simulation import count
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.report.chart_svg import axes, figure, label
from attnc.runtime.report.markup import Markup, element, px
from attnc.runtime.report.scales import LogScale, log_scale
from attnc.runtime.report.slider_frame import SliderFrame

WIDTH, HEIGHT = 520, 340
LEFT, TOP, RIGHT, BOTTOM = 84, 24, 496, 284


@dataclass(frozen=True)
class Roofline:
    """The axes and ceilings of one machine. `others`: what is marked beside the point that moves, with its number.

    `peak`: operations a second; `bandwidth`: bytes a second.
    """

    title: str
    dtype: str
    peak: float
    bandwidth: float
    x: LogScale
    y: LogScale
    others: Sequence[tuple[int, Simulation]] = ()

    def roof(self, intensity: float) -> float:
        """Operations a second with so many operations a byte."""
        return min(self.peak, intensity * self.bandwidth)


def intensity(simulation: Simulation) -> float:
    """Operations a byte moved; 0 where there is none."""
    return simulation.flop / simulation.traffic.moved if simulation.traffic.moved else 0.0


def rate(simulation: Simulation) -> float:
    """Operations a second."""
    return simulation.flop / (simulation.predicted_ms / 1e3) if simulation.predicted_ms else 0.0


def machine_of(simulation: Simulation) -> Machine | None:
    """The machine of that name, if it is the one that was simulated."""
    try:
        machine = find_machine(simulation.device)
    except (MachineError, OSError):
        return None
    return machine if machine.title == simulation.title else None


def roofline_of(shown: Sequence[Simulation], compared: Sequence[Simulation], machine: Machine | None) -> Roofline | str:
    """The chart for all that is shown; a sentence that says why where there is none."""
    if shown[0].device == "cpu":
        return "No roofline on the CPU: its rates are those of torch's kernels, measured as a whole."
    if machine is None:
        return f"No roofline: the figures of {shown[0].title} are not at hand."
    dtype = shown[0].shape.dtype
    try:
        peak = machine.sms * machine.hertz * machine.tensor_flop(dtype)
    except MachineError as error:
        return f"No roofline: {error}."
    bandwidth = machine["hbm_tb_per_s"] * 1e12
    alike = [
        (number, one)
        for number, one in enumerate(compared, 2)
        if (one.device, one.shape.dtype) == (shown[0].device, dtype) and rate(one)
    ]
    drawn = [one for one in (*shown, *(one for _, one in alike)) if rate(one)]
    x = log_scale([peak / bandwidth, *map(intensity, drawn)], LEFT, RIGHT, room=4)
    y = log_scale([peak, *map(rate, drawn)], BOTTOM, TOP, room=2.5)
    return Roofline(machine.title, dtype, peak, bandwidth, x, y, alike)


def roofline_frame(roofline: Roofline, simulation: Simulation) -> SliderFrame:
    """The point, and the line up to the roof."""
    at, speed = intensity(simulation), rate(simulation)
    if not at or not speed:
        why = "its visible pairs were not counted" if simulation.visible is None else "there is nothing to do"
        hidden = {"visibility": "hidden"}
        return SliderFrame(
            {"roofline-rate": f"No point: {why}.", "roofline-said": f"Roofline without a point: {why}."},
            {
                "roofline-point": {"cx": "0", "cy": "0", **hidden},
                "roofline-gap": {"x1": "0", "x2": "0", "y1": "0", "y2": "0", **hidden},
            },
        )
    roof = roofline.roof(at)
    x, y, top = px(roofline.x.at(at)), px(roofline.y.at(speed)), px(roofline.y.at(roof))
    side = "memory" if at < roofline.peak / roofline.bandwidth else "compute"
    words = f"{count(speed)}FLOP/s at {count(at)}FLOP a byte: {speed / roof:.0%} of the {side} roof"
    said = f"{roofline.title}, {roofline.dtype}: {_ceilings(roofline)}. The call: {words}."
    return SliderFrame(
        {"roofline-rate": words, "roofline-said": said},
        {
            "roofline-point": {"cx": x, "cy": y, "visibility": "visible"},
            "roofline-gap": {"x1": x, "x2": x, "y1": y, "y2": top, "visibility": "visible"},
        },
    )


def _ceilings(roofline: Roofline) -> str:
    return f"at most {count(roofline.peak)}FLOP/s and {roofline.bandwidth / 1e12:.3g} TB/s"


def draw_roofline(roofline: Roofline, frame: SliderFrame) -> Markup:
    """The chart."""
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
        *(_other(roofline, number, one) for number, one in roofline.others),
        frame.shape("circle", "roofline-point", class_="dot", r=6),
        frame.text("text", "roofline-rate", class_="strong", x=0, y=HEIGHT - 4),
        label(RIGHT, BOTTOM + 34, "FLOP of visible pairs a byte moved", "quiet small", anchor="end"),
    )


def _slope_label(roofline: Roofline, first: float) -> Markup:
    """Beside the slope, most of the way up."""
    x, y = roofline.x, roofline.y
    at = first * (roofline.peak / roofline.bandwidth / first) ** 0.7
    left, top = x.at(at), y.at(roofline.roof(at))
    return label(left - 8, top - 4, f"{roofline.bandwidth / 1e12:.3g} TB/s", "small", anchor="end")


def _other(roofline: Roofline, number: int, one: Simulation) -> Markup:
    """A diamond with its number in the table of what is compared."""
    x, y = roofline.x.at(intensity(one)), roofline.y.at(rate(one))
    return element(
        "g",
        element("title", f"{number}: {one.pattern}"),
        element("path", class_="other", d=f"M{px(x)} {px(y - 6)}l6 6l-6 6l-6 -6z"),
        label(x + 9, y + 4, str(number), "small"),
    )
