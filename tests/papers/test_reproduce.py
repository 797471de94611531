"""One experiment for real, a few steps of it, in its own processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llm_quest.data.corpus import gather
from llm_quest.data.split import split
from llm_quest.data.tokenizer import train_bpe
from llm_quest.data.tokens import prepare
from llm_quest.papers import muon, paper
from llm_quest.papers import reproduce as room
from llm_quest.papers.lab import VOCAB, Text
from llm_quest.papers.paper import Measured
from llm_quest.papers.reproduce import measure, reproduce


def little_text(folder: Path) -> Text:
    """Twenty documents instead of Python's own, whose tokenizer takes half a minute to train on a busy machine."""
    (folder / "texts").mkdir()
    for number in range(20):
        words = [f"{number * place % 97} times {place} is what {place * place} says." for place in range(200)]
        (folder / "texts" / f"{number}.txt").write_text(" ".join(words))
    parts = split(gather(str(folder / "texts")), held_out=0.2)
    tokenizer = train_bpe((document.text for document in parts.train), VOCAB)
    return Text(prepare(parts, tokenizer, folder / "tokens"), tokenizer)


def test_an_arm_measures_the_same_bits_again_and_other_seeds_other_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    little = little_text(tmp_path)
    monkeypatch.setattr(muon, "text", lambda: little)
    monkeypatch.setattr(muon, "STEPS", 3)
    first, again, other = measure("muon", "Muon", 1), measure("muon", "Muon", 1), measure("muon", "Muon", 2)
    assert first == again
    assert first.numbers["held-out loss"] != other.numbers["held-out loss"]
    assert 0 < first.numbers["held-out loss"] < math.log(VOCAB), "three steps have taught something"


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def pretend(name: str, pieces, jobs: int):
        for piece in pieces:
            asked.append(piece)
            yield piece, Measured({"held-out loss": 4.0 + len(asked)}, [(0.0, 1.0)])

    monkeypatch.setattr(room, "made", pretend)
    reproduce("muon", seeds=1, out=tmp_path, jobs=1, say=lambda text: None)
    reproduce("muon", seeds=2, out=tmp_path, jobs=1, say=lambda text: None)
    assert asked == [("AdamW", 1), ("Muon", 1), ("AdamW", 2), ("Muon", 2)]
    assert paper("muon").name == "muon"
