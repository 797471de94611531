"""Blocks that are made from the source: code, mistakes, mutations, figures."""

from __future__ import annotations

import html

from book import figures
from book.markdown import colour_code
from book.source import ROOT, code_of, mistakes_of
from tests.mutations import MUTATIONS, Mutation


def code_block(words: str, body: str = "") -> str:
    """The source of an anchor, under its place."""
    code = code_of(words)
    place = f"<figcaption>llm_quest/{code.file}, line {code.line}</figcaption>"
    return f'<figure class="source">{place}{colour_code(code.text, "python")}</figure>'


def mistakes_block(words: str, body: str = "") -> str:
    """What is commonly got wrong, of a file."""
    items = "".join(f"<li>{html.escape(one)}</li>" for one in mistakes_of(words))
    return f'<ul class="mistakes">{items}</ul>' if items else ""


def mutations_of(file: str) -> list[Mutation]:
    return [one for one in MUTATIONS if one.file == file]


def breaks_block(words: str, body: str = "") -> str:
    """Recorded mutations of a file: each a line that was changed, and the tests that fail then."""
    return "".join(map(mutation_block, mutations_of(words)))


def mutation_block(one: Mutation) -> str:
    removed = "".join(f"- {line}\n" for line in one.right.splitlines())
    added = "".join(f"+ {line}\n" for line in one.wrong.splitlines())
    return (
        f"<details class='breaks'><summary>{html.escape(one.title)}</summary>{colour_code(removed + added, 'diff')}"
        f"<p>Fails: <code>pytest {html.escape(one.tests)}</code></p></details>"
    )


def figure_block(words: str, body: str = "") -> str:
    """A figure, drawn while the book is built."""
    return figures.draw(words)


def card_block(words: str, body: str = "") -> str:
    """The plot of a paper's card."""
    svg = (ROOT / f"docs/papers/{words}.svg").read_text(encoding="utf-8")
    return f'<figure class="plot">{svg[svg.index("<svg") :]}</figure>'


BLOCKS = {
    "code": code_block,
    "mistakes": mistakes_block,
    "breaks": breaks_block,
    "figure": figure_block,
    "card": card_block,
}
