"""Does reinforcement learning add to what the base model can solve (Yue et al. 2025, arXiv:2504.13837)? On countdown
with three numbers, where many answers are correct and a program verifies them."""

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
    """Confirmed if mean@8 rises and pass@8 falls."""
    one, eight = (results.difference("GRPO", "base policy", number) for number in ("mean@8", "pass@8"))
    gaps = {number: results.difference("GRPO", "more SFT", number) for number in ("mean@8", "greedy")}
    words = (
        f"GRPO changes mean@8 by {one} and pass@8 by {eight}; compared with more SFT the difference is "
        f"{gaps['mean@8']} in mean@8 and {gaps['greedy']} in greedy accuracy"
    )
    if one.positive and eight.negative:
        return Verdict("confirmed", words)
    return Verdict("refuted" if eight.positive else "no effect seen", words)


PAPER = Paper(
    name="countdown",
    title="Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base Model?",
    arxiv="2504.13837",
    claim="Reinforcement learning makes correct answers more likely in one sample; with many samples the base model "
    "solves more problems.",
    experiment="Countdown: three numbers up to 9 and a target; any correct expression counts. A Llama of width "
    f"{EXPERIMENT.width} with {EXPERIMENT.layers} layers is fine-tuned for {EXPERIMENT.sft_steps} steps of 64 rows on "
    f"solutions found by random search (base policy). Every arm then has {EXPERIMENT.steps} steps of {EXPERIMENT.rows} "
    f"rows at {LEARNING_RATE:g}: GRPO on {EXPERIMENT.prompts} questions x {EXPERIMENT.group} samples; more SFT; "
    "rejection fine-tuning on the correct ones of as many samples of the base policy; GRPO with random rewards. "
    "Control: the base policy. One sample is mean@8 and many are pass@8, on "
    f"{EXPERIMENT.eval_problems} held-out problems; greedy accuracy is on {EXPERIMENT.final_problems}.",
    confirms="mean@8 is above the base policy's and pass@8 below it; zero lies outside the 95 % intervals of both "
    "paired differences.",
    refutes="pass@8 is above the base policy's, its interval above zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=40,
)
