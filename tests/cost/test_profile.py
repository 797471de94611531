"""A step counted without memory is the step of the real model: FLOPs, activations, gradients, the optimizer's state."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_quest.cost.flops import make_flop_counter
from llm_quest.cost.profile import StepProfile, StepTracker, matmul_peak, profile_step, time_step
from llm_quest.data.batch import TokenBatch
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.objectives.distillation import DistillationLoss
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.techniques.lora import LoRA
from llm_quest.train.optimizers import make_adamw, make_muon

TINY = [one.name for family in FAMILIES for one in family.presets if one.name.endswith("-tiny")]


def random_batch(vocab_size: int, rows: int = 3, length: int = 40) -> TokenBatch:
    tokens = torch.randint(0, vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return TokenBatch(tokens[:, :-1], tokens[:, 1:])


def muon(model: Any) -> torch.optim.Optimizer:
    """Of one Newton-Schulz step: its state is that of five, and they are a quarter of what a test costs."""
    return make_muon(model, lr=1e-3, row_splits=model.row_splits(), newton_schulz_steps=1)


def step_profile(objective: Any, make_optimizer: Any = None, *, bf16: bool = False) -> StepProfile:
    batch = random_batch(objective.model.config.vocab_size)
    return profile_step(objective, batch, make_optimizer, bf16=bf16, mode=FakeTensorMode())


@pytest.mark.parametrize("name", TINY)
def test_a_step_costs_what_the_real_step_does(name: str):
    """The objective is walked and not the model alone, so multi-token modules and auxiliary losses are in it."""
    objective = NextTokenLoss(build(name).train())
    profile = step_profile(objective, muon)
    batch = random_batch(objective.model.config.vocab_size)
    with make_flop_counter() as counter:
        with StepTracker() as tracker:
            loss = objective(batch)
            activations = tracker.live_bytes
        loss.total.backward()
    assert profile.flops == counter.get_total_flops()
    assert profile.activations == pytest.approx(activations, rel=2e-3)
    assert profile.gradients == sum(p.grad.nbytes for p in objective.parameters() if p.grad is not None)
    optimizer = muon(objective.model)
    optimizer.step()
    state = [t for kept in optimizer.state.values() for t in kept.values() if torch.is_tensor(t)]
    assert profile.optimizer == sum(t.nbytes for t in state)


def test_a_stack_of_experts_has_one_number_of_muons_state():
    model = build("mixtral-tiny")
    experts = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 3)
    with_muon, with_adamw = (
        step_profile(NextTokenLoss(model.train()), make).optimizer for make in (muon, partial(make_adamw, lr=1e-3))
    )
    assert with_adamw - with_muon >= experts


def test_multi_token_modules_cost_what_they_add():
    alone, more = (
        step_profile(
            NextTokenLoss(
                build(dataclasses.replace(preset("deepseek-v3-tiny").config, num_nextn_predict_layers=n)).train()
            )
        )
        for n in (0, 2)
    )
    assert more.flops > 1.4 * alone.flops
    assert more.activations + more.temporaries > alone.activations + alone.temporaries


def test_checkpointing_keeps_less_and_its_second_pass_is_no_work():
    config = dataclasses.replace(preset("llama3.2-tiny").config, num_hidden_layers=8)
    plain = step_profile(NextTokenLoss(build(config).train()))
    again = step_profile(NextTokenLoss(ActivationCheckpointing()(build(config).train())))
    assert (again.flops, again.forward_flops) == (plain.flops, plain.forward_flops)
    assert plain.executed_flops == plain.flops < again.executed_flops < 4 / 3 * plain.flops
    assert again.activations + again.temporaries < 0.4 * (plain.activations + plain.temporaries)


def test_what_is_frozen_has_no_gradient_and_no_state():
    model = LoRA(rank=2)(build("llama3.2-tiny")).train()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    profile = step_profile(NextTokenLoss(model), partial(make_adamw, lr=1e-3))
    assert profile.gradients == trained
    assert 2 * trained <= profile.optimizer < 2.1 * trained
    assert profile.flops < 2.5 * profile.forward_flops


def test_a_teachers_forward_pass_is_counted():
    teacher = build("llama3.2-tiny").eval()
    alone = step_profile(NextTokenLoss(build("llama3.2-tiny").train()))
    taught = step_profile(
        NextTokenLoss(build("llama3.2-tiny").train(), auxiliary=[DistillationLoss(teacher, weight=0.5)])
    )
    assert 4 / 3 * alone.flops < taught.flops < 1.7 * alone.flops


def test_large_logits_are_held_in_chunks():
    """Whole, 1,200 rows of 20,000 logits are 96 MB each for the logits and their softmax."""
    config = dataclasses.replace(preset("llama3.2-tiny").config, vocab_size=20_000)
    profile = profile_step(
        NextTokenLoss(build(config).train()), random_batch(20_000, 10, 120), None, bf16=False, mode=FakeTensorMode()
    )
    chunk = 256 * 20_000 * 4
    assert 2 * chunk < profile.temporaries + profile.activations < 10 * chunk


def test_counting_changes_nothing():
    objective = NextTokenLoss(build("mixtral-tiny").train())
    before = {name: p.clone() for name, p in objective.named_parameters()}
    step_profile(objective, muon)
    time_step(objective, muon(objective.model), random_batch(objective.model.config.vocab_size), bf16=False)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in objective.named_parameters())


def test_memory_is_followed_until_it_is_freed():
    with StepTracker() as tracker:
        a = torch.zeros(100)
        b = a + 1
        del b
        c = torch.zeros(10)
        c.view(2, 5).add_(1)
    assert tracker.live_bytes == 440
    assert tracker.peak(exclude=[]) == 800
    assert tracker.peak(exclude=[a]) == 400


def test_the_peak_of_matrix_products_is_a_rate():
    assert 0 < matmul_peak(64, torch.float32, seconds=0.01) < 1e6


def test_the_chunked_loss_costs_as_many_products_as_the_whole_one():
    whole, chunked = (
        profile_step(
            NextTokenLoss(build("llama3.2-tiny").train(), form=form), random_batch(64), None, bf16=False,
            mode=FakeTensorMode(),
        )
        for form in ("full", "chunked")
    )  # fmt: skip
    assert chunked.flops == whole.flops
