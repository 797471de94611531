"""The doctor: every sign is seen, said once in words, and what cannot learn is stopped."""

import json
import math
import random

import pytest
import torch
from torch import nn

from llm_quest.contracts import Loss
from llm_quest.errors import GuardStop
from llm_quest.rollouts.diagnostics import SYMPTOMS, Diagnostics
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_lr_schedule
from llm_quest.train.run_dir import RunDir

WELL = {
    "reward": 0.5, "frac_reward_zero_std": 0.2, "completions/clipped_ratio": 0.0, "rewards/unscorable": 0.0,
    "completions/mean_length": 10.0, "entropy": 0.8, "kl": 0.01, "ratio/max": 1.2,
}  # fmt: skip

ILL = {
    "never right": [{"frac_reward_zero_std": 1.0, "reward": 0.0}],
    "always right": [{"frac_reward_zero_std": 1.0, "reward": 1.0}],
    "nothing scored": [{"rewards/unscorable": 1.0, "reward": math.nan}],
    "mostly uniform": [{"frac_reward_zero_std": 0.95}],
    "unscorable": [{"rewards/unscorable": 0.2}],
    "cut off": [{"completions/clipped_ratio": 0.6}],
    "low entropy": [{"entropy": 0.01}],
    "reward fell": [{"reward": 0.1 + 0.05 * step} for step in range(9)] + [{"reward": 0.05}] * 3,
    "large ratio": [{"ratio/max": 30.0}],
    "large KL": [{"kl": 3.0}],
    "longer without gain": [{"completions/mean_length": 10.0}, {"completions/mean_length": 20.0}],
    "reward without accuracy": [{"reward": 0.3, "eval/accuracy": 0.4}, {"reward": 0.6, "eval/accuracy": 0.38}],
}


def log_rows(doctor: Diagnostics, *rows: dict) -> list[list[str]]:
    return [doctor.on_log({"step": len(doctor.rows), **WELL, **row}) for row in rows]


def test_a_healthy_run_is_left_in_peace():
    assert (
        log_rows(Diagnostics(), *[{"reward": 0.5 + i / 10, "eval/accuracy": 0.4 + i / 10} for i in range(5)])
        == [[]] * 5
    )


@pytest.mark.parametrize("sign", SYMPTOMS, ids=lambda sign: sign.name)
def test_every_sign_is_seen_and_said_once(sign):
    doctor = Diagnostics()
    told = log_rows(doctor, *ILL[sign.name])[-1]
    assert [sign.advice({**WELL, **ILL[sign.name][-1]})] == told
    assert log_rows(doctor, ILL[sign.name][-1]) == [[]]
    assert set(ILL) == {sign.name for sign in SYMPTOMS}


def test_of_several_rewards_the_one_that_compares_with_the_answer_says_what_is_right():
    alike = {"frac_reward_zero_std": 1.0}
    wrong, right = (log_rows(Diagnostics(), alike | {"reward": mean})[0] for mean in (0.0, 1.0))
    assert wrong != right
    for name in ("correct", "math_verify"):
        told = [
            log_rows(Diagnostics(), alike | {"reward": 1.0 - share, f"rewards/{name}": share})[0]
            for share in (0.0, 1.0)
        ]
        assert [line[0].partition("(")[0] for line in told] == [wrong[0].partition("(")[0], right[0].partition("(")[0]]


def test_chance_in_the_reward_is_no_fall():
    rng = random.Random(0)
    rows = [{"reward": 0.3 + rng.gauss(0, 0.15)} for _ in range(200)]
    assert log_rows(Diagnostics(), *rows) == [[]] * 200


def test_a_collapse_is_one_only_where_the_run_was_well_before():
    doctor = Diagnostics()
    log_rows(doctor, {"entropy": 0.01})
    assert doctor.collapse_since is None
    log_rows(doctor, {}, {}, {"entropy": 0.01}, {"entropy": 0.01})
    assert doctor.collapse_since == 2
    log_rows(doctor, {})
    assert doctor.collapse_since is None


def test_a_sign_that_comes_back_is_said_again():
    assert [len(each) for each in log_rows(Diagnostics(), {"kl": 3.0}, {"kl": 0.1}, {"kl": 3.0})] == [1, 0, 1]


@pytest.mark.parametrize("name", ["never right", "always right", "nothing scored"])
def test_what_cannot_learn_is_stopped_and_told_why(name: str):
    doctor = Diagnostics(patience_steps=3)
    log_rows(doctor, *[ILL[name][0]] * 3)
    with pytest.raises(GuardStop, match="cannot learn"):
        log_rows(doctor, ILL[name][0])
    assert GuardStop.exit_code == 4


def test_patience_begins_again_when_there_is_news():
    doctor = Diagnostics(patience_steps=3)
    log_rows(
        doctor,
        *[{"frac_reward_zero_std": 1.0, "reward": 0.0}] * 3,
        {},
        *[{"frac_reward_zero_std": 1.0, "reward": 0.0}] * 3,
    )


class Number(nn.Module):
    """An objective over one number, which reports what the doctor reads."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1, 1)

    def forward(self, batch):
        total = self.model.weight.square().sum()
        one = torch.ones(())
        return Loss(total, one, {"frac_reward_zero_std": (one, one), "reward": (0 * one, one)})


class Ones:
    num_tokens = 1

    def batches(self, step):
        return [self]

    def to(self, device):
        return self

    def state_dict(self):
        return {}

    def load_state_dict(self, state_dict):
        pass


def test_the_loop_writes_advice_down_and_ends_with_it(tmp_path):
    objective = Number()
    with RunDir(tmp_path / "run") as run, pytest.raises(GuardStop, match="cannot learn"):
        train(
            objective, Ones(), torch.optim.SGD(objective.parameters(), lr=0.1), make_lr_schedule(50),
            TrainingArguments(max_steps=50, logging_steps=1), run, watchers=[Diagnostics(patience_steps=4)],
        )  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "advice"] == [1]
    crash = json.loads((tmp_path / "run" / "crash.json").read_text())
    assert crash["step"] == 5
    assert "Fine-tune longer" in crash["reason"]
