"""A plan adds up, is JSON, and says what does not fit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from llm_quest.cost import plan as planning
from llm_quest.cost.plan import Workload, count_step, plan
from llm_quest.layers.initialize import materialize
from llm_quest.models.build import build, build_meta_model, preset
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.train.optimizers import make_adamw
from tests.cost.test_profile import random_batch

LLAMA = preset("llama3.2-tiny").config


def make_objective(filled: bool) -> Any:
    return NextTokenLoss(build(LLAMA) if filled else materialize(build_meta_model(LLAMA), "cpu", torch.float32))


WORK = Workload(
    family="llama", make_objective=make_objective, make_optimizer=lambda model: make_adamw(model, lr=1e-3),
    batch=random_batch(LLAMA.vocab_size, 4, 32), batch_units=128, unit="token", units_per_step=256,
    step_work="256 tokens", steps=10, bf16=False, device=torch.device("cpu"), save_total_limit=2,
    remedies=("fewer rows at once (micro_batch_size)",),
)  # fmt: skip


def test_a_plan_adds_up_and_is_json():
    found = plan(WORK, measure=False)
    as_json = found.as_json()
    assert found.memory["weights"] == 4 * found.parameters == found.memory["gradients"]
    assert found.memory["optimizer"] == pytest.approx(8 * found.parameters, rel=0.01)
    assert found.memory_total == sum(found.memory.values()) == as_json["memory_total"]
    assert found.flops == pytest.approx(as_json["flops_per_token"] * 256 * 10)
    assert as_json["tokens"] == 2560
    assert found.seconds == pytest.approx(10 * found.step_seconds)
    assert found.utilization == pytest.approx(planning.EXPECTED_UTILIZATION)
    assert found.checkpoint_bytes == found.memory["weights"] + found.memory["optimizer"]
    assert found.disk_bytes == 3 * found.checkpoint_bytes
    assert not found.measured
    json.dumps(as_json)
    assert any("predicted at" in line for line in found.lines())


def test_real_steps_are_timed_where_they_fit(monkeypatch: pytest.MonkeyPatch):
    found = plan(WORK)
    assert found.measured
    assert found.as_json()["tokens_per_second"] == pytest.approx(256 / found.step_seconds)
    assert any("3 real steps timed" in line for line in found.lines())
    monkeypatch.setattr(planning, "USABLE_MEMORY", 0.0)
    too_large = plan(WORK)
    assert not too_large.measured
    assert "fewer rows at once (micro_batch_size), a smaller model" in too_large.warnings[0]


def test_work_before_the_first_step_is_paid_once():
    plain, scored = (plan(dataclasses.replace(WORK, forward_passes_first=n), measure=False) for n in (0, 6))
    assert scored.flops_per_step == plain.flops_per_step
    assert scored.flops == pytest.approx(plain.flops + 6 * scored.first_flops / 6)
    assert scored.first_flops == pytest.approx(plain.flops_per_step, rel=0.01), "six forward passes are two of training"
    assert scored.seconds > plain.steps * scored.step_seconds


def test_several_processes_share_the_rows_and_fsdp_the_weights():
    one, ddp, fsdp = (
        count_step(dataclasses.replace(WORK, world_size=world, strategy=strategy))[1]
        for world, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp"))
    )
    assert ddp == one | {"gradient buckets": one["gradients"]}
    for kind in ("weights", "gradients", "optimizer"):
        assert fsdp[kind] == one[kind] // 2
    assert fsdp["activations"] == one["activations"]
    shared = dataclasses.replace(WORK, world_size=2)
    assert (WORK.micro_batches, shared.micro_batches) == (2, 1)
    alone, both = plan(WORK, measure=False), plan(shared, measure=False)
    assert both.flops == alone.flops
    assert both.utilization == pytest.approx(alone.utilization)


def test_models_that_are_not_trained_are_held():
    teacher = build(LLAMA)
    memory = count_step(dataclasses.replace(WORK, frozen={"teacher": teacher}))[1]
    assert memory["teacher"] == sum(p.nbytes for p in teacher.parameters())
