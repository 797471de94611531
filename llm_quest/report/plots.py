"""Curves and bars as SVG with the colors and font of the HTML, in its light and its dark theme.

matplotlib draws with stand-in colors; afterwards each stand-in becomes a variable of the page's style sheet. It is
imported when the first picture is drawn, and its settings are afterwards as they were.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BAD = "#010101", "#020202", "#030303"
SERIES = ("#040101", "#040102", "#040103", "#040104", "#040105", "#040106")
CSS_VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)", BAD: "var(--bad)"}
CSS_VARIABLES |= {stand_in: f"var(--s{number})" for number, stand_in in enumerate(SERIES, start=1)}
MAX_POINTS = 1200
PERCENT = "percent"
"""The unit of shares, 0 to 1."""
SMOOTHING_WINDOWS = 25
MIN_POINTS_TO_SCALE = 40
LEAST_LOG_RANGE = 5
"""A logarithmic axis of less has hardly a number on it."""

RC_PARAMS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Curve:
    """A named line over steps. values: NaN leaves a gap and a mark on the x axis; so does a step in `nonfinite_steps`.
    smooth: drawn faint under its running mean. show_points: measured only now and then, so each point is shown. color:
    a number, the same for one run on the whole page."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 0
    smooth: bool = False
    show_points: bool = False
    nonfinite_steps: Sequence[float] = ()


def plot_curves(
    title: str,
    lines: Sequence[Curve],
    *,
    unit: str = "",
    log: bool = False,
    wide: bool = False,
    level: tuple[str, float] | None = None,
    x: str = "step",
) -> str:
    """An SVG plot of lines; an empty string where there is nothing to draw. level: a dashed horizontal line. x: what
    the horizontal axis counts."""
    drawable = [line for line in lines if any(map(math.isfinite, line.values))]
    if not drawable:
        return ""
    from matplotlib.ticker import MaxNLocator

    with new_figure(title, 9.6 if wide else 4.7, 3.2 if wide else 2.7) as (figure, axes):
        values = [value for line in drawable for value in line.values if math.isfinite(value)]
        wide_range = min(values) > 0 and max(values) > LEAST_LOG_RANGE * min(values)
        for line in drawable:
            draw_curve(axes, line)
        if log and wide_range:
            set_log_scale(axes)
        else:
            set_y_limits(axes, drawable, level)
        if level is not None:
            axes.axhline(level[1], color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label=level[0])
        axes.set_xlabel(x)
        axes.set_ylabel("" if unit == PERCENT else unit)
        if unit == PERCENT:
            axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.3g}%")
            axes.set_ylim(max(axes.get_ylim()[0], min(0.0, *values)), None)  # no ticks below 0 %
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False)
        return figure_to_svg(figure, title)


def draw_curve(axes: Axes, line: Curve) -> None:
    """Draw one line, and marks where it has no number."""
    color = SERIES[line.color % len(SERIES)]
    steps, values = downsample(line.steps, line.values)
    rough = line.smooth and len(values) > 20
    if rough:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.45)
    mark = "o" if line.show_points or len(values) == 1 else ""
    axes.plot(
        steps, moving_average(values) if rough else values, color=color, linewidth=1.8, marker=mark, label=line.name
    )
    gaps = {step for step, value in zip(line.steps, line.values, strict=True) if not math.isfinite(value)} | {
        *line.nonfinite_steps
    }
    if gaps:
        foot = axes.get_xaxis_transform()
        axes.plot(
            sorted(gaps), [0.03] * len(gaps), color=BAD, marker="^", linestyle="", transform=foot, label="not finite"
        )


def set_log_scale(axes: Axes) -> None:
    """Make the y axis logarithmic, with its numbers written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    low, high = axes.get_ylim()
    between = "2357" if high / low < 20 else "25" if high / low < 200 else ""
    axes.yaxis.set_minor_formatter(lambda value, place: f"{value:g}" if f"{value:e}"[0] in between else "")


def set_y_limits(axes: Axes, lines: Sequence[Curve], level: tuple[str, float] | None) -> None:
    """Limit the y axis to what follows the first steps, where these would flatten all the rest."""
    shown = [value for line in lines for value in line.values[len(line.values) // 20 :] if math.isfinite(value)]
    if max(len(line.values) for line in lines) < MIN_POINTS_TO_SCALE or not shown:
        return
    shown += [level[1]] if level is not None else []
    low, high = min(shown), max(shown)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def plot_bars(title: str, values: Mapping[str, float], *, ours: Sequence[str], unit: str) -> str:
    """An SVG plot of horizontal bars, the shortest on top, `ours` in the accent color, each with its number."""
    if not values:
        return ""
    names = sorted(values, key=lambda name: values[name], reverse=True)
    with new_figure(title, 9.6, 0.6 + 0.34 * len(names)) as (figure, axes):
        colors = [SERIES[ours.index(name) % len(SERIES)] if name in ours else FAINT for name in names]
        axes.barh(range(len(names)), [values[name] for name in names], color=colors, height=0.68)
        for place, name in enumerate(names):
            weight = "bold" if name in ours else "normal"
            beside: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{values[name]:.3f}", (values[name], place), color=INK, fontweight=weight, **beside)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, 1.1 * max(values.values()))
        axes.set_xlabel(unit)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        return figure_to_svg(figure, title)


@contextmanager
def new_figure(title: str, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of this size in inches. title decides the ids inside, so it is unique in a report."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(RC_PARAMS | {"svg.hashsalt": title}):
        figure = Figure(figsize=(width, height), layout="tight")
        yield figure, figure.add_subplot()


def figure_to_svg(figure: Figure, title: str) -> str:
    """The <svg> element alone, as wide as its container, in the HTML's colors and font, with a label for screen
    readers."""
    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    svg = written.getvalue()
    head, body = re.split(r"(?<=>)", svg[svg.index("<svg") :], maxsplit=1)
    head = re.sub(r' (width|height|version|xmlns)="[^"]*"', "", head)
    head = head.replace("<svg", f'<svg role="img" aria-label="{html.escape(title, quote=True)}"')
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z.]+(2d)?_\d+"', "", body)
    body = re.sub(r"font: ([^;\"]*?[\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", body)
    for stand_in, variable in CSS_VARIABLES.items():
        body = body.replace(stand_in, variable)
    return head + body


def downsample(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS of them: the lowest and the highest of each segment, in order, so that no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    stretch = math.ceil(2 * len(steps) / MAX_POINTS)
    kept: list[int] = []
    for start in range(0, len(steps), stretch):
        span = range(start, min(start + stretch, len(steps)))
        finite = [i for i in span if math.isfinite(values[i])] or [start]
        kept += sorted({min(finite, key=lambda i: values[i]), max(finite, key=lambda i: values[i])})
    return [steps[i] for i in kept], [values[i] for i in kept]


def moving_average(values: Sequence[float]) -> list[float]:
    """The mean of a point and its neighbors on both sides (one part in WINDOWS of the line); at the ends, where they
    are on one side, the value there of the straight line through them. So it neither lags behind nor ends in the last
    value's noise. NaN stays a gap and is left out."""
    reach = max(2, len(values) // (2 * SMOOTHING_WINDOWS))
    out = []
    for place, value in enumerate(values):
        around = range(max(0, place - reach), min(len(values), place + reach + 1))
        points = [(i - place, values[i]) for i in around if math.isfinite(values[i])]
        out.append(line_at_zero(points) if math.isfinite(value) else math.nan)
    return out


def line_at_zero(points: Sequence[tuple[float, float]]) -> float:
    """The value at x = 0 of the straight line with the least squares through some points (x, y)."""
    middle = sum(x for x, _ in points) / len(points)
    level = sum(y for _, y in points) / len(points)
    spread = sum((x - middle) ** 2 for x, _ in points)
    slope = sum((x - middle) * (y - level) for x, y in points) / spread if spread else 0.0
    return level - slope * middle
