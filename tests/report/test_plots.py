"""Pictures that take their colors from the page."""

from __future__ import annotations

import ast
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib as mpl

import llm_quest
from llm_quest.report.plots import CSS_VARIABLES, MAX_POINTS, Curve, downsample, moving_average, plot_bars, plot_curves


def test_no_stand_in_color_is_left_and_the_page_decides():
    svg = plot_curves(
        "loss", [Curve("a", range(9), [9.0 - i for i in range(9)]), Curve("b", range(9), [1.0] * 9, color=1)]
    )
    assert not [color for color in CSS_VARIABLES if color in svg]
    assert {"var(--ink)", "var(--line)", "var(--s1)", "var(--s2)"} <= {v for v in CSS_VARIABLES.values() if v in svg}


def test_a_picture_is_well_formed_and_says_what_it_shows():
    svg = plot_curves('loss "<of>" a run', [Curve("a", [1, 2, 3], [3.0, 2.0, 1.0])])
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert root.attrib["aria-label"] == 'loss "<of>" a run'


def test_names_of_runs_are_escaped():
    svg = plot_curves("loss", [Curve("<script>", [1, 2], [2.0, 1.0]), Curve("b", [1, 2], [2.0, 1.0], color=1)])
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg


def test_nothing_to_draw_gives_no_picture():
    assert plot_curves("loss", []) == ""
    assert plot_curves("loss", [Curve("a", [1, 2], [math.nan, math.nan])]) == ""
    assert plot_bars("bits", {}, ours=[], unit="bits") == ""


def test_matplotlib_is_left_as_it_was():
    before = dict(mpl.rcParams)
    plot_curves("loss", [Curve("a", [1, 2], [2.0, 1.0])])
    assert dict(mpl.rcParams) == before


def test_thinning_keeps_every_spike():
    values = [1.0] * 10_000
    values[4321], values[777] = 99.0, -99.0
    steps, kept = downsample(range(10_000), values)
    assert len(kept) <= MAX_POINTS + 2
    assert (4321, 99.0) in zip(steps, kept, strict=True)
    assert (777, -99.0) in zip(steps, kept, strict=True)
    assert list(steps) == sorted(steps)


def test_smoothing_does_not_lag_behind_a_straight_line():
    line = [float(i) for i in range(200)]
    assert max(abs(a - b) for a, b in zip(line, moving_average(line), strict=True)) < 1e-9


def test_smoothing_keeps_gaps_and_does_not_spread_them():
    found = moving_average([1.0] * 30 + [math.nan] + [1.0] * 30)
    assert math.isnan(found[30])
    assert all(value == 1.0 for i, value in enumerate(found) if i != 30)


def test_no_figure_is_laid_out_by_the_constraint_solver():
    """matplotlib's constrained layout solves in a C extension (kiwisolver 1.5.1) that ended processes with a
    segmentation fault while a report was drawn: 2 of 2 runs that trained several models in one process."""
    package = Path(llm_quest.__file__).parent
    layouts = [
        keyword.value.value
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "layout" and isinstance(keyword.value, ast.Constant)
    ]
    assert layouts == ["tight"] * len(layouts)
    assert layouts


def test_smoothing_does_not_end_in_the_last_values_noise():
    line = [float(i % 2) for i in range(200)]
    assert max(abs(value - 0.5) for value in moving_average(line)) < 0.4
    assert abs(moving_average([*line[:-1], 50.0])[-1]) < 40


def test_shares_are_in_percent_and_a_narrow_logarithmic_axis_has_numbers():
    svg = plot_curves("shares", [Curve("a", [1, 2, 3], [0.0, 0.25, 0.5])], unit="percent")
    assert "50%</text>" in svg
    assert "percent" not in svg
    assert "-2%" not in plot_curves("none", [Curve("a", [1, 2], [0.0, 0.0])], unit="percent").replace("−", "-")
    narrow = plot_curves("norm", [Curve("a", [1, 2, 3], [1.0, 1.5, 2.0])], log=True)
    assert len([text for text in ("1.2</text>", "1.4</text>", "1.6</text>", "1.8</text>") if text in narrow]) == 4
