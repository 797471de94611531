"""SFT memorizes, RL generalizes (Chu et al. 2025, arXiv:2501.17161), on countdown with three numbers: demonstrations
are few, while problems that a program can verify cost nothing."""

from __future__ import annotations

from llm_quest.data.problems.countdown import Countdown
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Paper, Verdict
from llm_quest.papers.rl_lab import RLExperiment, standard_arms

EXPERIMENT = RLExperiment(
    name="memorizes", task=Countdown(largest=9), sft_steps=500, num_demonstrations=4000, prompts=64, new_tokens=12,
    steps=300, every=50, final_problems=500,
)  # fmt: skip
LEARNING_RATE, POINTS, NUMBER = 2e-4, 0.15, "mean@8"
ARMS = {name: arm for name, arm in standard_arms(EXPERIMENT, LEARNING_RATE).items() if name != "format-only reward"}


def verdict(results: ExperimentResults) -> Verdict:
    """Confirmed if GRPO improves on the base policy and exceeds more SFT by POINTS."""
    gain = results.difference("GRPO", "more SFT", NUMBER)
    others = {
        f"{arm} ({number})": results.difference("GRPO", arm, number)
        for arm in ("more SFT", "base policy", "rejection fine-tuning", "random reward")
        for number in (NUMBER, "greedy")
    }
    words = "GRPO differs from " + ", ".join(f"{name} by {gap}" for name, gap in others.items())
    if gain.negative:
        return Verdict("refuted", words)
    improved = results.difference("GRPO", "base policy", NUMBER).positive
    return Verdict("confirmed" if improved and gain.positive and gain.mean >= POINTS else "no effect seen", words)


PAPER = Paper(
    name="memorizes",
    title="SFT Memorizes, RL Generalizes",
    arxiv="2501.17161",
    claim="More fine-tuning on the same demonstrations memorizes them; reinforcement learning on problems generalizes "
    "to unseen ones.",
    experiment="Countdown: three numbers up to 9 and a target; any correct expression counts. There are "
    f"{EXPERIMENT.num_demonstrations} demonstrations, all correct. A Llama of width {EXPERIMENT.width} with "
    f"{EXPERIMENT.layers} layers is fine-tuned on them for {EXPERIMENT.sft_steps} steps of 64 rows, eight epochs (base "
    f"policy). Every arm then has {EXPERIMENT.steps} steps of {EXPERIMENT.rows} rows at {LEARNING_RATE:g}: GRPO on "
    f"{EXPERIMENT.prompts} questions x {EXPERIMENT.group} samples, with any question of the training split, because a "
    "program can verify them all; more SFT on the same demonstrations; rejection fine-tuning on the correct ones of as "
    "many samples of the base policy; GRPO with random rewards. Held out: mean@8 of "
    f"{EXPERIMENT.eval_problems} problems, greedy accuracy on {EXPERIMENT.final_problems}.",
    confirms=f"GRPO's mean@8 is at least {POINTS:.0%} above that of more SFT and above the base policy's, the 95 % "
    "intervals of the paired differences above zero.",
    refutes="it is below that of more SFT, the interval below zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=40,
)
