"""Diagnoses a reinforcement learning run from its metrics: prints advice, and stops a run that cannot learn.

The reward can rise while the answers get worse. So the diagnostics also read the share of groups without spread,
truncated completions, the policy's entropy, importance ratios and held-out accuracy."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_quest.errors import GuardStop

MetricsRow = Mapping[str, Any]
WINDOW = 3
"""Rows whose mean reward is compared."""
LEAST_REWARD_FALL, NOISE_FACTOR = 0.1, 4.0
"""A fall of the mean reward counts if it is larger than the first, and than so many times the noise of a row."""


@dataclass(frozen=True)
class Symptom:
    """A condition of a run and the advice for it. is_present(rows): whether the newest row of metrics, given those
    before it, shows it. fatal: a run that shows it for long cannot learn. collapse: where an earlier row did not show
    it, the run has got worse, and the last checkpoint before is kept."""

    name: str
    is_present: Callable[[Sequence[MetricsRow]], bool]
    advice: Callable[[MetricsRow], str]
    fatal: bool = False
    collapse: bool = False


@dataclass
class Diagnostics:
    """`on_log(row) -> advice`: the advice for each symptom when it appears, and again only after it was gone.
    patience_steps: steps that a fatal symptom may last, over at least three rows. symptoms: None for those of a policy.
    A resumed run starts without the rows of before."""

    patience_steps: int = 30
    symptoms: Sequence[Symptom] | None = None
    rows: list[MetricsRow] = field(default_factory=list)
    reported: set[str] = field(default_factory=set)
    last_healthy: dict[str, int] = field(default_factory=dict)
    first_seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def on_log(self, row: MetricsRow) -> list[str]:
        self.rows.append(row)
        advice = []
        for symptom in SYMPTOMS if self.symptoms is None else self.symptoms:
            if not symptom.is_present(self.rows):
                self.reported.discard(symptom.name)
                self.last_healthy[symptom.name] = row["step"]
                self.first_seen.pop(symptom.name, None)
                continue
            if symptom.name not in self.reported:
                advice.append(symptom.advice(row))
                self.reported.add(symptom.name)
            self._check_fatal(symptom, row)
        return advice

    @property
    def collapse_since(self) -> int | None:
        """The step of the last row before the collapse that the newest row shows; None if it shows none, or has shown
        it from the first row on."""
        known = SYMPTOMS if self.symptoms is None else self.symptoms
        names = [one.name for one in known if one.collapse and one.name in self.reported]
        return min((self.last_healthy[name] for name in names if name in self.last_healthy), default=None)

    def _check_fatal(self, symptom: Symptom, row: MetricsRow) -> None:
        first, times = self.first_seen.get(symptom.name, (row["step"], 0))
        self.first_seen[symptom.name] = (first, times + 1)
        if symptom.fatal and times + 1 >= 3 and row["step"] - first >= self.patience_steps:
            raise GuardStop(f"stopped at step {row['step']}, it cannot learn: {symptom.advice(row)}")


def metric_value(row: MetricsRow, name: str, default: float = math.nan) -> float:
    value = row.get(name)
    return default if value is None else float(value)


def share_correct(row: MetricsRow) -> float:
    """The share of right answers in a step: of several rewards, the one that compares with the answer."""
    named = (metric_value(row, f"rewards/{name}") for name in ("correct", "math_verify"))
    return next((value for value in named if not math.isnan(value)), metric_value(row, "reward"))


def never_correct(rows: Sequence[MetricsRow]) -> bool:
    return metric_value(rows[-1], "frac_reward_zero_std") >= 0.999 and share_correct(rows[-1]) < 0.5


def always_correct(rows: Sequence[MetricsRow]) -> bool:
    return metric_value(rows[-1], "frac_reward_zero_std") >= 0.999 and share_correct(rows[-1]) >= 0.5


def mostly_uniform_groups(rows: Sequence[MetricsRow]) -> bool:
    return 0.9 <= metric_value(rows[-1], "frac_reward_zero_std") < 0.999


def longer_without_gain(rows: Sequence[MetricsRow]) -> bool:
    """Completions are 1.5 times as long as in the first row, and the reward is no higher."""
    first, last = rows[0], rows[-1]
    return metric_value(last, "completions/mean_length") > 1.5 * metric_value(
        first, "completions/mean_length"
    ) and metric_value(last, "reward") <= metric_value(first, "reward")


def reward_without_accuracy(rows: Sequence[MetricsRow]) -> bool:
    """Since the first evaluation on held-out problems the reward has risen by 0.1 and accuracy has not."""
    looked = [row for row in rows if not math.isnan(metric_value(row, "eval/accuracy"))]
    if len(looked) < 2:
        return False
    first, last = looked[0], looked[-1]
    rise = metric_value(last, "reward") - metric_value(first, "reward")
    return rise >= 0.1 and metric_value(last, "eval/accuracy") <= metric_value(first, "eval/accuracy")


def reward_fell(rows: Sequence[MetricsRow]) -> bool:
    """The mean reward of the newest rows is back at that of the first ones, and the fall is larger than the noise."""
    rewards = [reward for row in rows if math.isfinite(reward := metric_value(row, "reward"))]
    if len(rewards) < 3 * WINDOW:
        return False
    means = [sum(rewards[i : i + WINDOW]) / WINDOW for i in range(len(rewards) - WINDOW + 1)]
    noise = (
        statistics.fmean(abs(later - before) for before, later in itertools.pairwise(rewards)) / 1.128
    )  # a row's std
    return means[-1] <= means[0] and max(means) - means[-1] > max(LEAST_REWARD_FALL, NOISE_FACTOR * noise)


SYMPTOMS: tuple[Symptom, ...] = (
    Symptom(
        "never right",
        never_correct,
        lambda row: (
            f"all samples of every group have the same reward (mean {metric_value(row, 'reward'):.3g}): no sample is "
            "better than another. Fine-tune longer first, take an easier level, or raise num_generations"
        ),
        fatal=True,
    ),
    Symptom(
        "always right",
        always_correct,
        lambda row: (
            f"all samples of every group have the same reward (mean {metric_value(row, 'reward'):.3g}): there is "
            "nothing left to learn here. Take a harder level"
        ),
        fatal=True,
    ),
    Symptom(
        "nothing scored",
        lambda rows: metric_value(rows[-1], "rewards/unscorable") >= 0.999,
        lambda row: "no sample could be scored: check the reward and the gold answers",
        fatal=True,
    ),
    Symptom(
        "mostly uniform",
        mostly_uniform_groups,
        lambda row: (
            f"{metric_value(row, 'frac_reward_zero_std'):.0%} of the groups have equal rewards and give no gradient: "
            "draw until groups are mixed (dynamic_sampling_rounds=4), or choose problems of fitting difficulty"
        ),
    ),
    Symptom(
        "unscorable",
        lambda rows: 0.1 < metric_value(rows[-1], "rewards/unscorable") < 0.999,
        lambda row: (
            f"{metric_value(row, 'rewards/unscorable'):.0%} of the samples could not be scored: look at the verifier"
        ),
    ),
    Symptom(
        "cut off",
        lambda rows: metric_value(rows[-1], "completions/clipped_ratio") > 0.5,
        lambda row: (
            f"{metric_value(row, 'completions/clipped_ratio'):.0%} of the answers do not end within the budget: raise "
            "max_new_tokens, or fine-tune on answers with their end-of-text token"
        ),
        collapse=True,
    ),
    Symptom(
        "low entropy",
        lambda rows: metric_value(rows[-1], "entropy") < 0.05,
        lambda row: (
            f"the entropy of the policy is low ({metric_value(row, 'entropy'):.3f} nats a token): lower "
            "learning_rate, raise loss_kwargs.epsilon_high, or add an entropy bonus (entropy_coef)"
        ),
        collapse=True,
    ),
    Symptom(
        "reward fell",
        reward_fell,
        lambda row: (
            f"the mean reward has lost what it had gained (now {metric_value(row, 'reward'):.3g}): lower "
            "learning_rate, raise kl_coef, or take fewer num_iterations per rollout"
        ),
        collapse=True,
    ),
    Symptom(
        "large ratio",
        lambda rows: metric_value(rows[-1], "ratio/max") > 10,
        lambda row: (
            f"a token became {metric_value(row, 'ratio/max'):.3g} times as likely between sampling and training: lower "
            "learning_rate, or take fewer num_iterations or num_mini_batches per rollout"
        ),
    ),
    Symptom(
        "large KL",
        lambda rows: metric_value(rows[-1], "kl") > 1,
        lambda row: (
            f"the policy is {metric_value(row, 'kl'):.2f} nats a token from its reference: raise kl_coef or lower the "
            "rate"
        ),
    ),
    Symptom(
        "longer without gain",
        longer_without_gain,
        lambda row: (
            f"answers grew to {metric_value(row, 'completions/mean_length'):.0f} tokens and are no better: punish "
            "length near the budget (overlong_buffer_tokens), or take loss_type=dr_grpo"
        ),
    ),
    Symptom(
        "reward without accuracy",
        reward_without_accuracy,
        lambda row: (
            f"the reward rises ({metric_value(row, 'reward'):.3f}) and held-out accuracy does not "
            f"({metric_value(row, 'eval/accuracy'):.3f}): the policy exploits the reward and does not learn "
            "the task; read its samples"
        ),
    ),
)
