"""Scaling laws for reward model over-optimisation (Gao et al. 2022, arXiv:2210.10760), and DeepSeekMath's remedy, a
reward model that is trained on with what the policy has become (arXiv:2402.03300, algorithm 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from llm_quest.data.preferences import Rated
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.policy_gradient import PolicyGradient
from llm_quest.objectives.reward_model import RewardLoss, scores
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict
from llm_quest.papers.reverse import SCHOOL as WORDS
from llm_quest.papers.school import Exam, beginner, run
from llm_quest.rollouts.rewards import Correct
from llm_quest.rollouts.rollouts import Plan, Rollouts
from llm_quest.rollouts.sample import Sample
from llm_quest.rollouts.scored import ReplayFeed, Scored, comparisons
from llm_quest.rollouts.scoring import Judge, Scoring
from llm_quest.techniques.score_head import ScoreHead

PHASES, STEPS = 4, 25
SCHOOL = replace(WORDS, name="overoptimization", steps=PHASES * STEPS, every=5)
QUESTIONS, LESSONS, JUDGE_RATE, REPLAY = 64, 60, 1e-3, 0.1
RATE = 5e-4
FAR = 1_000_000
"""Questions for comparisons and for looking on stand so far on in the list that no rollout asks them."""


def asked(model: Decoder, seed: int, phase: int, number: int = QUESTIONS) -> list[list[Sample]]:
    """What the policy writes now."""
    first = FAR * (phase + 1)
    questions = [SCHOOL.question(seed, first + index) for index in range(number)]
    return SCHOOL.writer()(model, questions, SCHOOL.group, seed + phase)


def taught(judge: Decoder, new: list[Rated], history: list[Rated], seed: int) -> None:
    """The judge, trained on."""
    if new:
        feed = ReplayFeed(new, history, rows=32, share=REPLAY, seed=seed)
        run(RewardLoss(judge), feed, JUDGE_RATE, steps=LESSONS, seed=seed, warmup=5)


def proxy(judge: Decoder, groups: list[list[Sample]]) -> float:
    """The judge's mean score."""
    rows = [sample.prompt + sample.tokens for group in groups for sample in group]
    return float(scores(judge, rows, at_once=256).mean())


def worth(groups: list[list[Sample]]) -> float:
    """The share that is right."""
    verdicts = [value for group in groups for value in Correct()(group)]
    return sum(verdicts) / len(verdicts)


def arm(*, gold: bool = False, trained_on: bool = False) -> Callable[[int], Measured]:
    """gold: the verifier rewards. trained_on: the judge learns in every phase; else it learns at once from as many
    questions, put to the first policy."""

    def measured(seed: int) -> Measured:
        policy = beginner(SCHOOL, seed)
        judge = ScoreHead(1, seed=seed)(copy.deepcopy(policy))
        exam = Exam(SCHOOL, SCHOOL.every)
        history: list[Rated] = []
        curve = [(0.0, exam.measure(policy.eval(), 0)["accuracy"])]
        reward = Correct() if gold else Scored(partial(scores, judge, at_once=256))
        first = 0.0
        for phase in range(PHASES):
            if not gold and (trained_on or phase == 0):
                groups = asked(policy, seed, phase, QUESTIONS if trained_on else QUESTIONS * PHASES)
                new = comparisons(groups, Correct(), seed + phase)
                taught(judge, new, history, seed + phase)
                history += new
            if phase == 0 and not gold:
                first = proxy(judge, asked(policy, seed, PHASES))
            plan = Plan(prompts=SCHOOL.prompts, group=SCHOOL.group, seed=seed * PHASES + phase)
            scoring = Scoring(judges=(Judge("reward", reward),))
            ask = partial(SCHOOL.question, seed * PHASES + phase)
            feed = Rollouts(policy, ask, SCHOOL.writer(), scoring, plan)
            rows = run(PolicyGradient(policy), feed, RATE, steps=STEPS, seed=seed + phase, warmup=5, probes=[exam])
            curve += [(phase * STEPS + r["step"], r["exam/accuracy"]) for r in rows if "exam/accuracy" in r]
        last = asked(policy, seed, PHASES)
        gained = {} if gold else {"proxy gained": proxy(judge, last) - first}
        greedy = {"greedy at the end": curve[-1][1], "best greedy": max(y for _, y in curve)}
        return Measured({"samples right at the end": worth(last), **greedy, **gained}, curve)

    return measured


ARMS = {"fixed": arm(), "iterative": arm(trained_on=True), "gold reward": arm(gold=True)}


def judge(results: Results) -> Verdict:
    """Over-optimised: the proxy rises while the gold falls. Samples are compared with samples, greedy answers with
    greedy ones."""
    ahead = results.difference("iterative", "fixed", "samples right at the end")
    proxy_up = results.span("fixed", "proxy gained")
    words = (
        f"under the fixed judge the proxy gains {proxy_up} while the gold of greedy answers goes from a best of "
        f"{results.span('fixed', 'best greedy')} to {results.span('fixed', 'greedy at the end')}, of samples to "
        f"{results.span('fixed', 'samples right at the end')}; trained on, samples end at "
        f"{results.span('iterative', 'samples right at the end')}: {ahead} more"
    )
    if ahead.negative:
        return Verdict("refuted", words)
    return Verdict("confirmed" if ahead.positive and proxy_up.positive else "no effect seen", words)


PAPER = Paper(
    name="overoptimization",
    title="Scaling Laws for Reward Model Overoptimization",
    arxiv="2210.10760",
    claim="A policy that is trained against a fixed reward model ends up better by the model's word and worse in "
    "truth; one that is trained on with the policy's newest samples does not (Gao et al. do not test that; it is "
    "DeepSeekMath's iterative GRPO, arXiv:2402.03300).",
    experiment="Words to reverse, so that the gold reward is known; the beginner of `quest reproduce reverse`. A "
    f"reward model learns from {QUESTIONS * PHASES} questions of {SCHOOL.group} samples labelled by the verifier: "
    f"all of them put to the beginner (fixed, the control), or {QUESTIONS} to the policy of each of {PHASES} phases, "
    f"a tenth of a batch replayed (iterative), {LESSONS} steps each time. Then GRPO on its scores, {PHASES} x "
    f"{STEPS} steps of {SCHOOL.rows} samples at {RATE:g}, without KL. Gold: the share that is right, of "
    "samples or of greedy answers.",
    confirms="the fixed judge's proxy gains and the iterative one's policy ends with more gold, both 95 % intervals "
    "above zero.",
    refutes="the iterative one's policy ends with less.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "gold: held-out greedy accuracy"),
    minutes=5,
)
