"""`quest papers` and `quest reproduce NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.cache_dirs import lasting_cache_dir, require_results_dir
from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.files import atomic_write_json
from llm_quest.papers import PAPERS, load_paper
from llm_quest.papers.card import VERDICTS, PaperCard, load_card, shipped_verdicts, write_card
from llm_quest.papers.reproduce import describe_cost, measure_paper

CHECKOUT_CARDS = VERDICTS.parents[2] / "docs" / "papers"
"""The cards of the project, where the package lies in a checkout of it."""


def cards_dir() -> Path:
    """The folder of the cards that were measured on this machine, the same for every working directory."""
    return lasting_cache_dir("papers")


@dataclass(frozen=True)
class PaperEntry:
    """A claim. verdict: of the package's own card; here: of the card that was measured on this machine."""

    name: str
    title: str
    arxiv: str
    claim: str
    cost: str
    verdict: str
    here: str


@dataclass(frozen=True)
class PaperList:
    """All claims."""

    entries: tuple[PaperEntry, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]

    def lines(self) -> list[str]:
        result = []
        for entry in self.entries:
            result += [f"{entry.name:<20}{entry.title} (arXiv:{entry.arxiv})", f"{'':<20}{entry.claim}"]
            here = f"; here: {entry.here}" if entry.here else ""
            result += [f"{'':<20}{entry.verdict or 'not measured yet'}{here}", f"{'':<20}{entry.cost}", ""]
        return [*result, "measure one: quest reproduce NAME"]


def list_papers() -> PaperList:
    """The claims, with the verdicts that the package ships and those measured here."""
    shipped = shipped_verdicts()
    entries = []
    for paper in map(load_paper, PAPERS):
        card = load_card(paper, cards_dir())
        cost = describe_cost(paper, paper.all_sizes[0])
        own = describe_summary(card.summary()) if card else ""
        verdict = describe_summary(shipped[paper.name]) if paper.name in shipped else ""
        entries.append(PaperEntry(paper.name, paper.title, paper.arxiv, paper.claim, cost, verdict, own))
    return PaperList(tuple(entries))


def describe_summary(summary: dict[str, str]) -> str:
    return "{verdict} ({effect}; {sizes}, {date}, {machine})".format(**summary)


def reproduce_paper(
    name: str, *, sizes: Sequence[str], out: Path | None, jobs: int, minutes: float, first_seed: int, log: LogFn
) -> PaperCard:
    """Measure a claim at the given sizes, the first one if none are given, and write its card."""
    paper, folder = load_paper(name), out or cards_dir()
    measured, root = {}, require_results_dir("papers") / "experiments"
    for size in sizes or paper.all_sizes[:1]:
        result = measure_paper(paper, size, root, jobs=jobs, minutes=minutes, first_seed=first_seed, log=log)
        if result is not None:
            log(f"page: {result.pop('page')}")
            measured[size] = result
    if not measured:
        raise UsageError(f"{name} is not decided: --minutes {minutes:g} are too few; give more, and it goes on")
    card = write_card(paper, measured, folder)
    if folder.resolve() == CHECKOUT_CARDS.resolve():  # the project's own docs: the package ships their outcomes
        write_verdicts(folder)
    return card


def write_verdicts(folder: Path) -> None:
    cards = {name: load_card(load_paper(name), folder) for name in sorted(PAPERS)}
    atomic_write_json(VERDICTS, {name: card.summary() for name, card in cards.items() if card is not None})
