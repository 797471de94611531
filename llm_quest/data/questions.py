"""Questions and answers that come with Python: what each function of the standard library does, in its own words. So
every recipe runs without a file; results compare between runs with one Python version only.

      {"prompt": "What does textwrap.dedent(text) do?", "completion": "Remove any common leading whitespace from ..."}

Preferred is one whole sentence: the rejected answer is cut off, or runs on into another function's. (The right answer
against another function's takes knowledge that a small model lacks: docs/LOG.md.) The three kinds of built-in text
(help, docstrings, source) are what the classifier tells apart."""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterator

from llm_quest.data.corpus import BUILTIN, collector_paused, documented, modules
from llm_quest.data.problems.problem import chance
from llm_quest.data.records import Record, read_records
from llm_quest.errors import UsageError

SHORTEST, LONGEST = 15, 160
FEWEST, RUN_ON = 5, 1 / 3
PIECE = 200
PIECES = 400


def described() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(module, its functions with the first sentence of what is said of them)."""
    with collector_paused(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        for file, name in modules():
            if "_" not in name and name.count(".") < 2:
                pieces = (piece.partition("\n\n") for piece in documented(ast.parse(file.read_bytes()), name))
                said = [(head, sentence(text)) for head, _, text in pieces if "(" in head and "._" not in head]
                yield name, [(head, text) for head, text in said if SHORTEST <= len(text) <= LONGEST]


def sentence(text: str) -> str:
    """The first one, on one line; empty if it does not end."""
    found = re.match(r"(.+?[.!?])(\s|$)", re.sub(r"\s+", " ", text.partition("\n\n")[0]).strip())
    return found.group(1) if found else ""


def answers() -> Iterator[Record]:
    """Questions with their answers."""
    for module, said in described():
        yield from (Record({"prompt": question(head), "completion": text}, f"builtin:{module}") for head, text in said)


def preferences() -> Iterator[Record]:
    """Questions with an answer that is one whole sentence, and one that is less or more than that."""
    for module, said in described():
        for (head, text), (_, other) in itertools.pairwise([*said, *said[:1]]):
            if len(text.split()) >= FEWEST:
                row = {"prompt": question(head), "chosen": text, "rejected": worse(head, text, other)}
                yield Record(row, f"builtin:{module}")


def worse(head: str, text: str, other: str) -> str:
    """The answer with another function's behind it, or without its last words (two at least go, two stay); which, the
    question alone decides."""
    drawn, words = chance("worse", head), text.split()
    if drawn.random() < RUN_ON:
        return f"{text} {other}"
    return " ".join(words[: drawn.randrange(2, len(words) - 1)]).rstrip(".,;:")


def kinds() -> Iterator[Record]:
    """Pieces of text, and which kind of text they are from."""
    for label, documents in BUILTIN.items():
        texts = (piece for document in documents() for piece in cut(document.text))
        chosen = sorted(itertools.islice(texts, 20 * PIECES), key=lambda text: hashlib.sha256(text.encode()).digest())
        yield from (Record({"text": text, "label": label}, f"builtin:{label}") for text in chosen[:PIECES])


def cut(text: str) -> Iterator[str]:
    """Whole lines, about PIECE characters of them."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece.strip()[: 2 * PIECE]
            piece = ""


def question(head: str) -> str:
    return f"What does {head} do?"


def rows(source: str, builtin: Callable[[], Iterator[Record]]) -> list[Record]:
    """The rows of a file, or those that come with Python."""
    if source == "builtin":
        return list(builtin())
    if source.startswith("builtin:"):
        raise UsageError(f"data.source {source}: for this recipe it is builtin alone, or a file")
    return read_records(source)
