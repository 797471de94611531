"""One experiment for real, a few steps of it, in its own processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llm_quest.data.corpus import load_corpus
from llm_quest.data.split import split_corpus
from llm_quest.data.tokens import prepare_token_folder
from llm_quest.data.vocabulary import train_bpe
from llm_quest.papers import PAPERS, load_paper, muon, reproduce
from llm_quest.papers.lab import LAB_VOCAB_SIZE, LabText
from llm_quest.papers.paper import Measurement
from llm_quest.papers.reproduce import code_fingerprint, code_text, measure_arm, run_experiment


def little_text(folder: Path) -> LabText:
    """Twenty documents instead of Python's own, whose tokenizer takes half a minute to train on a busy machine."""
    (folder / "texts").mkdir()
    for number in range(20):
        words = [f"{number * place % 97} times {place} is what {place * place} says." for place in range(200)]
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    parts = split_corpus(load_corpus(str(folder / "texts")), held_out=0.2)
    tokenizer = train_bpe((document.text for document in parts.train), LAB_VOCAB_SIZE)
    return LabText(prepare_token_folder(parts, tokenizer, folder / "tokens"), tokenizer)


def test_an_arm_measures_the_same_bits_again_and_other_seeds_other_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    little = little_text(tmp_path)
    monkeypatch.setattr(muon, "lab_text", lambda: little)
    monkeypatch.setattr(muon, "STEPS", 3)
    first, again, other = measure_arm("muon", "Muon", 1), measure_arm("muon", "Muon", 1), measure_arm("muon", "Muon", 2)
    assert first == again
    assert first.numbers["held-out loss"] != other.numbers["held-out loss"]
    assert 0 < first.numbers["held-out loss"] < math.log(LAB_VOCAB_SIZE), "three steps have taught something"


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def pretend(name: str, pieces, jobs: int):
        for piece in pieces:
            asked.append(piece)
            yield piece, Measurement({"held-out loss": 4.0 + len(asked)}, [(0.0, 1.0)])

    monkeypatch.setattr(reproduce, "run_measurements", pretend)
    run_experiment("muon", seeds=1, out=tmp_path, jobs=1, log=lambda text: None)
    run_experiment("muon", seeds=2, out=tmp_path, jobs=1, log=lambda text: None)
    assert asked == [("AdamW", 1), ("Muon", 1), ("AdamW", 2), ("Muon", 2)]
    assert load_paper("muon").name == "muon"


def test_other_words_are_the_same_code_and_other_numbers_are_not() -> None:
    code = '"""Words."""\nARMS = {\n    "a": f(1, 2)\n}\n\n\ndef g():\n    """More."""\n    return 1\n'
    again = 'ARMS = {"a": f(1, 2,)}  # said again\ndef g():\n    """Other words."""\n    return 1\n'
    assert code_text(code) == code_text(again)
    for old, new in (("1, 2", "1, 3"), ('"a"', '"b"'), ("return 1", "return 2")):
        assert code_text(code.replace(old, new)) != code_text(code)


@pytest.mark.parametrize("name", PAPERS)
def test_the_recorded_measurements_are_those_of_the_present_code(name: str) -> None:
    """After a change that leaves the numbers as they were to the bit, write the new fingerprint into the file."""
    file = Path(__file__).parents[2] / "docs" / "papers" / f"{name}.json"
    assert json.loads(file.read_text(encoding="utf-8"))["code"] == code_fingerprint(load_paper(name))
