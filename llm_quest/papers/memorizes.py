"""SFT memorizes, RL generalizes (Chu et al. 2025, arXiv:2501.17161), on countdown with three numbers: a teacher has few
solutions to show, while problems that a program can check cost nothing."""

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
    """Does imitation stand still or fall where rewards lift, and by how much?"""
    gain = results.difference("GRPO", "more of the teacher", NUMBER)
    others = {
        f"{arm} ({number})": results.difference("GRPO", arm, number)
        for arm in ("more of the teacher", "the beginner", "rejection fine-tuning", "random reward")
        for number in (NUMBER, "greedy")
    }
    words = "GRPO differs from " + ", ".join(f"{told} by {more}" for told, more in others.items())
    if gain.negative:
        return Verdict("refuted", words)
    lifted = results.difference("GRPO", "the beginner", NUMBER).positive
    return Verdict("confirmed" if lifted and gain.positive and gain.mean >= POINTS else "no effect seen", words)


PAPER = Paper(
    name="memorizes",
    title="SFT Memorizes, RL Generalizes",
    arxiv="2501.17161",
    claim="More imitation of the same demonstrations is learned by heart; rewards on problems go on to what was not "
    "seen.",
    experiment="Countdown: three numbers to 9 and a target, any right expression counts. A teacher has "
    f"{EXPERIMENT.num_demonstrations} solutions, all right. A Llama of {EXPERIMENT.width} x {EXPERIMENT.layers} "
    f"learns from them for {EXPERIMENT.sft_steps} steps of 64 rows (eight times each); then every arm has "
    f"{EXPERIMENT.steps} steps of {EXPERIMENT.rows} rows at {LEARNING_RATE:g}: GRPO on {EXPERIMENT.prompts} questions "
    f"x {EXPERIMENT.group} samples, any question of the training split, for a program can check them all; more of the "
    "teacher, that is, his solutions again; the beginner's own right samples out of as many; GRPO on the toss of a "
    f"coin. Held out: mean@8 of {EXPERIMENT.eval_problems} problems that no step has seen, greedy answers to "
    f"{EXPERIMENT.final_problems}.",
    confirms=f"GRPO's mean@8 is {POINTS:.0%} or more above that of more teaching and above the beginner's, the 95 % "
    "intervals of the paired differences above zero.",
    refutes="It lies below that of more teaching, likewise.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "held-out greedy accuracy"),
    minutes=40,
)
