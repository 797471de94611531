"""What reinforcement learning adds to what a model can do already (Yue et al. 2025, arXiv:2504.13837), on countdown
with three numbers: many answers are right, and a program can tell."""

from __future__ import annotations

from llm_quest.data.problems.countdown import Countdown
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Paper, Verdict
from llm_quest.papers.rl_lab import RLExperiment, standard_arms

EXPERIMENT = RLExperiment(
    name="countdown", task=Countdown(largest=9), sft_steps=1500, prompts=64, new_tokens=12, steps=300, every=50,
    final_problems=500,
)  # fmt: skip
LEARNING_RATE = 2e-4
ARMS = {name: arm for name, arm in standard_arms(EXPERIMENT, LEARNING_RATE).items() if name != "format-only reward"}


def verdict(results: ExperimentResults) -> Verdict:
    """Likelier in one try, and rarer in eight."""
    one, eight = (results.difference("GRPO", "the beginner", number) for number in ("mean@8", "pass@8"))
    told = {number: results.difference("GRPO", "more of the teacher", number) for number in ("mean@8", "greedy")}
    words = (
        f"GRPO changes mean@8 by {one} and pass@8 by {eight}; to more of the teacher it is {told['mean@8']} by samples "
        f"and {told['greedy']} by greedy answers"
    )
    if one.positive and eight.negative:
        return Verdict("confirmed", words)
    return Verdict("refuted" if eight.positive else "no effect seen", words)


PAPER = Paper(
    name="countdown",
    title="Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base Model?",
    arxiv="2504.13837",
    claim="Rewards make right answers likelier in one try; with many tries the model they began with solves more.",
    experiment="Countdown: three numbers to 9 and a target, any right expression counts. A Llama of "
    f"{EXPERIMENT.width} x {EXPERIMENT.layers} learns for {EXPERIMENT.sft_steps} steps of 64 rows from solutions "
    f"found by trying at random; then every arm has {EXPERIMENT.steps} steps of {EXPERIMENT.rows} rows at "
    f"{LEARNING_RATE:g}: GRPO on {EXPERIMENT.prompts} questions x {EXPERIMENT.group} samples; more of the teacher; "
    "the beginner's own right samples out of as many; GRPO on the toss of a coin. Control: the beginner. One try is "
    f"mean@8, many are pass@8, of {EXPERIMENT.eval_problems} problems that no step has seen; greedy answers to "
    f"{EXPERIMENT.final_problems}.",
    confirms="mean@8 is above the beginner's and pass@8 below it, the 95 % intervals of the paired differences clear "
    "of zero.",
    refutes="pass@8 is above the beginner's, likewise.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=40,
)
