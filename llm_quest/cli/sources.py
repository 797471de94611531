"""`quest data`: the built-in corpora, and what a source holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_quest.data.corpus import BUILTIN, Corpus, gather


@dataclass(frozen=True)
class Listing:
    """The parts of the built-in corpus as they are on this Python."""

    parts: tuple[Corpus, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [part.as_json() for part in self.parts]

    def lines(self) -> list[str]:
        told = [f"{part.name:<20}{len(part.documents):>6,} documents {part.nbytes:>12,} bytes" for part in self.parts]
        return [
            *told,
            f"text of Python {self.parts[0].python} itself (PSF licence): another Python has another text",
            "combine parts (builtin:topics,docstrings), or give a file or folder of your own: quest data SOURCE",
        ]


def listed() -> Listing:
    """All of them, read and counted."""
    return Listing(tuple(gather(f"builtin:{part}") for part in BUILTIN))


def ledger_of(source: str, *, column: str = "text", separator: str | None = None) -> Corpus:
    """A source with its ledger."""
    return gather(source, column=column, separator=separator)
