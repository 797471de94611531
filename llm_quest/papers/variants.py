"""The GRPO family (GSPO, Zheng et al. 2025, arXiv:2507.18071, and its relatives) where its members differ: four
minibatches to a rollout, so that three of four updates are made off-policy."""

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
    """Is any of the five told apart from GRPO?"""
    gaps = {name: results.difference(name, "GRPO", "greedy") for name in NAMES if name != "GRPO"}
    words = "greedy accuracy, less GRPO's: " + ", ".join(f"{name} {gap}" for name, gap in gaps.items())
    if gaps["GSPO"].negative:
        return Verdict("refuted", words)
    return Verdict("confirmed" if gaps["GSPO"].positive else "no effect seen", words)


PAPER = Paper(
    name="variants",
    title="Group Sequence Policy Optimization, beside GRPO, Dr. GRPO, DAPO, SAPO and CISPO",
    arxiv="2507.18071",
    claim="With several updates per rollout a ratio of the whole sequence, clipped tightly, learns more from the "
    "same samples than GRPO's ratio of each token.",
    experiment=f"The words and the beginner of `quest reproduce reverse`; {EXPERIMENT.steps} rollouts of "
    f"{EXPERIMENT.rows} samples, each learned from in {MINIBATCHES} minibatches, at {LEARNING_RATE:g} for all; each "
    "variant with its own divisor and advantages, and the clip of its paper or, where that gives no number, the usual "
    "one (GRPO and Dr. GRPO 0.2 and 0.2, CISPO 5, which is ScaleRL's, arXiv:2510.13786). DAPO draws until groups are "
    "mixed, so it asks for more samples. Control: GRPO.",
    confirms="GSPO's held-out accuracy is above GRPO's, the 95 % interval of the paired difference above zero.",
    refutes="it is below, likewise.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("rollout", "held-out greedy accuracy"),
    minutes=4,
)
