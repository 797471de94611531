"""GRPO and its variants (GSPO, Zheng et al. 2025, arXiv:2507.18071, and others) where they differ: with four
minibatches for each rollout, so that three of four updates are off-policy."""

from __future__ import annotations

from dataclasses import replace

from llm_quest.papers.paper import CurvePlot, ExperimentResults, Paper, Verdict
from llm_quest.papers.reverse import EXPERIMENT as REVERSE
from llm_quest.papers.rl_lab import rl_arm

EXPERIMENT = replace(REVERSE, prompts=32, steps=30, every=3)
LEARNING_RATE, MINIBATCHES = 1e-3, 4
NAMES = {"GRPO": "grpo", "Dr. GRPO": "dr_grpo", "DAPO": "dapo", "GSPO": "gspo", "SAPO": "sapo", "CISPO": "cispo"}
ARMS = {
    name: rl_arm(EXPERIMENT, rate=LEARNING_RATE, variant=own, minibatches=MINIBATCHES) for name, own in NAMES.items()
}


def verdict(results: ExperimentResults) -> Verdict:
    """Confirmed if GSPO exceeds GRPO; the other variants are reported."""
    gaps = {name: results.difference(name, "GRPO", "greedy") for name in NAMES if name != "GRPO"}
    words = "greedy accuracy, less GRPO's: " + ", ".join(f"{name} {gap}" for name, gap in gaps.items())
    if gaps["GSPO"].negative:
        return Verdict("refuted", words)
    return Verdict("confirmed" if gaps["GSPO"].positive else "no effect seen", words)


PAPER = Paper(
    name="variants",
    title="Group Sequence Policy Optimization, with GRPO, Dr. GRPO, DAPO, SAPO and CISPO",
    arxiv="2507.18071",
    claim="With several updates per rollout, a tightly clipped importance ratio of the whole sequence learns more "
    "from the same samples than GRPO's ratio of each token.",
    experiment=f"The words and the base policy of `quest reproduce reverse`; {EXPERIMENT.steps} rollouts of "
    f"{EXPERIMENT.rows} samples, each trained on in {MINIBATCHES} minibatches, at {LEARNING_RATE:g} for all; each "
    "variant with its own divisor and advantages, and the clip range of its paper or, without a number there, the "
    "usual one (GRPO and Dr. GRPO 0.2 and 0.2; CISPO 5, which is ScaleRL's, arXiv:2510.13786). DAPO samples until "
    "groups are mixed, so it draws more samples. Control: GRPO.",
    confirms="GSPO's held-out accuracy is above GRPO's, the 95 % interval of the paired difference above zero.",
    refutes="it is below, the interval below zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("rollout", "held-out greedy accuracy"),
    minutes=4,
)
