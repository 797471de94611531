"""`quest report RUN...`: one HTML file about one run, or a comparison of several. The file is complete: it
fetches nothing and holds no script, and everything shown of models, data and settings is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_quest.errors import UsageError
from llm_quest.files import atomic_write_text
from llm_quest.report import render_template
from llm_quest.report.metric_families import (
    MetricFamily,
    families_of,
    is_plotted,
    loss_unit,
    main_loss_metric,
    reward_family,
)
from llm_quest.report.plots import PERCENT, Curve, plot_bars, plot_curves
from llm_quest.report.record import RunRecord, TableRow, read_run
from llm_quest.report.run_summary import final_bits_per_byte, key_figures, recorded_baselines, run_status, summarize_run

TEMPLATE = Path(__file__).parent / "report.html"


def write_report(runs: Sequence[Path | str], *, out: Path | str | None = None) -> Path:
    """Write the report and return its path: `out`, or report.html in the first run. An earlier report is replaced
    atomically; a file of another kind under that name is refused (UsageError)."""
    if not runs:
        raise UsageError("no run folder was given; quest report takes one or more")
    folders = [Path(run) for run in runs]
    target = folders[0] / "report.html" if out is None else Path(out)
    if target.is_dir():
        target /= "report.html"
    if target.exists() and not target.is_file():
        raise UsageError(f"{target} is no ordinary file, so it is not replaced; choose another --out")
    text = render_html([read_run(folder) for folder in folders])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{target.parent} is no folder; choose another --out") from None
    atomic_write_text(target, text.encode("utf-8", "replace").decode())
    return target


def render_html(records: Sequence[RunRecord]) -> str:
    """The HTML. Everything but our own plots is escaped."""
    from markupsafe import Markup

    named = number_duplicate_names(records)
    return render_template(
        TEMPLATE,
        title=named[0].name if len(named) == 1 else f"{len(named)} runs compared",
        chapters=[summarize_run(record, number) for number, record in enumerate(named)],
        table=comparison_table(named) if len(named) > 1 else (),
        differences=differing_settings(named) if len(named) > 1 else (),
        pictures=[(heading, Markup(svg), wide) for heading, svg, wide in draw_plots(named) if svg],
    )


def number_duplicate_names(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The names of the runs' folders; equal names are numbered."""
    names = [record.name for record in records]
    numbered = [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]
    return [RunRecord(**{**vars(record), "name": name}) for record, name in zip(records, numbered, strict=True)]


def draw_plots(records: Sequence[RunRecord]) -> Iterator[tuple[str, str, bool]]:
    """The plots: (heading, svg, whether it takes the whole width)."""
    rewarded = [reward_family(record) for record in records if "reward" in record.names]
    if rewarded:
        curves = list(family_curves(records, rewarded[0]))
        yield "Reward", plot_curves("reward", curves, wide=True), True
    yield ("Policy loss" if len(rewarded) == len(records) else "Loss"), plot_loss(records), not rewarded
    known = [recorded_baselines(record) for record in records if recorded_baselines(record)]
    best = min(known[0].items(), key=lambda one: one[1]) if known and all(one == known[0] for one in known) else None
    families = {family.title: family for record in records for family in families_of(record)}
    for title, family in families.items():
        level = best if title == "Held-out bits per byte" else None
        curves = list(family_curves(records, family))
        whole = len(records) == 1 or len(family.lines) == 1
        heading = title if whole else f"{title}: {comparison_label(records, family)}"
        yield heading, plot_curves(title.lower(), curves, unit=family.unit, log=family.log, level=level), False
    yield "Held-out scores", plot_curves("held-out scores", list(score_lines(records)), unit=PERCENT), False
    counted = records[0].unit
    speeds = [metric_curve(record, "tokens_per_second", number, rough=True) for number, record in enumerate(records)]
    yield f"{counted.capitalize()} per second", plot_curves(f"{counted} per second", speeds, unit=f"{counted}/s"), False
    yield "Against counting and compressing the same bytes", plot_baselines(records), True


def comparison_label(records: Sequence[RunRecord], family: MetricFamily) -> str:
    """The name of the line that stands for a family among several runs."""
    return next((label for metric, label in family.lines if any(metric in record.names for record in records)), "")


def plot_loss(records: Sequence[RunRecord]) -> str:
    """The main loss of each run; of a single one its held-out loss beside it."""
    alone = len(records) == 1
    losses = [
        metric_curve(record, main_loss_metric(record), number, rough=True, name="training" if alone else "")
        for number, record in enumerate(records)
    ]
    if alone:
        losses.append(metric_curve(records[0], "eval/loss", 1, dots=True, name="held-out"))
    units = {loss_unit(record) for record in records}
    policy = all("reward" in record.names for record in records)
    return plot_curves("loss", losses, unit=units.pop() if len(units) == 1 else "", wide=not policy)


def family_curves(records: Sequence[RunRecord], family: MetricFamily) -> Iterator[Curve]:
    """All lines of a single run, those that it has; of several runs the first line of each, in the run's color."""
    for number, record in enumerate(records):
        shown = [(metric, label) for metric, label in family.lines if metric in record.names]
        for place, (metric, label) in enumerate(shown if len(records) == 1 else shown[:1]):
            held_out = metric.startswith("eval/")
            color, name = (place, label) if len(records) == 1 else (number, record.name)
            yield metric_curve(record, metric, color, rough=not held_out, dots=held_out, name=name)


def score_lines(records: Sequence[RunRecord]) -> Iterator[Curve]:
    """Curves of further held-out shares: all of a single run; of several runs the first of each, in the run's
    color."""
    for number, record in enumerate(records):
        scores = {name: score for name, score in record.scores.items() if not is_plotted(f"eval/{name}")}
        for place, (name, (steps, values)) in enumerate(scores.items()):
            if len(records) == 1:
                yield Curve(name, steps, values, place, show_points=True)
            elif place == 0:
                yield Curve(f"{record.name}: {name}", steps, values, number, show_points=True)


def metric_curve(
    record: RunRecord, key: str, number: int, *, rough: bool = False, dots: bool = False, name: str = ""
) -> Curve:
    steps, values = record.series(key)
    bad = [
        event["step"] for event in record.events if event.get("event") == "skipped" and type(event.get("step")) is int
    ]
    return Curve(name or record.name, steps, values, number, rough, dots, bad if key in ("loss", "next_token") else ())


def plot_baselines(records: Sequence[RunRecord]) -> str:
    """A bar chart of every run's bits per byte and the baselines', where there are any."""
    ours = {"this model" if len(records) == 1 else record.name: final_bits_per_byte(record) for record in records}
    others = {name: value for record in records for name, value in recorded_baselines(record).items()}
    values = {name: value for name, value in ours.items() if value is not None} | others
    return (
        plot_bars("bits per byte against baselines", values, ours=list(ours), unit="bits per byte, less is better")
        if others
        else ""
    )


def comparison_table(records: Sequence[RunRecord]) -> tuple[TableRow, ...]:
    """A table of the runs: a header of names, then a row for each number that any of them has."""
    figures = [{tile.label: tile.value for tile in key_figures(record)} for record in records]
    labels = dict.fromkeys(label for one in figures for label in one)
    status = ("status", *(run_status(record)[0] for record in records))
    return (
        ("", *(record.name for record in records)),
        status,
        *((label, *(one.get(label, "") for one in figures)) for label in labels),
    )


def differing_settings(records: Sequence[RunRecord]) -> tuple[TableRow, ...]:
    """Settings that differ between the runs."""
    settings = [dict(parse_settings(record.config)) for record in records]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    rows = [(key, *(setting.get(key, "") for setting in settings)) for key in keys]
    return tuple(row for row in rows if len(set(row[1:])) > 1)


def parse_settings(config: str) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of the plain block YAML that runs write; a list's entries belong to its key's text."""
    path: list[tuple[int, str]] = []
    key, value = "", ""
    for text in config.splitlines():
        match = re.match(r"( *)([\w.-]+):(?: +(.*))?$", text)
        if not match:
            value = f"{value} {text.strip()}".strip()
            continue
        if key and value:
            yield key, value
        path = [one for one in path if one[0] < len(match[1])] + [(len(match[1]), match[2])]
        key, value = ".".join(name for _, name in path), match[3] or ""
    if key and value:
        yield key, value
