"""American spelling, as in PyTorch and transformers: who searches for a word finds it in one spelling."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "llm_quest", "book", "benchmarks", "docs", "tests")
OLD_RUNS = ROOT / "tests" / "data" / "v1"
"""Folders that an earlier version wrote: they are read, not edited."""

IZE = re.findall(
    r"\w+",
    """
amort anal apolog author binar canonical capital categor character critic custom digit discret emphas equal external
factor final formal general harmon ideal initial intern internal ital item linear local margin marginal material maxim
memor minim modular neutral normal optim organ orthogonal parameter parametr penal polar priorit quant random real
recogn regular sanit serial special stabil standard summar symmetr synchron token util vector virtual visual
""",
)
"""Words that American English ends in -ize, without that ending."""
WORDS = re.findall(
    r"\w+",
    """
behaviour colour endeavour favour flavour harbour honour humour labour neighbour rigour rumour vapour calibre centre
centring fibre litre manoeuvre metre theatre analogue catalogue artefact grey judgement licence mould labelled
labelling levelled modelled modelling signalled signalling travelled travelling paralyse practise sceptic amongst
learnt spelt whilst defence offence
""",
)
BRITISH = re.compile(rf"{'|'.join(WORDS)}|(?:{'|'.join(IZE)})is(?:e|ed|er|ers|es|ing|able|ations?)(?![a-z])")
ALLOWED = {
    "tests/test_spelling.py": Path(__file__).read_text(encoding="utf-8"),
    "llm_quest/recipes/old_keys.py": "select.renormalised",  # a key of earlier versions
    "llm_quest/data/step_labels.py": '"loader": "labelled steps"',  # part of a checkpoint's identity
    "llm_quest/data/synthetic_shapes.py": "what colour are the",  # data that models were trained on
    "tests/data/test_synthetic_shapes.py": "what colour are the",
    "tests/data/test_image_text.py": "what colour are the",
    "docs/LOG.md": "what colour are the",
    "llm_quest/data/generated_text.py": "criticised_reversals",  # a data set that a claim names
    "llm_quest/papers/claims/benches.yaml": "criticised_reversals",
    "llm_quest/hub/known_fields.py": "license|licence",  # both stand in published files
    "llm_quest/hub/wllama.py": "LICENCE",  # a file of another package
    "tests/cli/test_export_web.py": "LICENCE",
}
"""What stays as it is, by file."""


@functools.cache
def find_in_word(word: str) -> str:
    """The British spelling in a word, "" without one. Cached, for a text repeats its words."""
    found = BRITISH.search(word)
    return found[0] if found else ""


def find_british(text: str) -> list[str]:
    """The British spellings in a text, each once, sorted."""
    return sorted(set(map(find_in_word, set(re.findall("[a-z]{5,}|grey", text.lower())))) - {""})


def files_to_check() -> Iterator[Path]:
    for folder in FOLDERS:
        for ending in ("md", "py", "yaml"):
            files = (ROOT / folder).glob(f"*.{ending}") if folder == "." else (ROOT / folder).rglob(f"*.{ending}")
            yield from (file for file in files if OLD_RUNS not in file.parents)


def test_spelling_is_american():
    found = {}
    for file in files_to_check():
        name, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
        if name in ALLOWED:
            assert ALLOWED[name] in text, f"{name} has no {ALLOWED[name]!r} any more: take it out of ALLOWED"
            text = text.replace(ALLOWED[name], "")
        if british := find_british(text):
            found[name] = british
    assert not found


@pytest.mark.parametrize(
    ("text", "british"),
    [
        ("renormalised, an optimiser", ["normalised", "optimiser"]),
        ("Colours of a neighbour", ["colour", "neighbour"]),
        ("normalized, precise, exercise, analyses, a ModelLoss", []),
    ],
)
def test_british_words_are_recognized(text: str, british: list[str]):
    assert find_british(text) == british
