"""`python -m book.coverage`: which parts each page of the book lacks. Parts are made as for the site; nothing runs."""

from __future__ import annotations

import sys
from collections import Counter

from book.blocks import BLOCKS
from book.catalog import KINDS, Subject, all_subjects
from book.markdown import Renderer
from book.pages import make_sections
from book.site import Book

PARTS = ("Idea", "Switch it on", "What breaks without it", "Commonly got wrong", "Measured here", "Sources")


def missing_parts(subject: Subject) -> list[str]:
    """The parts of the template that a page has not."""
    here = {heading for heading, _ in make_sections(subject, Renderer(dict(BLOCKS), anything))}
    return [part for part in PARTS if part not in here]


def anything(key: str) -> tuple[str, str]:
    """A link to any page, without looking whether it is there."""
    return Book({key: ("", key)}).link(key)


def main() -> int:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for subject in all_subjects():
        counts[subject.kind]["pages"] += 1
        if missing := missing_parts(subject):
            counts[subject.kind].update(missing)
            print(f"{subject.key}: {', '.join(missing)}")
    print(f"\n| lacks | pages | {' | '.join(PARTS)} |\n| --- | --- |{' --- |' * len(PARTS)}")
    for kind, found in counts.items():
        print(f"| {kind} | {found['pages']} | {' | '.join(str(found[part]) for part in PARTS)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
