"""Claims of papers, each a row of `claims/*.yaml`, measured by paired experiments (`llm_quest.experiments`) until a
sequential test decides. `quest papers` lists them; `quest reproduce NAME` measures one and writes its card.

To add a claim, add a row."""

from __future__ import annotations

import difflib

from llm_quest.errors import UsageError
from llm_quest.papers.paper import Paper, read_papers

__all__ = ["PAPERS", "Paper", "load_paper"]

PAPERS: tuple[str, ...] = tuple(read_papers())


def load_paper(name: str) -> Paper:
    """The claim of that name. UsageError names the nearest."""
    if name not in PAPERS:
        near = difflib.get_close_matches(name, PAPERS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"no paper is called {name!r}{hint}; known: {', '.join(PAPERS)}")
    return read_papers()[name]
