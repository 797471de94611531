import json
import random

import numpy as np
import pytest
import torch

from llm_quest.contracts import DataShard
from llm_quest.errors import MissingError, UsageError
from llm_quest.train.parallel import DistributedContext, resolve_device
from llm_quest.train.rng_state import evaluation_mode, get_rng_state, set_rng_state
from tests.train.small import objective


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    parallel = DistributedContext.from_environment("cpu")
    assert (parallel.data_shard, parallel.is_main_process, parallel.strategy) == (DataShard(0, 1), True, "single")
    assert parallel.all_gather({"a": 1}) == [{"a": 1}]
    made = objective()
    assert parallel.wrap_model(parallel.parallelize(made)) is made


def test_an_unknown_engine_or_device_says_what_there_is():
    with pytest.raises(UsageError, match="known: ddp, fsdp"):
        DistributedContext.from_environment("cpu", "zero")
    with pytest.raises(UsageError, match="known: auto, cpu, cuda, mps"):
        resolve_device("gpu")
    with pytest.raises(MissingError, match="device=auto or device=cpu"):
        resolve_device(f"cuda:{torch.cuda.device_count()}")


def test_random_states_survive_their_way_through_json():
    before = json.loads(json.dumps(get_rng_state()))
    drawn = [(random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1), np.random.randn())]
    set_rng_state(before)
    drawn.append(
        (random.random(), float(np.random.rand()), float(torch.rand(())), random.gauss(0, 1), np.random.randn())
    )
    assert drawn[0] == drawn[1]


def test_undisturbed_gives_back_every_mode_even_after_an_error():
    model = objective().model
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    expected = torch.get_rng_state()
    with pytest.raises(KeyError):
        disturb(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), expected)


def disturb(model) -> None:
    with evaluation_mode(model):
        torch.rand(3)
        assert not any(module.training for module in model.modules())
        raise KeyError
