"""The work of every slot of the machine, the busiest first; the area above the bars is idle time."""

from __future__ import annotations

from attnc.compiler.simulation.print_simulation import ms
from attnc.compiler.simulation.simulation import Simulation
from attnc.runtime.report.chart_svg import figure, hatch, label
from attnc.runtime.report.markup import Markup, SliderFrame, element, px

WIDTH, HEIGHT = 520, 404
LEFT, TOP, RIGHT, BOTTOM = 66, 34, 512, 318
MOST_BARS = 64
NO_LOADS = "The work of single slots is not simulated for this call."

_HATCH = hatch("report-idle", 6, element("path", class_="idle-stroke", d="M0 0V6", stroke_width=2))


def busiest(loads: tuple[float, ...]) -> tuple[float, ...]:
    """Return at most `MOST_BARS` loads in descending order, each the largest load of a group of slots."""
    bars = min(len(loads), MOST_BARS)
    return tuple(loads[i * len(loads) // bars] for i in range(bars))


def timeline_frame(simulation: Simulation) -> SliderFrame:
    """Return the bars of the timeline; heights are shares of the busiest slot."""
    loads = simulation.loads
    if not loads or loads[0] <= 0:
        reason = "There is nothing to do." if loads else NO_LOADS
        return _timeline_parts("", BOTTOM, "", "", (reason, ""), reason)
    mean, bars = sum(loads) / len(loads), busiest(loads)
    step = (RIGHT - LEFT) / len(bars)
    gap = min(1.0, 0.15 * step)
    path = ""
    for i, load in enumerate(bars):
        top = BOTTOM - (BOTTOM - TOP) * load / loads[0]
        path += f"M{px(LEFT + i * step)} {BOTTOM}V{px(top)}h{px(step - gap)}V{BOTTOM}z"
    kernel = simulation.choices[0].kernel
    slots_text = f"{len(loads):,} {_slots(simulation)}, the busiest first"
    slots_per_bar = len(loads) / len(bars)
    bars_text = f"{len(bars)} bars, each the busiest of about {slots_per_bar:.2g}" if slots_per_bar > 1 else ""
    busy = f"mean {ms(mean)}: {mean / loads[0]:.1%} of the busiest"
    spoken = f"Work of the {kernel} kernel on {slots_text}. Busiest {ms(loads[0])}, {busy}."
    return _timeline_parts(
        path, BOTTOM - (BOTTOM - TOP) * mean / loads[0], ms(loads[0]), busy, (slots_text, bars_text), spoken
    )


def _timeline_parts(
    path: str, mean: float, largest: str, busy: str, captions: tuple[str, str], spoken: str
) -> SliderFrame:
    y = px(mean)
    visibility = {} if path else {"visibility": "hidden"}
    return SliderFrame(
        {
            "timeline-most": largest,
            "timeline-mean": busy,
            "timeline-who": captions[0],
            "timeline-each": captions[1],
            "timeline-said": spoken,
        },
        {
            "timeline-bars": {"d": path},
            "timeline-idle": {"visibility": "visible", **visibility},
            "timeline-line": {"y1": y, "y2": y, "visibility": "visible", **visibility},
        },
    )


def _slots(simulation: Simulation) -> str:
    """Return the name of the slots: programs that run side by side on SMs, or threads."""
    if simulation.workers == "SMs":
        return "slots for programs on the SMs"
    return simulation.workers if len(simulation.loads) != 1 else simulation.workers.removesuffix("s")


def draw_timeline(frame: SliderFrame) -> Markup:
    """Draw the chart."""
    return figure(
        "timeline-chart",
        "Work of every slot",
        frame.text("desc", "timeline-said"),
        WIDTH,
        HEIGHT,
        element("defs", _HATCH),
        frame.shape(
            "rect",
            "timeline-idle",
            class_="idle",
            fill="url(#report-idle)",
            x=LEFT,
            y=TOP,
            width=RIGHT - LEFT,
            height=BOTTOM - TOP,
        ),
        frame.shape("path", "timeline-bars", class_="measure"),
        frame.shape("line", "timeline-line", class_="mean", x1=LEFT - 4, x2=RIGHT),
        element("path", class_="axis", d=f"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"),
        frame.text("text", "timeline-most", class_="quiet small", x=LEFT - 7, y=TOP + 4, text_anchor="end"),
        label(LEFT - 7, BOTTOM + 4, "0", "quiet small", anchor="end"),
        frame.text("text", "timeline-mean", class_="strong", x=LEFT, y=TOP - 14),
        frame.text("text", "timeline-who", class_="quiet", x=LEFT, y=BOTTOM + 22),
        frame.text("text", "timeline-each", class_="quiet small", x=LEFT, y=BOTTOM + 40),
        _legend(BOTTOM + 70),
    )


def _legend(y: float) -> Markup:
    return element(
        "g",
        element("rect", class_="measure", x=LEFT, y=y - 10, width=12, height=12),
        label(LEFT + 18, y, "work", "quiet"),
        element("rect", class_="idle", fill="url(#report-idle)", x=LEFT + 70, y=y - 10, width=12, height=12),
        label(LEFT + 88, y, "idle until the busiest ends", "quiet"),
        element("line", class_="mean", x1=LEFT + 280, x2=LEFT + 300, y1=y - 4, y2=y - 4),
        label(LEFT + 306, y, "mean", "quiet"),
    )
