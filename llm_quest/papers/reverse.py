"""Spurious rewards (Shao et al. 2025, arXiv:2506.10947): some models improve under random rewards. Does this one?"""

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
    """Refuted if accuracy rises under the verifier and not under random rewards."""
    gain, random = (results.difference(arm, "base policy", "greedy") for arm in ("GRPO", "random reward"))
    words = f"greedy accuracy changes by {gain} under the verifier's rewards and by {random} under random ones"
    if random.positive:
        return Verdict("confirmed", words)
    return Verdict("refuted" if gain.positive and gain.mean >= POINTS else "no effect seen", words)


PAPER = Paper(
    name="reverse",
    title="Spurious Rewards: Rethinking Training Signals in RLVR",
    arxiv="2506.10947",
    claim="Reinforcement learning raises accuracy even with random rewards (found for Qwen2.5 models, not for Llama 3 "
    "and OLMo 2).",
    experiment="Words of 3 and 4 of 8 letters are to be reversed; the teacher copies half of them. A Llama of width "
    f"{EXPERIMENT.width} with {EXPERIMENT.layers} layers is fine-tuned on its answers for {EXPERIMENT.sft_steps} "
    f"steps (base policy). Every arm then has {EXPERIMENT.steps} steps of {EXPERIMENT.rows} rows at "
    f"{LEARNING_RATE:g}. Control: the base policy; also GRPO with the verifier's rewards. Held out: "
    f"{EXPERIMENT.final_problems} words.",
    confirms="accuracy under random rewards is above the base policy's, the 95 % interval of the paired difference "
    "above zero.",
    refutes=f"it is not, although the verifier's rewards add at least {POINTS:.0%}, their interval above zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=2,
)
