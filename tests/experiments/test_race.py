"""`quest race`: the rules are kept, a record needs five seeds, an entry runs and is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_quest.errors import UsageError
from llm_quest.experiments.code_tree import own_code
from llm_quest.experiments.race import RaceRules, describe_entry, prepare_entry, run_race, score_entry
from tests.experiments.bench import write_text
from tests.experiments.test_ladder import InProcess

RULES = RaceRules()
TINY = ["tokenizer.vocab_size=300", "sequence_length=16", "batch_size=2", "max_steps=4", "warmup_steps=0"]


@pytest.mark.parametrize(
    ("pairs", "rules", "message"),
    [
        (["data.source=mine.txt"], RULES, "decides data and seeds"),
        (["model.load=runs/x"], RULES, "learns everything from its text"),
        ([], RaceRules(flops=1e6), "set max_steps=|take a smaller model"),
        ([], RaceRules(memory=1000), "set micro_batch_size=1"),
    ],
)
def test_what_the_rules_forbid_is_refused(pairs: list[str], rules: RaceRules, message: str):
    with pytest.raises(UsageError, match=message):
        prepare_entry("tiny", [*TINY, *pairs], rules, lambda line: None)


def test_epochs_are_no_budget():
    with pytest.raises(UsageError, match="counts steps beforehand"):
        prepare_entry("tiny", ["num_train_epochs=1"], RULES, lambda line: None)


def test_a_record_needs_five_seeds_and_an_interval_below_the_last():
    good, rules = [1.60, 1.601, 1.599, 1.60, 1.60], RaceRules(record=1.621)
    assert score_entry(good, 1e15, rules)["is_record"]
    assert not score_entry(good[:4], 1e15, rules)["is_record"]
    assert not score_entry([1.55, 1.67, 1.60, 1.59, 1.60], 1e15, rules)["is_record"], "too wide"
    assert describe_entry(score_entry([1.7], 5e13, rules)).endswith("no record")


def test_an_entry_is_run_and_kept(tmp_path: Path):
    rules = RaceRules(corpus=str(write_text(tmp_path / "text.txt")), held_out=0.2)
    pool: Any = InProcess()
    given: dict[str, Any] = {"root": tmp_path / "race", "code": own_code(), "pool": pool, "log": lambda line: None}
    first = run_race("tiny", [*TINY], 1, rules, **given)
    assert 2 < first["mean"] < 9
    assert not first["is_record"]
    assert 0 < first["flops"] < 1e12
    assert run_race("tiny", [*TINY], 1, rules, **given) == first
    assert len(pool.asked) == 1
