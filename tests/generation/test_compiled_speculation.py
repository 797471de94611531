"""Compiled speculation is the eager one: same texts, same guesses, few graphs."""

from __future__ import annotations

import json

from llm_quest.generation.compiled import COMPILED_WIDTHS, choose_width
from tests.forked import run_forked
from tests.generation.compiled_speculation import main


def test_compiled_passes_write_and_guess_what_eager_ones_do():
    """Ragged rows that end early, a ring, a recurrent layer, the end of the context, every drafter."""
    found = json.loads(run_forked(main, "eager")[-1])
    assert all(found["texts"].values()), found["texts"]
    assert all(found["ends"].values()), found["ends"]
    assert all(found["last_place"]), found["last_place"]
    for accepted, tested in found["judged"].values():
        assert accepted == tested > 10
    assert all(found["modules"]), found["modules"]
    assert found["graphs"][0] <= len(COMPILED_WIDTHS) + 1, "a pass per width and one lookahead"
    assert found["graphs"][1] == 0, "later calls of the same shapes find them again"
    assert found["breaks"] == 0


def test_a_pass_takes_the_narrowest_width_that_holds_its_columns():
    assert [choose_width(columns) for columns in (1, 2, 3, 4, 9, 10, 17, 18)] == [1, 3, 3, 5, 9, 17, 17, None]
