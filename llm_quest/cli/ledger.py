"""`quest ledger`: lists, shows, merges and exports the rows of experiments."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.experiments.derived_settings import describe_derived
from llm_quest.experiments.ledger import Row, experiments, find_experiment, find_faults, merge_ledgers, read_rows
from llm_quest.experiments.verdict_lines import describe_verdict
from llm_quest.files import atomic_write_text, damaged_file_errors
from llm_quest.formatting import align_columns
from llm_quest.train.trackers import TRACKERS

VERDICT_COLUMNS = (
    "experiment", "time", "question", "recipe", "arm", "outcome", "size", "metric", "delta", "pairs", "cap", "mean",
    "median", "interval_95", "threshold", "budget", "command",
)  # fmt: skip
CLAIM_KEYS = ("experiment", "time", "recipe", "budget", "command")
FORMATS = ("csv", *TRACKERS)
EDITED = "its rows were edited: restore the file, or merge the ledgers that it was made of"
SENTENCE_KINDS = ("prediction", "outcome", "confirmation", "repetition")
"""Kinds of rows that have their finding as a sentence."""


@dataclass(frozen=True)
class LedgerView:
    """Rows as lines and as JSON."""

    rows: tuple[Row, ...]
    text: tuple[str, ...]

    def as_json(self) -> list[Row]:
        return list(self.rows)

    def lines(self) -> list[str]:
        return list(self.text)


def open_ledger(file: Path, log: LogFn) -> list[Row]:
    """The rows of a ledger; its faults are logged. UsageError without the file."""
    if not file.is_file():
        raise UsageError(f"{file}: there is no ledger yet; name another with --file, or make one with quest ablate")
    rows = read_rows(file, log)
    for fault in find_faults(rows):
        log(f"warning: {file}: {fault}")
    return rows


def list_experiments(file: Path, log: LogFn) -> LedgerView:
    """A line for each verdict, and for each experiment without one."""
    if not file.exists():
        return LedgerView((), (f"{file}: there is no ledger yet, so nothing was asked",))
    rows = open_ledger(file, log)
    with damaged_file_errors(file, EDITED):
        return list_rows(rows)


def list_rows(rows: Sequence[Row]) -> LedgerView:
    shown: list[tuple[str, str]] = []
    by_experiment = experiments(rows)
    for name, own in by_experiment.items():
        claim = first_of(own, "claim")
        question = claim.get("question") or " ".join(arm for arm in claim.get("arms", {}) if arm != "control")
        once_more = f" (once more; first in {claim['confirms']})" if claim.get("confirms") else ""
        shown.append((name, f"{claim.get('time', '')[:10]}  {question}{once_more}"))
        verdicts = latest_verdicts(own)
        shown += [("", describe_verdict(verdict)[0]) for verdict in verdicts]
        sentences = [("", sentence) for sentence in describe_sentences(own, by_experiment)]
        shown += sentences or ([] if verdicts else [("", "not decided: the same command goes on")])
    kept = [row for row in rows if row["kind"] in ("claim", "verdict", *SENTENCE_KINDS)]
    return LedgerView(tuple(kept), tuple(align_columns(shown)))


def show_experiment(file: Path, name: str, log: LogFn) -> LedgerView:
    """The claim, verdicts and runs of an experiment. name: or the beginning of one."""
    by_experiment = experiments(open_ledger(file, log))
    whole = find_experiment(by_experiment, name, file)
    with damaged_file_errors(file, EDITED):
        return show_rows(whole, by_experiment)


def describe_sentences(own: Sequence[Row], by_experiment: Mapping[str, Sequence[Row]]) -> list[str]:
    """The sentences of an experiment; of a confirmation with its verdicts, where there are any yet."""
    lines = []
    for row in own:
        if row["kind"] in SENTENCE_KINDS:
            verdicts = latest_verdicts(by_experiment.get(row.get("by", ""), []))
            found = ", ".join(describe_verdict(one)[0] for one in verdicts if row["kind"] == "confirmation")
            lines.append(row["sentence"] + (f" ({found})" if found else ""))
    return lines


def show_rows(name: str, by_experiment: Mapping[str, Sequence[Row]]) -> LedgerView:
    own = by_experiment[name]
    claim = first_of(own, "claim")
    runs = [row for row in own if row["kind"] == "run"]
    ended = {row["run"] for row in runs}
    lines = [
        str(claim.get("question") or name),
        *align_columns([(key, str(claim.get(key, ""))) for key in CLAIM_KEYS]),
        *describe_settings(claim),
        *(line for verdict in latest_verdicts(own) for line in describe_verdict(verdict)),
        *describe_sentences(own, by_experiment),
        *align_columns([run_line(row, words) for row, words in zip(runs, tell_apart(runs), strict=True)]),
        *(f"started and not ended: {row['arm']}, seed {row['seed']}" for row in own
          if row["kind"] == "started" and row["run"] not in ended),
    ]  # fmt: skip
    return LedgerView(tuple(own), tuple(lines))


def describe_settings(claim: Mapping[str, Any]) -> list[str]:
    """The control's settings, with those that nobody gave, and what each arm has instead."""
    lines = [f"settings of {name}: {words}" for name, own in claim.get("resolved", {}).items()
             if (words := " ".join(f"{key}={value}" for key, value in own.items()))]  # fmt: skip
    return [*lines, *describe_derived(claim.get("recipe", ""), claim.get("derived", {}))]


def rate_of(row: Mapping[str, Any]) -> str:
    """The learning rate of a run, where its settings give one."""
    rates = [pair.partition("=")[2] for pair in row.get("settings", ()) if pair.startswith("learning_rate=")]
    return f"learning_rate {rates[-1]}  " if rates else ""


def tell_apart(runs: Sequence[Row]) -> list[str]:
    """What an A/A run is beside the first one of its arm and seed: the same settings again, or its own ones."""
    first: dict[tuple[str, int], list[str]] = {}
    words = []
    for row in runs:
        settings = row.get("settings", [])
        known = first.setdefault((row["arm"], row["seed"]), settings) if row["role"] == "aa" else settings
        own = " ".join(pair for pair in settings if pair not in known)
        words.append("" if known is settings else f"{own or 'identical rerun'}  ")
    return words


def run_line(row: Mapping[str, Any], words: str) -> tuple[str, str]:
    metrics = row.get("metrics", {})
    scores = "  ".join(
        f"{key} {value:.4g}" for key, value in metrics.items() if key.startswith("eval/") and value is not None
    )
    cost = f"{row['status']}  {row['cpu_seconds']:.1f} s"
    return f"{row['role']} {row['arm']}", f"seed {row['seed']}  {words}{rate_of(row)}{cost}  {scores}"


def first_of(rows: Sequence[Row], kind: str) -> Row:
    return next((row for row in rows if row["kind"] == kind), {})


def latest_verdicts(rows: Sequence[Row]) -> list[Row]:
    """The newest verdict of each arm."""
    return list({row["arm"]: row for row in rows if row["kind"] == "verdict"}.values())


@dataclass(frozen=True)
class LedgerChange:
    """The result of a command that writes: a message, and the same as JSON."""

    message: str
    content: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return dict(self.content)

    def lines(self) -> list[str]:
        return [self.message]


def merge_into_ledger(files: Sequence[Path], into: Path, log: LogFn) -> LedgerChange:
    """All rows of several ledgers in one, each once."""
    added = merge_ledgers(files, into, log)
    return LedgerChange(f"{added:,} new rows in {into}", {"ledger": str(into), "added": added})


def export_ledger_rows(file: Path, format: str, out: Path | None, log: LogFn) -> LedgerChange:
    """Verdicts as a table, or the runs to an experiment tracker."""
    if format not in FORMATS:
        raise UsageError(f"--format {format}: known are {', '.join(FORMATS)}")
    rows = open_ledger(file, log)
    target = out or file.with_suffix(".csv")
    with damaged_file_errors(file, EDITED):
        return export_table(rows, target) if format == "csv" else export_runs(rows, format, out)


def export_table(rows: Sequence[Row], target: Path) -> LedgerChange:
    verdicts = [row for row in rows if row["kind"] == "verdict"]
    claims = {row["experiment"]: row for row in rows if row["kind"] == "claim"}
    text = io.StringIO()
    table = csv.DictWriter(text, VERDICT_COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows({**claims.get(row["experiment"], {}), **row} for row in verdicts)
    atomic_write_text(target, text.getvalue())
    return LedgerChange(f"{len(verdicts)} verdicts in {target}", {"file": str(target), "verdicts": len(verdicts)})


def export_runs(rows: Sequence[Row], format: str, out: Path | None) -> LedgerChange:
    """A run of the tracker for each run: its settings as config, its last metrics at its last step. A run has the same
    name each time, so trackers that resume by it do not double it."""
    runs = [row for row in rows if row["kind"] == "run"]
    with tempfile.TemporaryDirectory() as temporary:
        for row in runs:
            folder = (out or Path(temporary)) / f"{row['experiment']}-{row['arm']}-{row['seed']}-{row['run']}".replace(
                "/", "_"
            )
            folder.mkdir(parents=True, exist_ok=True)
            numbers = {key: value for key, value in row["metrics"].items() if isinstance(value, int | float)}
            tracker = TRACKERS[format]()
            tracker.start(folder, {key: value for key, value in row.items() if key != "metrics"}, 0)
            tracker.log(numbers, int(row.get("steps", 0)))
            tracker.close()
    return LedgerChange(f"{len(runs)} runs sent to {format}", {"format": format, "runs": len(runs)})
