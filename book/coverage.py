"""`python -m book.coverage`: which parts of the template each page of the book lacks. Parts are made as for the site;
nothing runs. A page without a required part ends it with 1."""

from __future__ import annotations

import re
import sys
from collections import Counter

from book import site
from book.catalog import KINDS, Subject, all_subjects
from book.site import Book

SHARED = ("Question", "Idea", "Source code", "Switch it on", "Sources")
TAUGHT = (*SHARED, "What breaks without it", "Commonly got wrong")
REQUIRED = {
    "family": (*TAUGHT, "Figure", "Sizes"),
    "layer": TAUGHT,
    "technique": TAUGHT,
    "objective": TAUGHT,
    "generation": TAUGHT,
    "recipe": (*TAUGHT, "Settings"),
    "paper": (*SHARED, "The experiment"),
}
"""What a page of each kind has to have. A family's figure is the diagram of its blocks."""
OPTIONAL = ("Equation", "Figure", "Measured here", "Exercises")
"""Where there is one: an equation (its symbols are then explained, by a test), a plot, a measurement, an exercise."""


MARKS = {
    "Question": "class='question'",
    "Source code": '<figure class="source">',
    "Equation": "<h3>Symbols</h3>",
    "Figure": '<figure class="plot"',
}
"""Parts that are no heading, by how they are marked."""
SAME = {"Blocks": "Figure", "Card": "Measured here"}


def parts_of(page: str) -> set[str]:
    """The parts of the template that a page of HTML has."""
    found = set(re.findall(r"<h2[^>]*>(.*?)</h2>", page)) | {part for part, mark in MARKS.items() if mark in page}
    return found | {part for heading, part in SAME.items() if heading in found}


def missing_parts(kind: str, page: str) -> list[str]:
    """The required parts that a page of this kind has not."""
    found = parts_of(page)
    return [part for part in REQUIRED[kind] if part not in found]


def page_of(subject: Subject) -> str:
    """The page as the site has it, without running its command."""
    return next(site.make_subject_pages(Book({one.key: (one.path, one.key) for one in all_subjects()}), [subject])).body


def main() -> int:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    lacking = 0
    for subject in all_subjects():
        page = page_of(subject)
        counts[subject.kind].update(["pages", *parts_of(page)])
        if missing := missing_parts(subject.kind, page):
            lacking += 1
            print(f"{subject.key} lacks: {', '.join(missing)}")
    columns = list(dict.fromkeys([*TAUGHT, *OPTIONAL]))
    print(f"| pages | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for kind, having in counts.items():
        print(f"| {having['pages']} {kind} | {' | '.join(str(having[part]) for part in columns)} |")
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
