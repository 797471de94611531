"""Checkpoints of FSDP2: every process writes its part, and any number of processes goes on from them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from llm_quest.cli.export import consolidate_run
from llm_quest.errors import DataError
from llm_quest.hub.locate import require_whole
from llm_quest.manifest import find_fault
from llm_quest.train.checkpoint import load_checkpoint
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.sharded_checkpoint import consolidate_checkpoint, open_shards
from tests.recipes.two import together
from tests.train.small import Rule, go, objective

LAST = "checkpoints/step-00000004"


def train_by_two(folder: Path, steps: int, optimizer: str) -> None:
    """FSDP2 on two processes; a warning of things to come is an error."""
    warnings.simplefilter("error", FutureWarning)
    parallel = DistributedContext.from_environment("cpu", "fsdp")
    with RunDir(folder, is_main_process=parallel.is_main_process) as run:
        made = objective(dropout=0.1)
        parallel.parallelize(made, list(made.model.blocks))
        more = {"optimizer": optimizer, "parallel": parallel, "save_steps": 2, "save_total_limit": 0}
        go(steps, run, made=made, feed=Rule(micro=2, share=parallel.data_shard), **more)


def straight_and_resumed(folder: str, optimizer: str) -> None:
    """A run of four steps, and the same run killed after two and resumed."""
    DistributedContext.from_environment("cpu")
    straight, resumed = Path(folder) / "straight", Path(folder) / "resumed"
    train_by_two(straight, 4, optimizer)
    train_by_two(resumed, 2, optimizer)
    train_by_two(resumed, 4, optimizer)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def runs(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    together(straight_and_resumed, str(folder), request.param)
    return folder


def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(runs: Path):
    one, two = (open_shards(runs / name / LAST) for name in ("straight", "resumed"))
    for kind in ("model", "optimizer"):
        mine, theirs = one.read(kind), two.read(kind)
        assert mine.keys() == theirs.keys()
        assert len(mine) >= 10
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_every_process_writes_its_part_and_the_manifest_has_all(runs: Path):
    folder = runs / "straight" / LAST
    names = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert sum(name.startswith("shards/shard-0000") for name in names) == 2
    assert find_fault(folder) == ""
    assert not any(path.suffix in (".pt", ".metadata", ".distcp") for path in folder.rglob("*"))


def test_a_consolidated_checkpoint_is_the_plain_one(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "straight", tmp_path / "run")
    folder = tmp_path / "run" / LAST
    with pytest.raises(DataError, match=r"in shards, .*quest consolidate"):
        require_whole(folder)
    wanted = open_shards(folder)
    assert consolidate_run(tmp_path / "run").lines() == [
        f"{tmp_path}/run/checkpoints/step-{n:08d}: whole" for n in (2, 4)
    ]
    assert require_whole(folder) == folder
    assert find_fault(folder) == ""
    assert not consolidate_checkpoint(folder)
    found = load_checkpoint(folder).state_dict
    for kind in ("model", "optimizer"):
        for name, tensor in open_shards(runs / "straight" / LAST).read(kind).items():
            assert torch.equal(found[kind][name], tensor)
    assert len(wanted.shapes) == sum(len(found[kind]) for kind in ("model", "optimizer"))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_a_damaged_shard_is_named(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "straight" / LAST, tmp_path / "checkpoints/step-00000004")
    shard = next((tmp_path / "checkpoints/step-00000004/shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=f"{shard.name} has .* bytes, its manifest says"):
        consolidate_checkpoint(tmp_path / "checkpoints/step-00000004")
