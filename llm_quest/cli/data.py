"""`quest data`: lists the built-in corpora, or summarises a data source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_quest.data.corpus import BUILTIN_CORPORA, Corpus, load_corpus


@dataclass(frozen=True)
class CorpusList:
    """The parts of the built-in corpus on this version of Python."""

    parts: tuple[Corpus, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [part.as_json() for part in self.parts]

    def lines(self) -> list[str]:
        result = [f"{part.name:<20}{len(part.documents):>6,} documents {part.nbytes:>12,} bytes" for part in self.parts]
        return [
            *result,
            f"from Python {self.parts[0].python} (PSF licence); another version of Python gives another text",
            "combine parts (builtin:topics,docstrings), or give a file or folder of your own: quest data SOURCE",
        ]


def list_builtin_corpora() -> CorpusList:
    """All built-in corpora, loaded and counted."""
    return CorpusList(tuple(load_corpus(f"builtin:{part}") for part in BUILTIN_CORPORA))


def load_source(source: str, *, column: str = "text", separator: str | None = None) -> Corpus:
    """A data source, with the counts of what was dropped and why."""
    return load_corpus(source, columns={"text": column}, separator=separator)
