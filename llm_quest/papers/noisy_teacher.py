"""Reinforcement learning from verifiable rewards (DeepSeek-R1, arXiv:2501.12948) with wrong demonstrations: imitation
converges to the demonstrations, reinforcement learning to what the verifier accepts.

The teacher omits the carry in eight of ten sums. Half of the sums have no carry, so 41 % of its answers are wrong."""

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
    title="DeepSeek-R1: Incentivizing Reasoning Capability in LLMs via Reinforcement Learning (wrong demonstrations)",
    arxiv="2501.12948",
    claim="Verifiable rewards take a policy beyond the demonstrations it was fine-tuned on; more of the same "
    "demonstrations do not.",
    experiment="Sums of numbers of one and two digits. The teacher omits the carry in eight of ten, so 41 % of its "
    f"answers are wrong. A Llama of width {EXPERIMENT.width} with {EXPERIMENT.layers} layers is fine-tuned on them "
    f"for {EXPERIMENT.sft_steps} steps of 64 rows (base policy). Every arm then has {EXPERIMENT.steps} steps of "
    f"{EXPERIMENT.rows} rows at {LEARNING_RATE:g}: GRPO on {EXPERIMENT.prompts} questions x {EXPERIMENT.group} "
    "samples; more SFT (the control); rejection fine-tuning on the correct ones of as many samples of the base "
    "policy; GRPO with random rewards; GRPO with rewards for the format. Held out: greedy accuracy on "
    f"{EXPERIMENT.final_problems} sums; mean@8 and pass@8 of {EXPERIMENT.eval_problems} of them.",
    confirms=f"GRPO's greedy accuracy is at least {POINTS:.0%} above that of more SFT; the 95 % interval of the paired "
    "difference lies above zero, as do those to random rewards and to rewards for the format.",
    refutes="it is below that of more SFT, the interval below zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=8,
)
