"""Questions and answers that come with Python: what each function of the standard library does, in its own words. So
every recipe runs without a file; results compare between runs with one Python version only.

      {"prompt": "What does textwrap.dedent(text) do?", "completion": "Remove any common leading whitespace from ..."}

The preferred answer is one whole sentence: the rejected one is cut off, or runs on into another function's. (The right
answer against another function's takes knowledge that a small model lacks: docs/LOG.md.) The three kinds of built-in
text (help, docstrings, source) are the classes of the classifier."""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import warnings
from collections.abc import Iterator

from llm_quest.data.corpus import BUILTIN_CORPORA, iter_docstrings, pause_garbage_collection, stdlib_modules
from llm_quest.data.problems.problem import make_rng
from llm_quest.data.records import Record

MIN_ANSWER_CHARACTERS, MAX_ANSWER_CHARACTERS = 15, 160
MIN_ANSWER_WORDS, RUN_ON_PROBABILITY = 5, 1 / 3
PIECE_CHARACTERS = 200
PIECES_PER_LABEL = 400


def stdlib_functions() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Per module, its functions with the first sentence of their docstrings."""
    with pause_garbage_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        for file, name in stdlib_modules():
            if "_" not in name and name.count(".") < 2:
                pieces = (piece.partition("\n\n") for piece in iter_docstrings(ast.parse(file.read_bytes()), name))
                documented = [
                    (head, extract_first_sentence(text)) for head, _, text in pieces if "(" in head and "._" not in head
                ]
                yield (
                    name,
                    [
                        (head, text)
                        for head, text in documented
                        if MIN_ANSWER_CHARACTERS <= len(text) <= MAX_ANSWER_CHARACTERS
                    ],
                )


def extract_first_sentence(text: str) -> str:
    """The first sentence, on one line; empty if it does not end."""
    match = re.match(r"(.+?[.!?])(\s|$)", re.sub(r"\s+", " ", text.partition("\n\n")[0]).strip())
    return match.group(1) if match else ""


def builtin_instructions() -> Iterator[Record]:
    """Questions with their answers."""
    for module, functions in stdlib_functions():
        yield from (
            Record({"prompt": format_question(head), "completion": text}, f"builtin:{module}")
            for head, text in functions
        )


def builtin_preferences() -> Iterator[Record]:
    """Questions with an answer of one whole sentence, and one that is less or more than that."""
    for module, functions in stdlib_functions():
        for (head, text), (_, other) in itertools.pairwise([*functions, *functions[:1]]):
            if len(text.split()) >= MIN_ANSWER_WORDS:
                row = {"prompt": format_question(head), "chosen": text, "rejected": corrupt_answer(head, text, other)}
                yield Record(row, f"builtin:{module}")


def corrupt_answer(head: str, text: str, other: str) -> str:
    """The answer with another function's after it, or without its last words (two at least go, two stay); the
    question alone decides which."""
    drawn, words = make_rng("worse", head), text.split()
    if drawn.random() < RUN_ON_PROBABILITY:
        return f"{text} {other}"
    return " ".join(words[: drawn.randrange(2, len(words) - 1)]).rstrip(".,;:")


def builtin_labeled_texts() -> Iterator[Record]:
    """Pieces of text, labeled with the kind of text they are from."""
    for label, documents in BUILTIN_CORPORA.items():
        texts = (piece for document in documents() for piece in split_pieces(document.text))
        chosen = sorted(
            itertools.islice(texts, 20 * PIECES_PER_LABEL), key=lambda text: hashlib.sha256(text.encode()).digest()
        )
        yield from (Record({"text": text, "label": label}, f"builtin:{label}") for text in chosen[:PIECES_PER_LABEL])


def split_pieces(text: str) -> Iterator[str]:
    """Pieces of whole lines, of about PIECE characters."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE_CHARACTERS:
            yield piece.strip()[: 2 * PIECE_CHARACTERS]
            piece = ""


def format_question(head: str) -> str:
    return f"What does {head} do?"
