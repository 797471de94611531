"""A run that goes wrong although its numbers are finite is told so in the step in which it is certain; the checkpoint
from before is kept, and the run goes on from it. Healthy runs are left in peace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_quest.contracts import Loss
from llm_quest.hub.locate import resolve_checkpoint
from llm_quest.models.build import build, preset
from llm_quest.scope import Scope
from llm_quest.train.divergence import FIRST_GROWTH_STEP, STREAK, DivergenceMonitor
from llm_quest.train.health import INTERVAL, ExpertLoadMonitor
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.state import TrainState
from tests.train.small import Losses, go

FALLING = [6 * 0.93**n + 1 for n in range(60)]
HEALTHY_LOSSES = {
    "it falls": FALLING,
    "one bad batch, twice": [*FALLING, 90.0, *FALLING[50:], 40.0, 30.0, *FALLING[50:]],
    "noise": [3 + random.Random(n).gauss(0, 1) for n in range(300)],
    "easy rows, then hard ones": [*FALLING, *[0.05] * 20, *[2.5] * 40],
    "a small loss triples": [*[0.02] * 20, *[0.06] * 20],
    "not finite, which guards see": [*FALLING, *[math.nan] * 9],
}


def warning_steps(losses: Iterable[float], norms: Iterable[float] = (), weights: Iterable[float] = ()) -> list[int]:
    """The steps in which a monitor says something, resumed from its saved state after each of them."""
    monitor, steps = DivergenceMonitor(), []
    series = list(losses)
    norms, weights = list(norms) or [1.0] * len(series), list(weights) or [9.0] * len(series)
    for step, numbers in enumerate(zip(series, norms, weights, strict=True), start=1):
        if monitor.update(step, *numbers):
            steps.append(step)
        resumed = DivergenceMonitor()
        resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
        assert resumed == monitor
        monitor = resumed
    return steps


@pytest.mark.parametrize("name", HEALTHY_LOSSES)
def test_a_healthy_loss_is_no_divergence(name: str):
    assert warning_steps(HEALTHY_LOSSES[name]) == []


def test_a_loss_that_rises_is_told_once_until_it_is_well_again():
    rising = [*FALLING, *[4.5] * 20]
    assert warning_steps(rising) == [len(FALLING) + STREAK]
    assert warning_steps([*rising, *FALLING[40:], *[5.0] * 9]) == [len(FALLING) + STREAK, len(rising) + 20 + STREAK]
    assert warning_steps([7.0, *[30.0] * 9]) == [1 + STREAK]


def test_gradients_and_weights_that_explode_are_told():
    calm, steps = [1.0 + n % 3 for n in range(30)], 30
    loss = [2.0] * (steps + 9)
    assert warning_steps(loss, [*calm, *[500.0] * 9]) == [steps + STREAK]
    assert warning_steps(loss, [*calm, 500.0, 1.0, 500.0, *calm[:6]]) == []
    assert warning_steps(loss, [0.0] * 20 + [3.0] * 19) == []  # a policy whose groups were all alike
    assert warning_steps(loss, weights=[*[10.0] * steps, *[10.0 * 2**n for n in range(1, 10)]]) == [steps + 1 + STREAK]
    assert warning_steps(loss, weights=[0.01 * n for n in range(steps + 9)]) == []  # an adapter that begins at zero
    assert warning_steps(loss, weights=[0.01 * n**2 for n in range(steps + 9)]) == []  # and whose rate rises
    assert steps > FIRST_GROWTH_STEP


class SpoilRate:
    """From this step on the rate is so high that the model is lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int):
        original = TrainState.set_learning_rate

        def set_learning_rate(state: TrainState) -> None:
            original(state)
            for group in state.optimizer.param_groups:
                group["lr"] *= 300 if state.progress.step >= step else 1

        monkeypatch.setattr(TrainState, "set_learning_rate", set_learning_rate)


def test_the_checkpoint_from_before_is_kept_and_the_run_goes_on_from_it(tmp_path: Path, monkeypatch):
    show, folder = Losses(), tmp_path / "run"
    with monkeypatch.context() as patch:
        SpoilRate(patch, 20)
        with RunDir(folder, config="seed: 0\n") as run:
            go(40, run, show=show, save_steps=4, save_total_limit=2)
    (told,) = [text for text in show.events if text.startswith("diverging")]
    assert f"step {20 + STREAK}  the loss has been above" in told or f"step {21 + STREAK}  the loss" in told
    assert "the largest gradient is in " in told
    assert f"The last good checkpoint is {folder}/checkpoints/step-00000012, which is kept" in told
    assert f"--resume {folder}@good" in told
    assert "Lower learning_rate" in told
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert kept[0] == "step-00000012"
    assert kept[-2:] == ["step-00000036", "step-00000040"]
    good = resolve_checkpoint(f"{folder}@good")
    assert good.name == "step-00000012"
    with RunDir(folder, config="seed: 0\n", resume=good) as run:
        resumed = go(40, run, show=Losses(), save_steps=4, save_total_limit=2)
    assert resumed.metrics["loss"] < 1.5
    assert resolve_checkpoint(f"{folder}@good").name == "step-00000040"


def test_the_good_checkpoint_stays_over_a_resumption(tmp_path: Path, monkeypatch):
    folder = tmp_path / "run"
    SpoilRate(monkeypatch, 20)
    for steps in (28, 40):
        with RunDir(folder, config="seed: 0\n") as run:
            go(steps, run, save_steps=4, save_total_limit=1)
    assert resolve_checkpoint(f"{folder}@good").name == "step-00000012"


@pytest.fixture
def mixture() -> torch.nn.Module:
    config = preset("mixtral-tiny").config
    return build(replace(config, num_hidden_layers=2), seed=0)


def passes(model: torch.nn.Module, monitor: ExpertLoadMonitor, steps: range) -> dict[int, str]:
    found = {}
    for step in steps:
        ids = torch.randint(3, 90, (4, 64), generator=torch.Generator().manual_seed(step))
        model(ids)
        found[step] = monitor.update(step)
    return {step: text for step, text in found.items() if text}


def test_a_dead_expert_is_named_with_its_router(mixture: torch.nn.Module):
    monitor = ExpertLoadMonitor(mixture, DistributedContext())
    monitor.start()
    assert passes(mixture, monitor, range(1, 2 * INTERVAL + 1)) == {}
    assert monitor.last_healthy == 2 * INTERVAL
    name, router = list(monitor.routers.items())[1]
    router.bias = torch.nn.Parameter(torch.zeros(router.weight.shape[0]).index_fill(0, torch.tensor([2]), -1e4))
    ((step, told),) = passes(mixture, monitor, range(2 * INTERVAL + 1, 4 * INTERVAL + 1)).items()
    assert step == 3 * INTERVAL
    assert name.startswith("blocks.1.")
    assert f"{name} (expert 2 of {router.weight.shape[0]})" in told
    assert "blocks.0" not in told
    router.bias.data.zero_()
    assert passes(mixture, monitor, range(4 * INTERVAL + 1, 5 * INTERVAL + 1)) == {}
    assert (monitor.dead, monitor.last_healthy) == ({}, 5 * INTERVAL)
    monitor.stop()
    assert router.observe_routing is None


def test_padding_and_passes_without_gradients_are_not_counted(mixture: torch.nn.Module):
    monitor = ExpertLoadMonitor(mixture, DistributedContext())
    monitor.start()
    ids = torch.full((2, 8), 5)
    positions = torch.arange(8).expand(2, 8).clone()
    positions[:, 6:] = -1
    with torch.no_grad():
        mixture(ids)
    assert all(counter.sum() == 0 for counter in monitor.counts.values())
    mixture.hidden_states(ids, Scope(positions))
    assert [int(count.sum()) for count in monitor.counts.values()] == [12 * r.top_k for r in monitor.routers.values()]


class Routed(torch.nn.Module):
    """Predicts the token itself."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch) -> Loss:
        logits = self.model(batch.tokens).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.tokens.flatten(), reduction="sum")
        return Loss(loss, torch.tensor(float(batch.tokens.numel())), {})


def test_a_run_tells_of_dead_experts_with_the_remedy(tmp_path: Path, mixture: torch.nn.Module, monkeypatch):
    monkeypatch.setattr("llm_quest.train.health.LEAST_TOKENS", 20)
    name, router = next(iter(ExpertLoadMonitor(mixture, DistributedContext()).routers.items()))
    show = Losses()
    router.bias = torch.nn.Parameter(torch.zeros(router.weight.shape[0]).index_fill(0, torch.tensor([1]), -1e4))
    with RunDir(tmp_path / "run", config="seed: 0\n") as run:
        go(INTERVAL, run, made=Routed(mixture), show=show)  # type: ignore[arg-type]
    (told,) = [text for text in show.events if text.startswith("dead_experts")]
    assert f"{name} (expert 1 of" in told
    assert "There is no checkpoint from before" in told
    assert "Raise router_aux_loss_coef" in told
