import copy
import json
import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from llm_quest.contracts import Loss
from llm_quest.errors import GuardStop, ResourceError, UsageError
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.step import reduce_step_stats
from tests.train.small import Losses, Rule, go, objective


def weights(made) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


@pytest.mark.parametrize("micro", [2, 3, 8])
def test_accumulation_over_uneven_parts_is_the_whole_batch(micro):
    """Masked targets make every micro-batch's count another one; 3 does not even divide the 8 rows."""
    ends, losses = [], []
    for parts in (1, micro):
        made, show = objective(dropout=0.0), Losses()
        go(12, made=made, feed=Rule(micro=parts), show=show)
        ends.append(weights(made))
        losses.append(show["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=2e-5, rtol=0)


def test_a_step_is_the_textbook_step_on_the_mean_loss_with_clipping():
    made = objective(dropout=0.0)
    plain = copy.deepcopy(made)
    go(3, made=made, feed=Rule(micro=3), max_grad_norm=0.5)
    optimizer = make_adamw(plain.model, lr=3e-2)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * (step + 1) / 3
        (batch,) = Rule().batches(step)
        loss = plain(batch)
        (loss.total / loss.count).backward()
        assert torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.5) > 0.5, "the example must clip"
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(made.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, msg=name)


def test_a_metric_that_nothing_was_counted_for_is_left_out_and_one_that_is_not_a_number_is_shown():
    def pair(total: float, count: float) -> torch.Tensor:
        return torch.tensor([total, count], dtype=torch.float64)

    sums = {"": pair(6.0, 2.0), "ended": pair(0.0, 0.0), "length": pair(9.0, 3.0), "broken": pair(math.nan, 2.0)}
    stats = reduce_step_stats(sums, 2, (), [], DistributedContext())
    assert (stats.loss, stats.metrics["length"]) == (3.0, 3.0)
    assert stats.metrics.keys() == {"length", "broken"}
    assert math.isnan(stats.metrics["broken"])


def test_the_loss_falls_and_metrics_are_ratios_over_the_whole_step():
    show = Losses()
    result = go(40, feed=Rule(micro=4), show=show)
    assert show["loss"][0] == pytest.approx(math.log(17), rel=0.1)
    assert show["loss"][-1] < 0.5
    assert 0 <= show["accuracy"][0] < 0.3 < 0.8 < show["accuracy"][-1] <= 1
    assert (result.step, result.status, result.exit_code, result.tokens) == (40, "finished", 0, 40 * 8 * 8)
    assert result.metrics["loss"] == show["loss"][-1]


def test_bf16_trains_with_float32_weights_and_16_bit_weights_are_refused():
    made, show = objective(), Losses()
    go(30, made=made, precision="bf16", show=show)
    assert show["loss"][-1] < 1.0
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    made.model.bfloat16()
    with pytest.raises(UsageError, match=r"embed\.weight.*rounded away.*precision=bf16"):
        go(1, made=made)


def test_a_compiled_run_is_the_run_and_the_objective_is_one_graph(monkeypatch):
    """With the code generator left out: what is tested is that compiling in place changes neither names nor numbers."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    losses = []
    for compile in (False, True):
        made, show = objective(dropout=0.0), Losses()
        go(3, made=made, show=show, compile=compile)
        losses.append(show["loss"])
        assert "embed.weight" in made.model.state_dict()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


class Dropped:
    """A probe that draws random numbers and asks for the model's mode."""

    name, interval = "eval", 5

    def __init__(self) -> None:
        self.at: list[int] = []

    def evaluate(self, model, step):
        self.at.append(step)
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(7)
        return {"loss": 10.0 - step, "calls": float(model.calls)}


def test_a_probe_leaves_no_trace_and_is_asked_when_due_and_at_the_end():
    made, other, probe = objective(), objective(), Dropped()
    show = Losses()
    go(12, made=made, probes=[probe], show=show, logging_steps=100)
    go(12, made=other)
    assert probe.at == [5, 10, 12]
    assert [row["step"] for row in show.rows] == [1, 5, 10, 12]
    assert show.rows[1]["eval/loss"] == 5.0
    for name, tensor in weights(other).items():
        assert torch.equal(made.model.state_dict()[name], tensor), name
    assert all(module.training for module in made.model.modules())


class Calls:
    def __init__(self) -> None:
        self.at: list[int] = []

    def on_step_end(self, model, step):
        self.at.append(step)
        model.calls += 1

    def on_step_skipped(self, model):
        self.at.append(None)


def test_callbacks_run_after_every_update_and_may_edit_the_model():
    made, calls = objective(), Calls()
    go(4, made=made, callbacks=[calls])
    assert calls.at == [1, 2, 3, 4]
    assert made.model.calls == 4


class Trap(nn.Module):
    """Makes a NaN of the positions whose token is 0, in the forward or in the backward pass alone."""

    def __init__(self, inner: nn.Module, backward: bool):
        super().__init__()
        self.inner, self.backward = inner, backward

    def forward(self, tokens):
        x = self.inner(tokens)
        hit = (tokens == 0)[..., None]
        if self.backward:
            return x + torch.where(hit, x * 0, 0 * x.detach()).abs().sqrt()
        return torch.where(hit, torch.nan, x)


def make_trap(backward: bool = False, dropout: float = 0.1):
    made = objective(dropout=dropout)
    made.model.embed = Trap(made.model.embed, backward)
    return made


class Poisoned(Rule):
    """Token 0 appears in the bad steps alone, in the first row."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def batches(self, step):
        batches = [replace(batch, tokens=batch.tokens.clamp(min=1)) for batch in super().batches(step)]
        batches[0].tokens[0, -1] = 0 if step in self.bad else 1
        return batches


def test_a_nan_is_skipped_counted_shown_and_null_in_the_log(tmp_path):
    calls, show = Calls(), Losses()
    with RunDir(tmp_path / "run") as run:
        result = go(8, run, made=make_trap(), feed=Poisoned({3, 4}), callbacks=[calls], show=show)
    assert result.metrics["skipped_steps"] == 2
    assert calls.at == [1, 2, 3, None, None, 6, 7, 8]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, False, False, True, True, False, False, False]
    assert rows[3]["nonfinite"] == ["loss", "grad_norm"]
    assert [text.split(":")[0] for text in show.events] == ["started", "skipped", "skipped", "saved", "finished"]


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were():
    ends = []
    for bad, steps in (({3, 4}, 5), (set(), 3)):
        made = make_trap(dropout=0.0)
        go(steps, made=made, feed=Poisoned(bad))
        ends.append(made.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(("backward", "place"), [(False, r"output of model\.embed \(Trap\)"), (True, "gradient")])
def test_too_many_bad_steps_stop_the_run_and_name_the_module(tmp_path, backward, place):
    with (
        RunDir(tmp_path / "run") as run,
        pytest.raises(GuardStop, match=rf"stopped at step 8: 3 steps in a row.*{place}"),
    ):
        go(20, run, made=make_trap(backward), feed=Poisoned(range(5, 20)), max_nonfinite_steps=2)
    report = json.loads((tmp_path / "run/crash.json").read_text())
    assert report["step"] == 8
    assert report["guard"]["nonfinite_streak"] == 3


def test_steps_without_a_target_change_nothing_and_too_many_stop_the_run():
    class Mute(Rule):
        def batches(self, step):
            return (
                [replace(b, targets=torch.full_like(b.targets, -100)) for b in super().batches(step)]
                if step % 2
                else super().batches(step)
            )

    result = go(6, feed=Mute())
    assert result.metrics["empty_steps"] == 3

    class Nothing(Rule):
        def batches(self, step):
            return []

    with pytest.raises(GuardStop, match="every target is masked"):
        go(6, feed=Nothing(), max_empty_steps=3)


def test_a_first_loss_far_from_what_is_expected_warns():
    wild, tame = Losses(), Losses()
    made = objective()
    nn.init.normal_(made.model.embed.weight)
    go(1, made=made, show=wild, expected_loss=math.log(17))
    go(1, show=tame, expected_loss=math.log(17))
    assert any("expected about 2.833" in text for text in wild.events)
    assert not any("expected" in text for text in tame.events)


def test_weights_that_are_not_finite_are_refused_before_the_first_step():
    made = objective()
    made.model.norm.bias.data[3] = math.inf
    with pytest.raises(GuardStop, match=r"parameter norm\.bias is not finite before the first step"):
        go(1, made=made)


def test_the_time_limit_saves_and_ends_with_exit_code_zero(tmp_path):
    with RunDir(tmp_path / "run") as run:
        result = go(500, run, feed=Rule(pause=0.01), max_seconds=0.2)
        assert (result.status, result.exit_code) == ("time", 0)
        assert result.step < 500
        assert result.checkpoint_path.endswith(f"step-{result.step:08d}")
        assert go(result.step + 2, run).step == result.step + 2


def test_a_probe_s_time_is_not_in_the_rate_of_tokens():
    class Slow(Dropped):
        interval = 1

        def evaluate(self, model, step):
            time.sleep(0.2)
            return {}

    result = go(5, probes=[Slow()])
    assert result.seconds > 1.0
    assert result.tokens_per_second > 5 * 64 / 0.9


def test_out_of_memory_names_remedies():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(1, 1)

        def forward(self, batch):
            total = self.model(torch.empty(2**50)).sum()
            return Loss(total, torch.ones(()), {})

    made = Huge()
    with pytest.raises(ResourceError, match="out of memory in step 1: lower the micro-batch"):
        train(made, Rule(), make_adamw(made.model, lr=1e-3), lambda step: 1.0, TrainingArguments(max_steps=1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"precision": "fp16"}, "known: fp32, bf16"),
        ({"max_grad_norm": 0.0}, "positive"),
        ({"logging_steps": 0}, "1 or more"),
        ({"save_steps": -1}, "0 or more"),
    ],
)
def test_wrong_settings_say_what_is_allowed(wrong, words):
    with pytest.raises(UsageError, match=words):
        TrainingArguments(max_steps=1, **wrong)
