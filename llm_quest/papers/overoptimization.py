"""Overoptimization of a reward model (Gao et al. 2022, arXiv:2210.10760) and DeepSeekMath's remedy: a reward model that
is trained further on samples of the current policy (arXiv:2402.03300, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from llm_quest.data.preferences import TokenizedPreference
from llm_quest.layers.initialize import copy_module
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.reward_model import RewardModelLoss, score_rows
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict
from llm_quest.papers.reverse import EXPERIMENT as REVERSE
from llm_quest.papers.rl_lab import HeldOutProblemsEvaluator, base_policy, train_for_steps
from llm_quest.rollouts.advantages import RewardPipeline, WeightedReward
from llm_quest.rollouts.model_reward import ModelReward, ReplayLoader, make_comparisons
from llm_quest.rollouts.rewards import CorrectnessReward
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan
from llm_quest.rollouts.sampler import Sample
from llm_quest.techniques.score_head import ScoreHead

PHASES, STEPS = 4, 25
EXPERIMENT = replace(REVERSE, name="overoptimization", steps=PHASES * STEPS, every=5)
QUESTIONS, REWARD_MODEL_STEPS, REWARD_MODEL_RATE, REPLAY = 64, 60, 1e-3, 0.1
LEARNING_RATE = 5e-4
QUESTION_OFFSET = 1_000_000
"""Index of the first question for comparisons and for scoring; no rollout reaches it."""


def sample_groups(model: Decoder, seed: int, phase: int, number: int = QUESTIONS) -> list[list[Sample]]:
    """Samples of the current policy, a group for each question."""
    first = QUESTION_OFFSET * (phase + 1)
    questions = [EXPERIMENT.question(seed, first + index) for index in range(number)]
    return EXPERIMENT.make_sampler()(model, questions, EXPERIMENT.group, seed + phase)


def update_reward_model(
    reward_model: Decoder, new: list[TokenizedPreference], history: list[TokenizedPreference], seed: int
) -> None:
    """Trains the reward model further on new comparisons, with a share of old ones."""
    if new:
        loader = ReplayLoader(new, history, batch_size=32, replay_fraction=REPLAY, seed=seed)
        train_for_steps(
            RewardModelLoss(reward_model), loader, REWARD_MODEL_RATE, steps=REWARD_MODEL_STEPS, seed=seed, warmup=5
        )


def proxy_score(reward_model: Decoder, groups: list[list[Sample]]) -> float:
    """Mean score of the reward model."""
    rows = [sample.prompt_ids + sample.completion_ids for group in groups for sample in group]
    return float(score_rows(reward_model, rows, micro_batch_size=256).mean())


def gold_score(groups: list[list[Sample]]) -> float:
    """The share of correct samples."""
    verdicts = [value for group in groups for value in CorrectnessReward()(group)]
    return sum(verdicts) / len(verdicts)


def make_arm(*, gold_reward: bool = False, iterative: bool = False) -> Callable[[int], Measurement]:
    """An arm. gold_reward: the verifier gives the rewards. iterative: the reward model is trained in every phase;
    otherwise once, on as many questions answered by the base policy."""

    def run_arm(seed: int) -> Measurement:
        policy = base_policy(EXPERIMENT, seed)
        reward_model = ScoreHead(1, seed=seed)(copy_module(policy))
        evaluator = HeldOutProblemsEvaluator(EXPERIMENT, EXPERIMENT.every)
        history: list[TokenizedPreference] = []
        curve = [(0.0, evaluator.evaluate(policy.eval(), 0)["accuracy"])]
        reward = (
            CorrectnessReward() if gold_reward else ModelReward(partial(score_rows, reward_model, micro_batch_size=256))
        )
        first = 0.0
        for phase in range(PHASES):
            if not gold_reward and (iterative or phase == 0):
                groups = sample_groups(policy, seed, phase, QUESTIONS if iterative else QUESTIONS * PHASES)
                new = make_comparisons(groups, CorrectnessReward(), seed + phase)
                update_reward_model(reward_model, new, history, seed + phase)
                history += new
            if phase == 0 and not gold_reward:
                first = proxy_score(reward_model, sample_groups(policy, seed, PHASES))
            plan = RolloutPlan(
                prompts_per_rollout=EXPERIMENT.prompts, num_generations=EXPERIMENT.group, seed=seed * PHASES + phase
            )
            scoring = RewardPipeline(rewards=(WeightedReward("reward", reward),))
            ask = partial(EXPERIMENT.question, seed * PHASES + phase)
            loader = RolloutLoader(policy, ask, EXPERIMENT.make_sampler(), scoring, plan)
            rows = train_for_steps(
                PolicyGradientLoss(policy),
                loader,
                LEARNING_RATE,
                steps=STEPS,
                seed=seed + phase,
                warmup=5,
                evaluators=[evaluator],
            )
            curve += [(phase * STEPS + r["step"], r["eval/accuracy"]) for r in rows if "eval/accuracy" in r]
        last = sample_groups(policy, seed, PHASES)
        gained = {} if gold_reward else {"proxy gained": proxy_score(reward_model, last) - first}
        greedy = {"greedy at the end": curve[-1][1], "best greedy": max(y for _, y in curve)}
        return Measurement({"samples right at the end": gold_score(last), **greedy, **gained}, curve)

    return run_arm


ARMS = {"fixed": make_arm(), "iterative": make_arm(iterative=True), "gold reward": make_arm(gold_reward=True)}


def verdict(results: ExperimentResults) -> Verdict:
    """Overoptimization: the proxy rises while the gold reward falls. Samples are compared with samples and greedy
    answers with greedy answers."""
    ahead = results.difference("iterative", "fixed", "samples right at the end")
    proxy_up = results.interval("fixed", "proxy gained")
    words = (
        f"with the fixed reward model the proxy gains {proxy_up} while the gold reward of greedy answers goes from a "
        f"best of {results.interval('fixed', 'best greedy')} to {results.interval('fixed', 'greedy at the end')}, of "
        f"samples to {results.interval('fixed', 'samples right at the end')}; with the iterative one, samples end at "
        f"{results.interval('iterative', 'samples right at the end')}: {ahead} more"
    )
    if ahead.negative:
        return Verdict("refuted", words)
    return Verdict("confirmed" if ahead.positive and proxy_up.positive else "no effect seen", words)


PAPER = Paper(
    name="overoptimization",
    title="Scaling Laws for Reward Model Overoptimization",
    arxiv="2210.10760",
    claim="A policy trained against a fixed reward model ends with a higher proxy reward and a lower gold reward; "
    "with a reward model that is trained further on the policy's newest samples it does not (Gao et al. do not test "
    "that; it is DeepSeekMath's iterative GRPO, arXiv:2402.03300).",
    experiment="Words to reverse, so that the gold reward is known; the base policy of `quest reproduce reverse`. The "
    f"reward model is trained on {QUESTIONS * PHASES} questions of {EXPERIMENT.group} samples labelled by the "
    f"verifier: all of them answered by the base policy (fixed, the control), or {QUESTIONS} by the policy of each of "
    f"{PHASES} phases with a tenth of a batch replayed (iterative), {REWARD_MODEL_STEPS} steps each time. Then GRPO "
    f"on its scores, {PHASES} x {STEPS} steps of {EXPERIMENT.rows} samples at {LEARNING_RATE:g}, without KL. Gold "
    "reward: the share of samples or of greedy answers that is correct.",
    confirms="the proxy of the fixed reward model rises and the policy of the iterative one ends with more gold "
    "reward, both 95 % intervals above zero.",
    refutes="the policy of the iterative one ends with less.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "gold reward: held-out greedy accuracy"),
    minutes=5,
)
