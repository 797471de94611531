"""Spurious rewards (Shao et al. 2025, arXiv:2506.10947): some models improve under any reward. Does this one?"""

from __future__ import annotations

from llm_quest.data.problems.strings import Reverse
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Paper, Verdict
from llm_quest.papers.rl_lab import RLExperiment, standard_arms

EXPERIMENT = RLExperiment(
    name="reverse", task=Reverse(shortest=3, longest=4, letters=8, noise=0.5), width=64, layers=2, sft_steps=200,
    sft_learning_rate=3e-3, new_tokens=8, steps=60, every=5, final_problems=500,
)  # fmt: skip
LEARNING_RATE, POINTS = 1e-3, 0.3
ARMS = standard_arms(EXPERIMENT, LEARNING_RATE)


def verdict(results: ExperimentResults) -> Verdict:
    """Up with the verifier, not with a coin."""
    gain, coin = (results.difference(arm, "the beginner", "greedy") for arm in ("GRPO", "random reward"))
    words = f"greedy accuracy changes by {gain} under the verifier's rewards and by {coin} under a coin's"
    if coin.positive:
        return Verdict("confirmed", words)
    return Verdict("refuted" if gain.positive and gain.mean >= POINTS else "no effect seen", words)


PAPER = Paper(
    name="reverse",
    title="Spurious Rewards: Rethinking Training Signals in RLVR",
    arxiv="2506.10947",
    claim="Reinforcement learning lifts accuracy even when the reward is the toss of a coin (found on Qwen2.5 "
    "models, not on Llama 3 and OLMo 2).",
    experiment="Words of 3 and 4 of 8 letters, to be reversed; the teacher copies half of them. A Llama of "
    f"{EXPERIMENT.width} x {EXPERIMENT.layers} learns from him for {EXPERIMENT.sft_steps} steps; then every arm has "
    f"{EXPERIMENT.steps} steps of {EXPERIMENT.rows} rows at {LEARNING_RATE:g}. Control: the beginner; beside it the "
    f"same GRPO on the verifier's word. Held out: {EXPERIMENT.final_problems} words that no step has seen.",
    confirms="accuracy under a coin's rewards is above the beginner's, the 95 % interval of the paired difference "
    "above zero.",
    refutes=f"it is not, though the verifier's rewards add at least {POINTS:.0%}, likewise.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=2,
)
