"""The doctor of a reinforcement run: reads its numbers and says in words what is wrong and what helps. A run that
cannot learn is stopped, and told why.

Reward alone proves little: it can rise while the answers get worse. So the doctor also looks at how many groups hold
any news, whether answers end, how much chance is left in the policy, and at held-out accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_quest.errors import GuardStop

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sign:
    """Something to look for. seen(rows): does the newest row, in the light of those before it, show it? fatal: a run
    that shows it for long cannot learn."""

    name: str
    seen: Callable[[Sequence[Row]], bool]
    advice: Callable[[Row], str]
    fatal: bool = False


@dataclass
class Doctor:
    """`watch(row) -> advice`, each piece once, until its sign is gone and comes back. patience: steps that a fatal sign
    may last, over at least three rows. What was seen before a resumption is not remembered."""

    patience: int = 30
    rows: list[Row] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    since: dict[str, tuple[int, int]] = field(default_factory=dict)

    def watch(self, row: Row) -> list[str]:
        self.rows.append(row)
        advice = []
        for sign in SIGNS:
            if not sign.seen(self.rows):
                self.told.discard(sign.name)
                self.since.pop(sign.name, None)
                continue
            if sign.name not in self.told:
                advice.append(sign.advice(row))
                self.told.add(sign.name)
            self._lasts(sign, row)
        return advice

    def _lasts(self, sign: Sign, row: Row) -> None:
        first, times = self.since.get(sign.name, (row["step"], 0))
        self.since[sign.name] = (first, times + 1)
        if sign.fatal and times + 1 >= 3 and row["step"] - first >= self.patience:
            raise GuardStop(f"stopped at step {row['step']}, it cannot learn: {sign.advice(row)}")


def number(row: Row, name: str, default: float = math.nan) -> float:
    value = row.get(name)
    return default if value is None else float(value)


def never_right(rows: Sequence[Row]) -> bool:
    return number(rows[-1], "flat") >= 0.999 and number(rows[-1], "reward") < 0.5


def always_right(rows: Sequence[Row]) -> bool:
    return number(rows[-1], "flat") >= 0.999 and number(rows[-1], "reward") >= 0.5


def mostly_flat(rows: Sequence[Row]) -> bool:
    return 0.9 <= number(rows[-1], "flat") < 0.999


def longer_for_nothing(rows: Sequence[Row]) -> bool:
    """Half as long again as in the beginning, and no better."""
    first, last = rows[0], rows[-1]
    return number(last, "length") > 1.5 * number(first, "length") and number(last, "reward") <= number(first, "reward")


def reward_without_accuracy(rows: Sequence[Row]) -> bool:
    """Since the first look at held-out problems the reward has risen by a tenth and accuracy has not."""
    looked = [row for row in rows if not math.isnan(number(row, "eval/accuracy"))]
    if len(looked) < 2:
        return False
    first, last = looked[0], looked[-1]
    rise = number(last, "reward") - number(first, "reward")
    return rise >= 0.1 and number(last, "eval/accuracy") <= number(first, "eval/accuracy")


SIGNS: tuple[Sign, ...] = (
    Sign(
        "never right",
        never_right,
        lambda row: (
            f"every group is all alike (mean reward {number(row, 'reward'):.3g}): nothing tells a better sample from a "
            "worse one. Fine-tune longer first, take an easier level, or raise rollout.group"
        ),
        fatal=True,
    ),
    Sign(
        "always right",
        always_right,
        lambda row: (
            f"every group is all alike (mean reward {number(row, 'reward'):.3g}): there is nothing left to learn here. "
            "Take a harder level"
        ),
        fatal=True,
    ),
    Sign(
        "nothing scored",
        lambda rows: number(rows[-1], "unscorable") >= 0.999,
        lambda row: "not one sample could be scored: look at the reward and at the gold answers",
        fatal=True,
    ),
    Sign(
        "mostly flat",
        mostly_flat,
        lambda row: (
            f"{number(row, 'flat'):.0%} of the groups are all alike and teach nothing: draw until groups are mixed "
            "(rollout.draws=4), or choose problems nearer to what the model can do"
        ),
    ),
    Sign(
        "unscorable",
        lambda rows: 0.1 < number(rows[-1], "unscorable") < 0.999,
        lambda row: f"{number(row, 'unscorable'):.0%} of the samples could not be scored: look at the verifier",
    ),
    Sign(
        "cut off",
        lambda rows: number(rows[-1], "truncated") > 0.5,
        lambda row: (
            f"{number(row, 'truncated'):.0%} of the answers do not end within the budget: raise rollout.new_tokens, or "
            "fine-tune on answers with their end-of-text token"
        ),
    ),
    Sign(
        "no chance left",
        lambda rows: number(rows[-1], "entropy") < 0.05,
        lambda row: (
            f"the policy hardly varies any more ({number(row, 'entropy'):.3f} nats a token): lower optimizer.lr, raise "
            "clip.high, or add an entropy bonus"
        ),
    ),
    Sign(
        "far ratio",
        lambda rows: number(rows[-1], "ratio/max") > 10,
        lambda row: (
            f"a token became {number(row, 'ratio/max'):.3g} times as likely between sampling and training: lower "
            "optimizer.lr, or take fewer updates or minibatches per rollout"
        ),
    ),
    Sign(
        "far from the reference",
        lambda rows: number(rows[-1], "kl") > 1,
        lambda row: (
            f"the policy is {number(row, 'kl'):.2f} nats a token from its reference: raise kl.beta or lower the rate"
        ),
    ),
    Sign(
        "longer for nothing",
        longer_for_nothing,
        lambda row: (
            f"answers grew to {number(row, 'length'):.0f} tokens and are no better: punish length near the budget "
            "(rollout.overlong), or take variant=dr_grpo"
        ),
    ),
    Sign(
        "reward without accuracy",
        reward_without_accuracy,
        lambda row: (
            f"the reward rises ({number(row, 'reward'):.3f}) and held-out accuracy does not "
            f"({number(row, 'eval/accuracy'):.3f}): the policy has learned the reward, not the task; read its samples"
        ),
    ),
)
