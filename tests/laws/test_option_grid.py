"""Options proved together: technique x family x dtype x compile x cached generation of padded prompts."""

from __future__ import annotations

import pytest

from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES
from tests.forked import run_forked
from tests.laws.option_grid import CHANGES, DTYPES, REFUSED_CELLS, Cell, all_cells, main, part_of_suite, suite_cells
from tests.laws.subjects import TINY

PARTS = 2


def test_every_technique_family_and_dtype_is_in_the_grid_and_every_technique_and_dtype_compiled_somewhere():
    cells = set(all_cells())
    assert {cell.technique for cell in cells} >= {"none", *TECHNIQUES, *TRAINING_TECHNIQUES}
    assert len(cells) == len(CHANGES) * len(TINY) * len(DTYPES) * 2
    judged = set(suite_cells())
    assert judged <= cells
    for compiled in (False, True):
        chosen = [cell for cell in judged if cell.compiled is compiled]
        for column, expected in (("technique", CHANGES), ("page", TINY), ("dtype", DTYPES)):
            found = {getattr(cell, column) for cell in chosen}
            assert found == set(expected) or (compiled and column == "page"), "test_compiled.py compiles every family"
    assert set(REFUSED_CELLS) <= cells


@pytest.mark.parametrize("part", range(PARTS))
def test_every_cell_holds_or_raises_the_error_that_the_table_names(part: int):
    """`python -m tests.laws.option_grid --all` judges the cells that are left out here."""
    lines = run_forked(main, str(part), str(PARTS))
    assert not [line for line in lines if "FAILS" in line]
    assert len(lines) == len(part_of_suite(part, PARTS))


def test_a_cell_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """The judge itself: a refusal that does not come, and a compiled step that is off."""
    from tests.laws import option_grid

    fine = Cell("none", "gpt2-tiny", "float32", False)
    assert option_grid.verdict(fine) == "holds"
    monkeypatch.setitem(option_grid.REFUSED_CELLS, fine, (ValueError, "never"))
    assert option_grid.verdict(fine) == "FAILS: should raise ValueError"
    monkeypatch.delitem(option_grid.REFUSED_CELLS, fine)
    monkeypatch.setattr(option_grid, "eager_step", lambda *step: 1.001 * option_grid.decode_step(*step))
    assert "off by 0.001" in option_grid.verdict(fine)
