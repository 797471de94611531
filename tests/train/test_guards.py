"""What is not finite is named in its step, and never saved."""

from __future__ import annotations

import math

import pytest
import torch

from llm_quest.errors import GuardStop
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.guards import MAX_PLAUSIBLE_WEIGHT, find_bad_optimizer_state, find_bad_parameter, suggest_remedies
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw, make_lr_schedule
from llm_quest.train.run_dir import RunDir
from tests.train.small import Losses, Rule, digest, go, objective
from tests.train.test_loop import Poisoned, make_trap


class Spoil:
    """Puts a value into a weight after a step."""

    def __init__(self, step: int, value: float):
        self.step, self.value = step, value

    def on_step_end(self, model, step):
        if step == self.step:
            model.embed.weight.data[1, 1] = self.value

    def on_step_skipped(self, model):
        pass


def test_a_step_that_is_skipped_names_the_module_once_a_streak():
    show = Losses()
    go(8, made=make_trap(), feed=Poisoned({3, 4, 6}), show=show)
    named = [text for text in show.events if text.startswith("skipped")]
    assert ["output of model.embed (Trap)" in text for text in named] == [True, False, True]


def test_looking_for_the_module_leaves_no_trace_on_the_numbers(tmp_path, monkeypatch):
    """With dropout: the second pass draws the same random numbers as the first, and takes none from later steps."""
    ends = []
    for name in ("looked", "did not look"):
        if name == "did not look":
            monkeypatch.setattr(
                "llm_quest.train.health.HealthMonitor.locate_nonfinite", lambda self, reason, *given: reason
            )
        with RunDir(tmp_path / name) as run:
            ends.append(digest(go(8, run, made=make_trap(), feed=Poisoned({3, 6})).checkpoint_path))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30])
def test_a_weight_that_goes_wrong_is_never_saved_and_the_checkpoint_before_it_stands(tmp_path, value):
    with (
        RunDir(tmp_path / "run") as run,
        pytest.raises(GuardStop, match=r"parameter embed\.weight .* after the update of step 6"),
    ):
        go(6, run, save_steps=2, callbacks=[Spoil(6, value)])
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == [
        "step-00000002",
        "step-00000004",
    ]


def test_a_rate_without_bounds_is_found_in_the_next_step():
    made = objective()
    given = (made, Rule(), make_adamw(made.model, lr=1e30), make_lr_schedule(9), TrainingArguments(max_steps=9))
    with pytest.raises(GuardStop, match=r"stopped at step 2: parameter \S+ holds .*\n.*\nLower learning_rate"):
        train(*given)


def test_a_state_of_the_optimizer_that_overflowed_is_found():
    made = objective()
    optimizer = make_adamw(made.model, lr=1e-3)
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert find_bad_optimizer_state(made.model, optimizer) == ""
    made.model.embed.weight.grad[0, 0] = 1e25  # whose square is no float32
    optimizer.step()
    assert find_bad_parameter(made.model) == ""
    assert find_bad_optimizer_state(made.model, optimizer) == "the optimizer's exp_avg_sq of embed.weight is not finite"


def test_the_bound_of_a_weight():
    made = objective()
    made.model.embed.weight.data[0, 0] = -MAX_PLAUSIBLE_WEIGHT
    assert find_bad_parameter(made.model) == ""
    made.model.embed.weight.data[0, 0] *= 1.01
    assert find_bad_parameter(made.model) == "parameter embed.weight holds 1.01e+12"


def test_the_remedies_are_those_that_the_run_has_left():
    assert suggest_remedies(1e-3, "fp32", 1.0) == "Lower learning_rate (now 1.0e-03), or look at the data of this step"
    assert "precision=fp32" in suggest_remedies(1e-3, "bf16", 1.0)
    assert "max_grad_norm=1.0" in suggest_remedies(1e-3, "fp32", None)
