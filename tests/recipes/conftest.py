"""Text to train on, and a cache of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "and",
    "the",
    "small",
    "cat",
    "sleeps",
    "while",
    "a",
    "large",
    "bird",
    "sings",
    "of",
    "rain",
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Twenty documents of invented sentences."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        chosen = [WORDS[(number * 7 + place * (number + 3)) % len(WORDS)] for place in range(60)]
        (folder / f"{number:02}.txt").write_text(" ".join(chosen) + ".\n", encoding="utf-8")
    return folder
