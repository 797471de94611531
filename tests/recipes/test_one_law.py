"""Recipe x {one process, DDP, FSDP2}: the same losses and norms; and a run goes on with them on another number of
processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.every_recipe import (
    NAMES,
    copy_up_to_step_1,
    make_every_run,
    metric_rows,
    run_all_by_two,
    run_tiny,
)
from tests.recipes.two import together
from tests.shared_folder import shared_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every recipe as one process runs it."""
    return shared_folder(tmp_path_factory, "runs", make_every_run)


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every recipe as two processes run it."""
    return shared_folder(tmp_path_factory, "two", lambda two: together(run_all_by_two, str(folder), str(two)))


def assert_same_rows(found: Path, wanted: Path) -> None:
    mine, theirs = metric_rows(found), metric_rows(wanted)
    assert mine.keys() == theirs.keys()
    for run, rows in theirs.items():
        assert len(mine[run]) == len(rows) >= 1
        for one, other in zip(mine[run], rows, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5), run


@pytest.mark.parametrize("recipe", NAMES)
def test_two_processes_lose_what_one_loses(recipe: str, folder: Path, two: Path):
    """By FSDP2; by DDP see below, and tests/train/test_one_law.py."""
    assert_same_rows(two / "fsdp" / recipe, folder / "alone" / recipe)


@pytest.mark.parametrize("recipe", NAMES)
def test_two_processes_go_on_where_one_was(recipe: str, folder: Path, two: Path):
    assert_same_rows(two / "ddp" / recipe, folder / "alone" / recipe)


@pytest.mark.parametrize("recipe", NAMES)
def test_one_process_goes_on_where_two_were(recipe: str, folder: Path, two: Path, tmp_path: Path):
    copy_up_to_step_1(two / "fsdp" / recipe, tmp_path / recipe)
    run_tiny(recipe, folder, tmp_path / recipe)
    assert_same_rows(tmp_path / recipe, folder / "alone" / recipe)
