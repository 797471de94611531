"""`quest papers` and `quest reproduce NAME`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.disk import replace_json
from llm_quest.papers import PAPERS, paper
from llm_quest.papers.card import VERDICTS, Card, draw, drawn, recorded
from llm_quest.papers.reproduce import reproduce

Say = Callable[[str], None]
DOCS = Path("docs/papers")


@dataclass(frozen=True)
class Entry:
    """A paper on the shelf. verdict: from its card."""

    name: str
    title: str
    arxiv: str
    claim: str
    minutes: float
    verdict: str


@dataclass(frozen=True)
class Shelf:
    """All of them."""

    entries: tuple[Entry, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]

    def lines(self) -> list[str]:
        told = []
        for one in self.entries:
            told += [f"{one.name:<20}{one.title} (arXiv:{one.arxiv})", f"{'':<20}{one.claim}"]
            told += [f"{'':<20}{one.verdict or 'not measured here yet'}; about {one.minutes:g} minutes on one core", ""]
        return [*told, "measure one again: quest reproduce NAME"]


def shelf() -> Shelf:
    """The papers with their claims and recorded verdicts."""
    found = [paper(name) for name in PAPERS]
    return Shelf(tuple(Entry(p.name, p.title, p.arxiv, p.claim, p.minutes, recorded(DOCS, p.name)) for p in found))


def again(name: str, *, seeds: int, out: Path | None, jobs: int, say: Say) -> Card:
    """Measure, judge, draw."""
    chosen, folder = paper(name), out or DOCS
    say(
        f"{chosen.title}: {len(chosen.arms)} arms, {seeds} seeds, about {chosen.minutes * seeds / 3 / jobs:.0f} minutes"
    )
    card = draw(chosen, reproduce(name, seeds=seeds, out=folder, jobs=jobs, say=say), folder)
    if folder.resolve() == VERDICTS.parents[2] / DOCS:  # the project's own docs: the package ships their outcomes
        replace_json(VERDICTS, {name: verdict for name in sorted(PAPERS) if (verdict := drawn(folder, name))})
    return card
