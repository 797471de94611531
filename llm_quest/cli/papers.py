"""`quest papers` and `quest reproduce NAME`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.files import atomic_write_json, cache_dir
from llm_quest.papers import PAPERS, load_paper
from llm_quest.papers.card import VERDICTS, PaperCard, outcome_of_card, recorded_verdict, write_card
from llm_quest.papers.reproduce import run_experiment

CHECKOUT_CARDS = VERDICTS.parents[2] / "docs" / "papers"
"""The cards of the project, where the package lies in a checkout of it."""


def cards_dir() -> Path:
    """Where cards are read and written, whatever the working directory: the project's docs/papers, or for an installed
    package a folder of the user's cache."""
    return CHECKOUT_CARDS if CHECKOUT_CARDS.is_dir() else cache_dir("papers")


@dataclass(frozen=True)
class PaperEntry:
    """A paper with its claim. verdict: from its card, empty if there is none."""

    name: str
    title: str
    arxiv: str
    claim: str
    minutes: float
    verdict: str


@dataclass(frozen=True)
class PaperList:
    """All papers."""

    entries: tuple[PaperEntry, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]

    def lines(self) -> list[str]:
        result = []
        for one in self.entries:
            result += [f"{one.name:<20}{one.title} (arXiv:{one.arxiv})", f"{'':<20}{one.claim}"]
            result += [
                f"{'':<20}{one.verdict or 'not measured here yet'}; about {one.minutes:g} minutes on one core",
                "",
            ]
        return [*result, "measure one again: quest reproduce NAME"]


def list_papers() -> PaperList:
    """The papers with their claims and recorded verdicts."""
    found = [load_paper(name) for name in PAPERS]
    return PaperList(
        tuple(
            PaperEntry(p.name, p.title, p.arxiv, p.claim, p.minutes, recorded_verdict(cards_dir(), p.name))
            for p in found
        )
    )


def reproduce_paper(name: str, *, seeds: int, out: Path | None, jobs: int, log: LogFn) -> PaperCard:
    """Run the experiment, and write the card with its verdict and figure."""
    chosen, folder = load_paper(name), out or cards_dir()
    log(
        f"{chosen.title}: {len(chosen.arms)} arms, {seeds} seeds, about {chosen.minutes * seeds / 3 / jobs:.0f} minutes"
    )
    card = write_card(chosen, run_experiment(name, seeds=seeds, out=folder, jobs=jobs, log=log), folder)
    if folder.resolve() == CHECKOUT_CARDS.resolve():  # the project's own docs: the package ships their outcomes
        atomic_write_json(
            VERDICTS, {name: verdict for name in sorted(PAPERS) if (verdict := outcome_of_card(folder, name))}
        )
    return card
