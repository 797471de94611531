"""Which numbers of a run belong together: one plot for each family of numbers that have the same unit and are read
against each other, and the main numbers that a method is watched by."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llm_quest.report.plots import PERCENT
from llm_quest.report.record import RunRecord

LOSS_UNITS = {
    "dpo": "nats per pair", "reward": "nats per pair", "kto": "per answer", "prm": "nats per step",
    "classify": "nats per text", "vit": "nats per image", "grpo": "", "iterative": "", "rpt": "",
}  # fmt: skip
"""Recipe -> what its loss counts; of the others: nats per token. A policy's surrogate has no unit."""
SIDE_METRICS = ("rewards/margin", "rewards/accuracy", "rewards/chosen", "rewards/rejected", "rewards/mean")
NOT_REWARDS = (*SIDE_METRICS, "rewards/unscorable")


@dataclass(frozen=True)
class MetricFamily:
    """A plot. lines: (metric, its name in the legend), the first that a run has stands for it among several runs.
    unit: of the y axis, PERCENT for shares. log: a logarithmic axis."""

    title: str
    lines: tuple[tuple[str, str], ...]
    unit: str = ""
    log: bool = False


LOSS_TERMS = (
    ("load_balancing", "load balancing"), ("load_balancing_pooled", "load balancing, pooled"),
    ("sequence_balancing", "sequence balancing"), ("z_loss", "router z"), ("distillation", "teacher"),
    ("number_token", "number token"), ("nll_loss", "SFT term"), ("value_loss", "value"), ("loss/value", "value"),
    *((f"lookahead_{k}", f"{k} tokens further") for k in range(1, 5)),
)  # fmt: skip
FAMILIES = (
    MetricFamily("Held-out bits per byte", (("eval/bits_per_byte", "model"),), "bits"),
    MetricFamily("Terms of the loss, and the sum that is optimized", (("loss", "sum"), *LOSS_TERMS)),
    MetricFamily(
        "Rewards of pairs",
        (
            ("rewards/margin", "margin"), ("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"),
            ("rewards/mean", "mean"), ("eval/margin", "margin, held out"),
        ),
    ),
    MetricFamily(
        "Accuracy",
        (
            ("eval/accuracy", "held out"), ("rewards/accuracy", "training"), ("accuracy", "training"),
            ("eval/accuracy_same_length", "held out, like lengths"), ("eval/macro_f1", "macro F1, held out"),
            ("micro_f1", "micro F1, training"), ("eval/micro_f1", "micro F1, held out"),
            ("eval/commonest", "always the commonest"),
        ),
        PERCENT,
    ),
    MetricFamily("Log-probability of answers", (("logps/chosen", "chosen"), ("logps/rejected", "rejected")), "nats"),
    MetricFamily(
        "Length of completions",
        (
            ("completions/mean_length", "training"), ("completions/mean_terminated_length", "those that ended"),
            ("eval/length", "held out"),
        ),
        "tokens",
    ),
    MetricFamily("Spread of rewards within a group", (("reward_std", "standard deviation"),)),
    MetricFamily("Entropy", (("entropy", "of what was drawn"), ("entropy_exact", "exact")), "nats per token"),
    MetricFamily("KL to the reference", (("kl", "KL"),), "nats per token"),
    MetricFamily(
        "Shares of samples",
        (
            ("frac_reward_zero_std", "groups without spread"), ("completions/clipped_ratio", "cut off by the length"),
            ("rewards/unscorable", "unscorable"), ("clipped", "clipped tokens"),
            ("eval/clipped_ratio", "cut off, held out"),
        ),
        PERCENT,
    ),
    MetricFamily("Importance ratio", (("ratio/max", "largest"), ("ratio/min", "smallest")), log=True),
    MetricFamily("Balance of experts", (("max_violation", "largest load over the mean, less 1"),)),
    MetricFamily("Reward against length", (("eval/reward_length_correlation", "correlation, held out"),)),
    MetricFamily("Calibration error", (("eval/calibration_error", "held out"),), PERCENT),
    MetricFamily(
        "Seconds of a rollout", (("sampling_seconds", "sampling"), ("scoring_seconds", "scoring")), "seconds"
    ),
    MetricFamily("Compute", (("teraflops", "all that was spent"),), "teraflops"),
    MetricFamily("Learning rate", (("learning_rate", "rate"),)),
    MetricFamily("Gradient norm", (("grad_norm", "norm"),), log=True),
)  # fmt: skip
"""The plots beside the loss, the rewards and the speed, whose names depend on the run."""
WATCHED: tuple[tuple[str, str, str], ...] = (
    ("reward", "reward", "{:.3f}"), ("completions/mean_length", "length of completions", "{:.1f} tokens"),
    ("entropy", "entropy", "{:.3f} nats"), ("kl", "KL to the reference", "{:.4f} nats"),
    ("frac_reward_zero_std", "groups without spread", "{:.1%}"), ("completions/clipped_ratio", "cut off", "{:.1%}"),
    ("rewards/margin", "training margin", "{:.3f}"), ("rewards/accuracy", "training accuracy", "{:.1%}"),
    ("rewards/chosen", "reward of chosen", "{:.3f}"), ("rewards/rejected", "reward of rejected", "{:.3f}"),
    ("accuracy", "training accuracy", "{:.1%}"), ("micro_f1", "training micro F1", "{:.1%}"),
)  # fmt: skip
"""(metric, its label, its form): the main numbers besides losses and held-out scores."""


def recipe_of(record: RunRecord) -> str:
    """The recipe that a run's config names; empty where it names none."""
    match = re.search(r"^recipe: *(\w+)", record.config, flags=re.MULTILINE)
    return match[1] if match else ""


def loss_unit(record: RunRecord) -> str:
    """The unit of the main loss."""
    if record.data.get("problem_type") == "multi_label_classification":
        return "nats per label"
    return LOSS_UNITS.get(recipe_of(record), f"nats per {record.unit.removesuffix('s')}")


def main_loss_metric(record: RunRecord) -> str:
    """The loss that the run is about, and that its held-out loss is compared with: the next token's or the pair's,
    where other terms are added to it; of on-policy distillation the divergence, which is the sum."""
    if recipe_of(record) == "gkd":
        return "loss"
    return next((name for name in ("next_token", "preference_loss") if name in record.names), "loss")


def is_plotted(metric: str) -> bool:
    """Whether a plot of its own has this held-out number."""
    return metric.startswith("eval/reward") or any(metric == one for family in FAMILIES for one, _ in family.lines)


def reward_family(record: RunRecord) -> MetricFamily:
    """A policy's rewards, each with its curve, and the held-out ones."""
    each = [key for key in record.names if key.startswith("rewards/") and key not in NOT_REWARDS]
    own = [(key, key.removeprefix("rewards/")) for key in each]
    curves = [(key, f"{key.split('/')[-1]}, held out") for key in record.names if key.startswith("eval/reward")]
    return MetricFamily("Reward", (("reward", "training"), *own, *curves))


def families_of(record: RunRecord) -> Iterator[MetricFamily]:
    """The plots of a run beside its rewards and its loss, in the order of the page."""
    has_terms = record.names.keys() & {metric for metric, _ in LOSS_TERMS}
    yield from (family for family in FAMILIES if family.lines[0][0] != "loss" or has_terms)
