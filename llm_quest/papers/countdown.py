"""What reinforcement learning adds to what a model can do already (Yue et al. 2025, arXiv:2504.13837), on countdown
with three numbers: many answers are right, and a program can tell."""

from __future__ import annotations

from llm_quest.data.problems.countdown import Countdown
from llm_quest.papers.paper import Paper, Picture, Results, Verdict
from llm_quest.papers.school import School, arms

SCHOOL = School(
    name="countdown", task=Countdown(largest=9), lessons=1500, prompts=64, new_tokens=12, steps=300, every=50,
    finals=500,
)  # fmt: skip
RATE = 2e-4
ARMS = {name: arm for name, arm in arms(SCHOOL, RATE).items() if name != "format-only reward"}


def judge(results: Results) -> Verdict:
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
    f"{SCHOOL.width} x {SCHOOL.layers} learns for {SCHOOL.lessons} steps of 64 rows from solutions found by trying at "
    f"random; then every arm has {SCHOOL.steps} steps of {SCHOOL.rows} rows at {RATE:g}: GRPO on {SCHOOL.prompts} "
    f"questions x {SCHOOL.group} samples; more of the teacher; the beginner's own right samples out of as many; GRPO "
    "on the toss of a coin. Control: the beginner. One try is mean@8, many are pass@8, of "
    f"{SCHOOL.exam} problems that no step has seen; greedy answers to {SCHOOL.finals}.",
    confirms="mean@8 is above the beginner's and pass@8 below it, the 95 % intervals of the paired differences clear "
    "of zero.",
    refutes="pass@8 is above the beginner's, likewise.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "held-out greedy accuracy"),
    minutes=40,
)
