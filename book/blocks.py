"""Blocks that are made from the source: code, mistakes, mutations, figures."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Collection

from book import figures
from book.exercises import EXERCISES, PRACTICED
from book.games import GAMES
from book.markdown import color_code
from book.source import ROOT, code_of, mistakes_of
from llm_quest.papers.card import COLORS
from tests.mutations import MUTATIONS, Mutation

CARD_COLORS = {
    "fill: #ffffff": "fill: none", "#000000": "var(--ink)", "#888888": "var(--ink)", "#eeeeee": "var(--soft)",
    **{color: f"var(--s{number})" for number, color in enumerate(COLORS, start=1)},
}  # fmt: skip
"""What a card's plot is drawn with -> the variables of the page."""


def code_block(words: str, body: str = "") -> str:
    """The source of an anchor, under its place."""
    code = code_of(words)
    place = f"<figcaption>llm_quest/{code.file}, line {code.line}</figcaption>"
    return f'<figure class="source">{place}{color_code(code.text, "python")}</figure>'


def mistakes_block(words: str, body: str = "") -> str:
    """What is commonly got wrong, of a file."""
    items = "".join(f"<li>{with_marks(one)}</li>" for one in mistakes_of(words))
    return f'<ul class="mistakes">{items}</ul>' if items else ""


def mutations_of(file: str) -> list[Mutation]:
    return [one for one in MUTATIONS if one.file == file]


def mutations_of_tests(name: str, others: Collection[str] = ()) -> list[Mutation]:
    """Mutations that are caught by tests named after a family or a recipe, or chosen by its name (`-k gemma` chooses
    gemma1 too). others: names that are a page of their own (qwen3_next is no part of qwen3)."""

    def is_about(one: Mutation) -> bool:
        files, _, chosen = one.tests.partition(" -k ")
        named, words = re.findall(r"test_(\w+)", files), chosen.split() if "/models/" in files else []
        if any(name == word or name.startswith(f"{word}_") for word in named) or any(word in name for word in words):
            return True
        return any(re.match(rf"{name}(\d|_)", word) and word not in others for word in [*named, *words])

    return [one for one in MUTATIONS if is_about(one)]


def breaks_block(words: str, body: str = "") -> str:
    """Recorded mutations of a file: each a line that was changed, and the tests that fail then."""
    return "".join(map(mutation_block, mutations_of(words)))


def mutation_block(one: Mutation) -> str:
    removed = "".join(f"- {line}\n" for line in one.right.splitlines())
    added = "".join(f"+ {line}\n" for line in one.wrong.splitlines())
    return (
        f"<details class='breaks'><summary>{html.escape(one.title)}</summary>{color_code(removed + added, 'diff')}"
        f"<p>Fails: <code>pytest {html.escape(one.tests)}</code></p></details>"
    )


@functools.cache
def mutation_records() -> tuple[tuple[str, str, str], ...]:
    """(mistake, file, tests) of docs/mutations.md: what was tried once, by hand or by `python -m tests.mutate`."""
    lines = (ROOT / "docs/mutations.md").read_text(encoding="utf-8").splitlines()
    cells = [[one.strip() for one in line.strip(" |").split(" | ")] for line in lines if line.startswith("| ")]
    return tuple(
        (row[0], file, row[2])
        for row in cells
        if len(row) >= 3 and "::" in row[2]
        for file in re.findall(r"`([\w/]+\.py)", row[1])
    )


def recorded_mutations(file: str) -> list[tuple[str, str]]:
    """(mistake, tests) of a file that are on record and no longer made by the suite."""
    titles = {one.title for one in mutations_of(file)}
    return [(title, tests) for title, place, tests in mutation_records() if place == file and title not in titles]


def recorded_block(words: str, body: str = "") -> str:
    """Mistakes that are on record, and the tests that failed."""
    items = (f"<li>{html.escape(title)}: {tests_as_code(tests)}</li>" for title, tests in recorded_mutations(words))
    text = "".join(items)
    return f"<ul>{text}</ul>" if text else ""


def with_marks(text: str) -> str:
    """A text of a docstring with its *words* and `names` as HTML."""
    return re.sub(r"(?<![\w*])\*(\w[^*<>`]*)\*(?![\w*])", r"<em>\1</em>", tests_as_code(text))


def tests_as_code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def figure_block(words: str, body: str = "") -> str:
    """A figure, drawn while the book is built."""
    return figures.draw(words)


def exercises_block(words: str, file: str = "") -> str:
    """The exercises about a page or a chapter, and the games in which a line of its file is wrong."""
    about = [one for one in EXERCISES.values() if words in (one.chapter, *PRACTICED.get(one.name, ()))]
    asked = [(f"quest learn {one.name}", one.summary) for one in about]
    games = [number for number, one in enumerate(GAMES, start=1) if file == one.file]
    asked += [
        (f"quest learn break {number}", "One line of this file is wrong: find it by the law.") for number in games
    ]
    items = "".join(f"<li><code>{command}</code>: {html.escape(task)}</li>" for command, task in asked)
    return f"<ul>{items}</ul>" if items else ""


def card_block(words: str, body: str = "") -> str:
    """The plot of a paper's card, in the colors of the page, light or dark."""
    svg = (ROOT / f"docs/papers/{words}.svg").read_text(encoding="utf-8")
    for drawn, shown in CARD_COLORS.items():
        svg = svg.replace(drawn, shown)
    return f'<figure class="card" tabindex="0">{svg[svg.index("<svg") :]}</figure>'


BLOCKS = {
    "code": code_block,
    "mistakes": mistakes_block,
    "breaks": breaks_block,
    "figure": figure_block,
    "card": card_block,
}
