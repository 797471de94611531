"""Claims of papers as rows of YAML files (`claims/*.yaml`): the question, a bench, arms as settings, the metric and the
smallest difference worth having. `benches.yaml` has what several claims share."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any, Literal

import yaml

from llm_quest.data import generated_text
from llm_quest.experiments.comparison import Scale

FOLDER = Path(__file__).with_name("claims")
BENCHES = "benches"
Expected = Literal["better", "not worse", "no difference", "worse"]
CONFIRMS: Mapping[str, str] = {
    "better": "better", "not worse": "not worse by delta", "no difference": "no difference larger than delta",
    "worse": "worse",
}  # fmt: skip
"""What a claim expects of its arm -> the outcome that confirms it; the other decided ones refute it."""

LATER_KEYS: Mapping[str, Any] = {"metrics": {}, "scale": "linear"}
"""Keys of a claim that are younger than its card, with their defaults, which leave its hash as it was."""


@dataclass(frozen=True)
class Bench:
    """What the arms of a claim have in common. about: in words. settings: the control's. sizes: name -> the numbers of
    the settings' $names, and `seconds`, the CPU seconds of a run. bases: name -> recipe and settings of a run that arms
    begin from, and its `seconds` at each size."""

    recipe: str
    about: str
    settings: Sequence[str]
    sizes: Mapping[str, Mapping[str, Any]]
    bases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Paper:
    """A claim. expect: of the first arm against the control. prediction: the probability, written before the first run,
    that it is confirmed. metrics: of arms that are another measure of the control's run, such as a vote of its samples.
    scale: log: logarithms of the metric are compared, and delta is a ratio above 1. sizes: of the bench's; empty: all.
    replication: what larger experiments of others found."""

    name: str
    title: str
    arxiv: str
    claim: str
    expect: Expected
    prediction: float
    bench: str
    arms: Mapping[str, Sequence[str]]
    delta: float
    settings: Sequence[Any] = ()
    bases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metric: str = "eval/loss"
    scale: Scale = "linear"
    metrics: Mapping[str, str] = field(default_factory=dict)
    secondary: Sequence[str] = ()
    cap: int = 12
    budget: str = ""
    rates: int = 3
    tuning_seeds: int = 1
    sizes: Sequence[str] = ()
    replication: str = ""
    notes: str = ""

    @property
    def bench_spec(self) -> Bench:
        """The bench of this name."""
        return read_benches()[self.bench]

    @property
    def all_sizes(self) -> tuple[str, ...]:
        return tuple(self.sizes or self.bench_spec.sizes)

    @property
    def all_bases(self) -> Mapping[str, Mapping[str, Any]]:
        return {**self.bench_spec.bases, **self.bases}

    def fill_in(self, pairs: Sequence[Any], size: str) -> tuple[str, ...]:
        """Settings with the numbers of a size in place of $names."""
        values = {**self.bench_spec.sizes[size], "generated": generated_text.__file__, "claims": str(FOLDER)}
        return tuple(Template(pair).substitute(values) for pair in flatten_pairs(pairs))

    @property
    def hash(self) -> str:
        """A hash of what decides numbers and verdict: words may change."""
        words = {"title", "claim", "prediction", "replication", "notes", "bench", "sizes"}
        words |= {key for key, default in LATER_KEYS.items() if getattr(self, key) == default}
        content = {key: value for key, value in vars(self).items() if key not in words}
        content["bases"] = without_seconds(self.bases)
        bench = [
            self.bench_spec.recipe,
            list(flatten_pairs(self.bench_spec.settings)),
            without_seconds(self.bench_spec.bases),
            without_seconds(self.bench_spec.sizes),
        ]
        text = json.dumps([content, bench], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_seconds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sizes or bases, without what they cost."""
    return {name: {key: x for key, x in row.items() if key != "seconds"} for name, row in rows.items()}


def flatten_pairs(pairs: Sequence[Any]) -> Iterator[str]:
    """Settings of lists within lists: YAML's aliases name whole lists."""
    for pair in pairs:
        yield from [pair] if isinstance(pair, str) else flatten_pairs(pair)


@functools.cache
def read_benches() -> dict[str, Bench]:
    content = yaml.safe_load((FOLDER / f"{BENCHES}.yaml").read_text(encoding="utf-8"))
    return {name: Bench(**row) for name, row in content.items()}


@functools.cache
def read_papers() -> dict[str, Paper]:
    """All claims by name, in the order of the files."""
    files = (file for file in sorted(FOLDER.glob("*.yaml")) if file.stem != BENCHES)
    rows = [row for file in files for row in yaml.safe_load(file.read_text(encoding="utf-8")).items()]
    papers = {name: Paper(name=name, **row) for name, row in rows}
    assert len(papers) == len(rows), "names are unique over all files"
    return papers


def judge(expect: str, outcome: str) -> str:
    """confirmed, refuted, undecided or invalid. outcome: of the claim's arm, as the comparison words it."""
    if outcome == "invalid" or outcome.startswith("undecided"):
        return outcome.partition(" ")[0]
    return "confirmed" if outcome == CONFIRMS[expect] else "refuted"
