"""Reinforcement learning from verifiable rewards (DeepSeek-R1, arXiv:2501.12948) where the teacher is often wrong:
imitation converges to the teacher, a verifier does not.

He forgets to carry in eight of ten sums. Half of the sums have nothing to carry, so 41 % of his answers are wrong."""

from __future__ import annotations

from llm_quest.data.problems.addition import Addition
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Paper, Verdict
from llm_quest.papers.rl_lab import RLExperiment, margin_verdict, standard_arms

EXPERIMENT = RLExperiment(
    name="noisy_teacher", task=Addition(digits=2, noise=0.8), width=96, layers=2, sft_steps=700, sft_learning_rate=2e-3,
    prompts=64, new_tokens=5, steps=120, every=15,
)  # fmt: skip
LEARNING_RATE, POINTS = 3e-4, 0.15
ARMS = standard_arms(EXPERIMENT, LEARNING_RATE)


def verdict(results: ExperimentResults) -> Verdict:
    return margin_verdict(results, "greedy", POINTS)


PAPER = Paper(
    name="noisy_teacher",
    title="DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning (a teacher often wrong)",
    arxiv="2501.12948",
    claim="Rewards that a program checks take a policy past the demonstrations it began with; more of the same "
    "demonstrations do not.",
    experiment="Sums of numbers of one and two digits. The teacher forgets to carry in eight of ten, which makes 41 % "
    f"of his answers wrong. A Llama of {EXPERIMENT.width} x {EXPERIMENT.layers} learns from him for "
    f"{EXPERIMENT.sft_steps} steps of 64 rows; then every arm has {EXPERIMENT.steps} steps of {EXPERIMENT.rows} rows "
    f"at {LEARNING_RATE:g}: GRPO on {EXPERIMENT.prompts} questions x {EXPERIMENT.group} samples; more of the teacher "
    "(the control); the beginner's own right samples out of as many; GRPO on the toss of a coin; GRPO on the form of "
    f"the answer. Held out: {EXPERIMENT.final_problems} sums that no step has seen, answered greedily; mean@8 and "
    f"pass@8 of {EXPERIMENT.eval_problems} of them.",
    confirms=f"GRPO's greedy accuracy is {POINTS:.0%} or more above that of more teaching and the 95 % interval of "
    "the paired difference lies above zero, as do those to the coin and to the form.",
    refutes="It lies below that of more teaching, likewise.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=8,
)
