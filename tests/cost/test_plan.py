"""Plans: counted on a model without memory, and equal to what the real model does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from llm_quest.cost import plan
from llm_quest.cost.plan import (
    TrainingWorkload,
    activation_memory,
    estimate_training_memory,
    make_random_batch,
    measure_step_seconds,
    memory_warnings,
    plan_training,
    saved_for_backward,
)
from llm_quest.cost.profile import profile_step
from llm_quest.errors import UsageError
from llm_quest.models.build import build, build_meta_model, preset
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.techniques import parse_technique_entry
from llm_quest.train.optimizers import make_adamw, make_muon

LLAMA, GPT2 = preset("llama3.2-tiny").config, preset("gpt2-tiny").config
WORK = TrainingWorkload(LLAMA, rows=8, length=32, steps=10, micro_rows=4)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_counted_without_memory_are_those_of_the_real_model(config, precision):
    work = dataclasses.replace(WORK, config=config, precision=precision)
    tokens = torch.zeros(work.rows_per_micro_batch, work.length, dtype=torch.int64)
    real = saved_for_backward(build(config).train(), tokens, precision == "bf16")
    assert activation_memory(work) == real > 0


@pytest.mark.parametrize("technique", ["lora", "tiny_lora", "dora"])
def test_of_an_adapted_model_the_adapter_alone_is_remembered(technique):
    work = dataclasses.replace(WORK, techniques=(parse_technique_entry(technique),))
    model = work.with_techniques(build(LLAMA)).train()
    tokens = torch.zeros(work.rows_per_micro_batch, work.length, dtype=torch.int64)
    assert activation_memory(work) == saved_for_backward(model, tokens, False) > 0
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = estimate_training_memory(work, work.with_techniques(build_meta_model(LLAMA)))
    assert (memory["gradients"], memory["optimizer"]) == (4 * learned, 8 * learned)
    assert measure_step_seconds(work) > 0


def test_added_modules_keep_activations_too():
    """Made without memory inside the plan's pretence, where no tensor can be moved."""
    work = dataclasses.replace(WORK, techniques=(parse_technique_entry("multi_token"),))
    assert activation_memory(work) >= activation_memory(WORK)


def test_activations_grow_with_the_rows_at_once_and_not_with_the_rows():
    one, two, more = (
        activation_memory(dataclasses.replace(WORK, micro_rows=n, rows=r)) for n, r in ((2, 8), (4, 8), (4, 32))
    )
    assert 1.95 * one < two == more < 2.01 * one


def test_checkpointing_keeps_less():
    long = dataclasses.replace(WORK, config=dataclasses.replace(LLAMA, num_hidden_layers=8))
    assert activation_memory(dataclasses.replace(long, checkpointing=True)) < 0.4 * activation_memory(long)


@pytest.mark.parametrize(("name", "make"), [("adamw", make_adamw), ("muon", make_muon)])
def test_the_optimizer_holds_what_was_planned(name, make):
    model = build(LLAMA).train()
    optimizer = make(model, lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
    planned = estimate_training_memory(dataclasses.replace(WORK, optimizer=name), build_meta_model(LLAMA))["optimizer"]
    assert sum(t.nbytes for t in tensors) == planned


def test_a_plan_adds_up_and_is_json():
    found = plan_training(WORK, measure=False)
    assert found.tokens_per_step == 8 * 32
    assert found.flops == found.flops_per_token * 8 * 32 * 10
    assert found.memory_total == sum(found.memory.values())
    assert found.seconds == pytest.approx(10 * found.step_seconds)
    assert found.utilization == pytest.approx(plan.EXPECTED_UTILIZATION)
    assert found.checkpoint_bytes == 12 * found.parameters
    assert not found.measured
    json.dumps(found.as_json())
    assert any("predicted at" in line for line in found.lines())


def test_real_steps_are_timed_when_asked():
    found = plan_training(WORK)
    assert found.measured
    assert found.tokens_per_second == pytest.approx(256 / found.step_seconds)
    assert any("3 real steps timed" in line for line in found.lines())


def test_timing_works_for_every_optimizer_and_precision():
    for optimizer in plan.KNOWN_OPTIMIZERS:
        assert measure_step_seconds(dataclasses.replace(WORK, optimizer=optimizer, precision="bf16")) > 0


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_teacher_is_planned_as_it_is_paid_for(weight):
    """Its weights, its forward pass and the head's products; counted on the pass itself."""
    teacher = build(dataclasses.replace(GPT2, num_hidden_layers=4)).eval()
    taught = dataclasses.replace(WORK, micro_rows=8, teacher=DistillationLoss(teacher, weight=weight))
    objective = NextTokenLoss(build(LLAMA).train(), auxiliary=[taught.teacher])
    cost = profile_step(objective, make_random_batch(taught), torch.device("cpu"), bf16=False)
    found, alone = plan_training(taught, measure=False), plan_training(WORK, measure=False)
    assert found.flops_per_step == pytest.approx(cost.total_flops, rel=0.02)
    assert found.flops_per_step > 1.3 * alone.flops_per_step
    assert found.memory["teacher"] == sum(4 * p.numel() for p in teacher.parameters())
    assert found.memory["loss"] > alone.memory["loss"]
    assert found.checkpoint_bytes == alone.checkpoint_bytes
    assert measure_step_seconds(taught) > 0


def test_more_processes_share_the_rows():
    shared = dataclasses.replace(WORK, world=2, micro_rows=None)
    assert (shared.rows_per_micro_batch, shared.micro_batches) == (4, 1)
    assert (WORK.rows_per_micro_batch, WORK.micro_batches) == (4, 2)


def test_what_does_not_fit_is_answered_with_remedies():
    memory = {"weights": 10, "gradients": 10, "optimizer": 20, "activations": 10**9, "loss": 5}
    (told,) = memory_warnings(WORK, memory, 100 * 10**6)
    assert "micro_rows below 4" in told
    assert "activation checkpointing" in told
    memory["optimizer"] = 10**9
    (told,) = memory_warnings(WORK, memory, 100 * 10**6)
    assert "a smaller model" in told
    assert memory_warnings(WORK, memory, 10**12) == []


def test_a_plan_that_does_not_fit_is_not_measured(monkeypatch):
    monkeypatch.setattr(plan, "USABLE_MEMORY", 0.0)
    found = plan_training(WORK)
    assert not found.measured
    assert found.warnings


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"length": 257}, "longer than the model's context of 256"),
        ({"optimizer": "sgd"}, "known: adamw, muon"),
        ({"precision": "fp8"}, "known: fp32, bf16"),
    ],
)
def test_work_that_cannot_be_done_is_refused(change, said):
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(WORK, **change)
