"""Spurious rewards (Shao et al. 2025, arXiv:2506.10947): some models improve under any reward. Does this one?"""

from __future__ import annotations

from llm_quest.data.problems.strings import Reverse
from llm_quest.papers.paper import Paper, Picture, Results, Verdict
from llm_quest.papers.school import School, arms

SCHOOL = School(
    name="reverse", task=Reverse(shortest=3, longest=4, letters=8, noise=0.5), width=64, layers=2, lessons=200,
    rate=3e-3, new_tokens=8, steps=60, every=5, finals=500,
)  # fmt: skip
RATE, POINTS = 1e-3, 0.3
ARMS = arms(SCHOOL, RATE)


def judge(results: Results) -> Verdict:
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
    f"{SCHOOL.width} x {SCHOOL.layers} learns from him for {SCHOOL.lessons} steps; then every arm has {SCHOOL.steps} "
    f"steps of {SCHOOL.rows} rows at {RATE:g}. Control: the beginner; beside it the same GRPO on the verifier's "
    f"word. Held out: {SCHOOL.finals} words that no step has seen.",
    confirms="accuracy under a coin's rewards is above the beginner's, the 95 % interval of the paired difference "
    "above zero.",
    refutes=f"it is not, though the verifier's rewards add at least {POINTS:.0%}, likewise.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "held-out greedy accuracy"),
    minutes=2,
)
