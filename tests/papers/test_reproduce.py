"""One experiment for real, a few steps of it, in its own processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quest.papers import muon
from llm_quest.papers.reproduce import measure, reproduce


def test_an_arm_measures_the_same_bits_again_and_other_seeds_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "STEPS", 3)
    first, again, other = measure("muon", "Muon", 1), measure("muon", "Muon", 1), measure("muon", "Muon", 2)
    assert first == again
    assert first.numbers["held-out loss"] != other.numbers["held-out loss"]
    assert 5 < first.numbers["held-out loss"] < 8


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_quest.papers import paper
    from llm_quest.papers import reproduce as room
    from llm_quest.papers.paper import Measured

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
