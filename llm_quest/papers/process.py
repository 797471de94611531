"""Process supervision (DeepSeekMath, arXiv:2402.03300, section 4.1.3): every step of an answer is rewarded, not its end
alone."""

from __future__ import annotations

from llm_quest.data.problems.chained import Chained
from llm_quest.papers.paper import Paper, Picture, Results, Verdict, judged
from llm_quest.papers.school import School, by_rewards, by_teacher, no_more

SCHOOL = School(
    name="process", task=Chained(shortest=2, longest=4, modulus=7, noise=0.2), width=64, layers=2, lessons=800,
    rate=3e-3, prompts=32, new_tokens=32, steps=60, every=5,
)  # fmt: skip
RATE = 3e-4
ARMS = {
    "the beginner": no_more(SCHOOL),
    "outcome": by_rewards(SCHOOL, rate=RATE),
    "process": by_rewards(SCHOOL, rate=RATE, process=True),
    "more of the teacher": by_teacher(SCHOOL, rate=RATE),
}


def judge(results: Results) -> Verdict:
    gain = results.difference("process", "outcome", "mean@8")
    words = (
        f"mean@8 with rewards for every step differs from that with rewards for the answer by {gain}; the answer's "
        f"rewards add {results.difference('outcome', 'the beginner', 'mean@8')} to the beginner's"
    )
    return judged(gain, words, wanted="positive")


PAPER = Paper(
    name="process",
    title="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (process supervision)",
    arxiv="2402.03300",
    claim="Rewards for every step teach more, from the same samples, than a reward for the answer.",
    experiment="Chains of two to four operations modulo 7, worked out step by step; a program checks every step, so "
    f"the rewards are exact. The teacher gets a fifth of his steps wrong. A Llama of {SCHOOL.width} x "
    f"{SCHOOL.layers} learns from him for {SCHOOL.lessons} steps of 64 rows; then each arm has {SCHOOL.steps} steps "
    f"of {SCHOOL.prompts} questions x {SCHOOL.group} samples at {RATE:g}. Control: outcome supervision; beside it as "
    f"many rows of the teacher. Held out: {SCHOOL.finals} chains answered greedily, {SCHOOL.exam} of them with 8 "
    "samples each.",
    confirms="mean@8 is higher with process supervision, the 95 % interval of the paired difference above zero.",
    refutes="it is lower, likewise.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "held-out greedy accuracy"),
    minutes=8,
)
