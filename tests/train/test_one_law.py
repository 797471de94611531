"""Objective x technique x {one process, DDP, FSDP2}: the same losses, norms and weights."""

from __future__ import annotations

import pytest
import torch

from llm_quest.train.parallel import DistributedContext
from tests.recipes.two import together
from tests.train.cells import CELLS, Cell, run_cell, run_cells


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def by_two(request, tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, dict]:
    """What two processes found in every cell."""
    file = tmp_path_factory.mktemp("cells") / "found.pt"
    together(run_cells, request.param, str(file))
    return torch.load(file)


@pytest.fixture(scope="module")
def results_of_one_process() -> dict[Cell, dict]:
    return {cell: run_cell(cell, DistributedContext()) for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_two_processes_train_as_one(cell: Cell, by_two: dict, results_of_one_process: dict):
    one, two = results_of_one_process[cell], by_two[cell]
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-5)
