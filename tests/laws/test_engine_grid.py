"""Recipe x technique x {one process, DDP, FSDP2}: the same losses; and one error of the main process for all. A sample
of the whole grid, `python -m tests.laws.engine_grid`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.laws.engine_grid import ENGINES, GRID_TECHNIQUES, QUICK, Cell, error_verdict, suite_cells, verdicts
from tests.recipes.every_recipe import prepare

REFUSED_CELLS = {
    "score_head": "score head in place of the head over the vocabulary",
    "length": "rotation is scaled already",
}
"""Technique -> why the recipe of its cell refuses it, or the model there. (A longer context on a model that takes it:
tests/train/test_one_law.py.)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def cell_verdicts(folder: Path) -> dict[Cell, str]:
    return dict(verdicts(suite_cells(), folder))


def test_the_sample_has_every_technique_both_engines_and_several_recipes():
    assert [cell.technique for cell in suite_cells()] == GRID_TECHNIQUES
    assert {cell.engine for cell in suite_cells()} == set(ENGINES)
    assert {cell.recipe for cell in suite_cells()} == set(QUICK)


@pytest.mark.parametrize("cell", suite_cells(), ids=" ".join)
def test_two_processes_lose_what_one_loses(cell: Cell, cell_verdicts: dict[Cell, str]):
    if (why := REFUSED_CELLS.get(cell.technique)) is not None:
        assert cell_verdicts[cell].startswith("refused: ")
        assert why in cell_verdicts[cell]
    else:
        assert cell_verdicts[cell] == "holds"


def test_an_error_of_the_main_process_in_a_step_ends_both_with_its_code(folder: Path):
    assert error_verdict("dpo", "step", folder) == "holds"
