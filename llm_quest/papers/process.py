"""Process supervision (DeepSeekMath, arXiv:2402.03300, section 4.1.3): rewards for every step of an answer instead of
its end alone."""

from __future__ import annotations

from llm_quest.data.problems.chained import Chained
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Paper, Verdict, verdict_from_interval
from llm_quest.papers.rl_lab import RLExperiment, rl_arm, sft_arm, untrained_arm

EXPERIMENT = RLExperiment(
    name="process", task=Chained(shortest=2, longest=4, modulus=7, noise=0.2), width=64, layers=2, sft_steps=800,
    sft_learning_rate=3e-3, prompts=32, new_tokens=32, steps=60, every=5,
)  # fmt: skip
LEARNING_RATE = 3e-4
ARMS = {
    "base policy": untrained_arm(EXPERIMENT),
    "outcome": rl_arm(EXPERIMENT, rate=LEARNING_RATE),
    "process": rl_arm(EXPERIMENT, rate=LEARNING_RATE, process=True),
    "more SFT": sft_arm(EXPERIMENT, rate=LEARNING_RATE),
}


def verdict(results: ExperimentResults) -> Verdict:
    gain = results.difference("process", "outcome", "mean@8")
    words = (
        f"mean@8 with rewards for every step differs from that with rewards for the answer by {gain}; the answer's "
        f"rewards add {results.difference('outcome', 'base policy', 'mean@8')} to the base policy's"
    )
    return verdict_from_interval(gain, words, wanted="positive")


PAPER = Paper(
    name="process",
    title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (process supervision)",
    arxiv="2402.03300",
    claim="Rewards for every step improve the policy more, from the same samples, than a reward for the answer.",
    experiment="Chains of two to four operations modulo 7, computed step by step; a program verifies every step, so "
    f"the rewards are exact. A fifth of the teacher's steps are wrong. A Llama of width {EXPERIMENT.width} with "
    f"{EXPERIMENT.layers} layers is fine-tuned on its answers for {EXPERIMENT.sft_steps} steps of 64 rows (base "
    f"policy). Every arm then has {EXPERIMENT.steps} steps of {EXPERIMENT.prompts} questions x {EXPERIMENT.group} "
    f"samples at {LEARNING_RATE:g}. Control: outcome supervision; also more SFT with as many rows. Held out: greedy "
    f"accuracy on {EXPERIMENT.final_problems} chains, {EXPERIMENT.eval_problems} of them with 8 samples each.",
    confirms="mean@8 is higher with process supervision, the 95 % interval of the paired difference above zero.",
    refutes="it is lower, the interval below zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=8,
)
