"""The offline tour in small: it interrupts itself, goes on, exports, loads again, and tells where it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_quest.cli.tour import tour
from llm_quest.errors import UsageError

SMALL = (
    "data.source=builtin:topics",
    "tokenizer.vocab=300",
    "model.sizes={width: 32, layers: 1, heads: 2, groups: 1, hidden: 64}",
    "batch={rows: 2, length: 32}",
    "steps=6",
    "schedule.warmup=1",
    "evaluate.tokens=200",
    "evaluate.every=0",
    "samples.every=3",
    "samples.tokens=4",
    "precision=fp32",
)


def test_the_tour_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    found = tour(tmp_path / "run", pairs=SMALL, say=told.append)
    assert 2 <= found.resumed_at < 6
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events.index("interrupted") < events.index("resumed") < events.index("finished")
    assert found.reload_difference == 0.0
    assert Path(found.report).is_file()
    assert (Path(found.export) / "model.safetensors").is_file()
    assert found.best_ngram == min(bits for name, bits in found.baselines.items() if "Kneser-Ney" in name)
    lines = found.lines()
    assert any("llama3-style" in line and f"{found.bits_per_byte:.3f}" in line for line in lines)
    assert [line for line in told if line[:2] in ("1.", "2.", "3.", "4.", "5.", "6.")] == [
        line for line in told if line[:1].isdigit()
    ]

    again = tour(tmp_path / "run", pairs=SMALL, say=lambda line: None)
    assert again.bits_per_byte == found.bits_per_byte


def test_a_folder_that_is_no_tour_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not from an earlier tour"):
        tour(tmp_path, say=lambda line: None)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
