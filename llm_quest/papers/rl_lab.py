"""Shared parts of the reinforcement learning experiments: a task with a verifier, a small Llama that is fine-tuned on
demonstrations (the base policy), and then the same number of steps and rows for every arm.

All arms of an experiment start from the same weights. They are compared on problems of the test split: accuracy of
greedy answers, mean@8 and pass@8."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llm_quest.contracts import Evaluator, Loader, Reward
from llm_quest.data.batch import TokenBatch
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.problems import Problem, Task, TaskSplit, draw_problem
from llm_quest.data.problems.problem import make_rng
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.data.whole_documents import Demonstrations, collate_demonstrations
from llm_quest.eval.problems import ProblemAccuracy, evaluate_problems
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import POLICY_VARIANTS
from llm_quest.papers.lab import MetricsRecorder, cached_model, init_lab_model
from llm_quest.papers.paper import ExperimentResults, Measurement, Verdict
from llm_quest.rollouts.advantages import ADVANTAGE_ESTIMATORS, RewardPipeline, WeightedReward
from llm_quest.rollouts.rewards import (
    CorrectnessReward,
    FormatReward,
    RandomReward,
    compute_step_rewards,
    score_correctness,
)
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan
from llm_quest.rollouts.sampler import PolicyPrompt, Sampler
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw, make_lr_schedule

HEAD_DIM = 16


@dataclass(frozen=True, kw_only=True)
class RLExperiment:
    """Settings of an experiment. sft_steps, sft_learning_rate: of the base policy, 64 rows a step. num_demonstrations:
    how many there are, repeated in epochs; None: every demonstration is new. prompts, group: questions of a step and
    samples of each; every arm trains on as many rows in a step, or samples as many. steps: of every arm. every: steps
    between evaluations. eval_problems: problems of an evaluation; final_problems: of the one at the end."""

    name: str
    task: Task
    width: int = 128
    layers: int = 3
    sft_steps: int
    sft_learning_rate: float = 1e-3
    num_demonstrations: int | None = None
    prompts: int = 16
    group: int = 8
    new_tokens: int
    steps: int
    every: int = 20
    eval_problems: int = 200
    final_problems: int = 1000

    @property
    def tokenizer(self) -> Tokenizer:
        return character_tokenizer(self.task.alphabet)

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def config(self) -> llama.Config:
        heads, hidden = max(1, self.width // HEAD_DIM), self.width * 8 // 3 // 8 * 8
        vocab = self.tokenizer.vocab_size
        return llama.Config(
            vocab, self.width, self.layers, heads, heads, HEAD_DIM, hidden, 128, RotaryEmbedding(HEAD_DIM, 1e4), True
        )

    def make_sampler(self) -> Sampler:
        return Sampler(
            tokenizer=self.tokenizer, eos_token_ids=tuple(self.tokenizer.eos_token_ids), max_new_tokens=self.new_tokens
        )

    def demonstration_loader(self, seed: int, rows: int, *, more: bool = False) -> ShardedLoader[Demonstrations]:
        """The teacher's demonstrations. more: those after the base policy's, unless their number is limited."""
        first = seed + 1_000 if more and self.num_demonstrations is None else seed
        source = Demonstrations(self.task, self.tokenizer, num_examples=self.num_demonstrations)
        return ShardedLoader(source, batch_size=rows, micro_batch_size=rows, seed=first)

    def question(self, seed: int, index: int) -> PolicyPrompt:
        """Problem `index` of the training split as a prompt."""
        problem = TaskSplit(self.task)(seed, index)
        return PolicyPrompt(
            (self.tokenizer.start_token_id, *self.tokenizer.encode(problem.prompt, add_special_tokens=False)), problem
        )


def base_policy(experiment: RLExperiment, seed: int) -> Decoder:
    """The fine-tuned model that all arms of this seed start from."""
    settings = (
        experiment.task,
        experiment.sft_steps,
        experiment.sft_learning_rate,
        *([experiment.num_demonstrations] if experiment.num_demonstrations else []),
    )
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]

    def train_base_policy() -> Decoder:
        model = init_lab_model(experiment.config(), seed)
        train_for_steps(
            NextTokenLoss(model),
            experiment.demonstration_loader(seed, 64),
            experiment.sft_learning_rate,
            steps=experiment.sft_steps,
            seed=seed,
            warmup=50,
        )
        return model

    return cached_model(f"{experiment.name}-{digest}", seed, experiment.config(), train_base_policy)


def rl_arm(
    experiment: RLExperiment,
    *,
    rate: float,
    reward: Callable[[int], Reward] = lambda seed: CorrectnessReward(),
    variant: str = "grpo",
    minibatches: int = 1,
    process: bool = False,
) -> Callable[[int], Measurement]:
    """An arm of policy-gradient training. reward: a function of the seed. minibatches: optimizer steps for each
    rollout, each on its share of the rows. process: rewards for every step of an answer."""

    def run_arm(seed: int) -> Measurement:
        model, recipe = base_policy(experiment, seed), POLICY_VARIANTS[variant]
        scoring = RewardPipeline(
            rewards=(WeightedReward("reward", reward(seed)),),
            estimator=ADVANTAGE_ESTIMATORS[recipe.advantages],
            step_rewards=partial(compute_step_rewards, experiment.tokenizer) if process else None,
        )
        plan = RolloutPlan(
            prompts_per_rollout=experiment.prompts,
            num_generations=experiment.group,
            minibatches=minibatches,
            max_sampling_rounds=4 if variant == "dapo" else 1,
            seed=seed,
        )
        loader = RolloutLoader(model, partial(experiment.question, seed), experiment.make_sampler(), scoring, plan)
        horizon = experiment.new_tokens if recipe.count == "horizon" else None
        objective = PolicyGradientLoss(model, recipe.surrogate, count=recipe.count, horizon=horizon)
        return train_and_evaluate(experiment, objective, loader, rate, seed, inner=minibatches)

    return run_arm


def sft_arm(experiment: RLExperiment, *, rate: float) -> Callable[[int], Measurement]:
    """An arm of further fine-tuning on demonstrations: new ones, or the limited number again."""

    def run_arm(seed: int) -> Measurement:
        loader = experiment.demonstration_loader(seed, experiment.rows, more=True)
        return train_and_evaluate(experiment, NextTokenLoss(base_policy(experiment, seed)), loader, rate, seed)

    return run_arm


def rejection_sampling_arm(experiment: RLExperiment, *, rate: float) -> Callable[[int], Measurement]:
    """An arm of rejection fine-tuning (Yuan et al. 2023, arXiv:2308.01825): as many samples as reinforcement learning
    draws, all from the base policy; the correct ones are demonstrations."""

    def run_arm(seed: int) -> Measurement:
        return train_and_evaluate(
            experiment,
            NextTokenLoss(base_policy(experiment, seed)),
            RejectionSamplingLoader(experiment, seed),
            rate,
            seed,
        )

    return run_arm


@dataclass
class RejectionSamplingLoader:
    """Correct samples of the base policy as demonstrations."""

    experiment: RLExperiment
    seed: int

    def __post_init__(self) -> None:
        self.policy = base_policy(self.experiment, self.seed).eval()

    def batches(self, step: int) -> Sequence[TokenBatch]:
        first = step * self.experiment.prompts
        questions = [self.experiment.question(self.seed, first + place) for place in range(self.experiment.prompts)]
        drawn = make_rng("kept", self.seed, step).getrandbits(62)
        groups = self.experiment.make_sampler()(self.policy, questions, self.experiment.group, drawn)
        right = [
            (list(s.prompt_ids), list(s.completion_ids)) for group in groups for s in group if score_correctness(s) == 1
        ]
        return [collate_demonstrations(right)] if right else []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: batches are a function of the step."""


@dataclass
class HeldOutProblemsEvaluator:
    """Greedy accuracy on problems of the test split. `final_scores` uses more of them and also draws samples."""

    experiment: RLExperiment
    interval: int
    name: str = "eval"
    problems: list[Problem] = field(init=False)

    def __post_init__(self) -> None:
        task, number = self.experiment.task, self.experiment.final_problems
        self.problems = [draw_problem(task, "test", index) for index in range(number)]

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        return {"accuracy": self.accuracy(model, self.experiment.eval_problems, samples=0).greedy_accuracy.share}

    def accuracy(self, model: Decoder, problems: int, samples: int) -> ProblemAccuracy:
        return evaluate_problems(
            model, self.experiment.tokenizer, self.problems[:problems], num_samples=samples, ks=(1, 8),
            max_new_tokens=self.experiment.new_tokens,
        )  # fmt: skip

    def final_scores(self, model: Decoder) -> dict[str, float]:
        model.eval()
        greedy = self.accuracy(model, len(self.problems), samples=0).greedy_accuracy.share
        drawn = self.accuracy(model, self.experiment.eval_problems, samples=8)
        return {"greedy": greedy, "mean@8": drawn.mean_at_k, "pass@8": drawn.pass_at_k[8]}


def train_and_evaluate(
    experiment: RLExperiment, objective: Any, loader: Loader, rate: float, seed: int, inner: int = 1
) -> Measurement:
    """Trains and evaluates one arm. inner: optimizer steps in a step of the curve."""
    evaluator = HeldOutProblemsEvaluator(experiment, experiment.every * inner)
    before = evaluator.evaluate(objective.model.eval(), 0)["accuracy"]
    rows = train_for_steps(
        objective, loader, rate, steps=experiment.steps * inner, seed=seed, warmup=10 * inner, evaluators=[evaluator]
    )
    curve = [(row["step"] / inner, row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
    return Measurement(evaluator.final_scores(objective.model), [(0.0, before), *curve])


def untrained_arm(experiment: RLExperiment) -> Callable[[int], Measurement]:
    """An arm without training: the base policy."""

    def run_arm(seed: int) -> Measurement:
        return Measurement(HeldOutProblemsEvaluator(experiment, 0).final_scores(base_policy(experiment, seed)))

    return run_arm


def standard_arms(experiment: RLExperiment, rate: float) -> dict[str, Callable[[int], Measurement]]:
    """GRPO and its controls, all with the same learning rate and the same number of steps and rows."""
    return {
        "base policy": untrained_arm(experiment),
        "GRPO": rl_arm(experiment, rate=rate),
        "more SFT": sft_arm(experiment, rate=rate),
        "rejection fine-tuning": rejection_sampling_arm(experiment, rate=rate),
        "random reward": rl_arm(experiment, rate=rate, reward=RandomReward),
        "format-only reward": rl_arm(experiment, rate=rate, reward=lambda seed: FormatReward()),
    }


def margin_verdict(results: ExperimentResults, number: str, points: float) -> Verdict:
    """Confirmed if GRPO exceeds more fine-tuning by `points`, the whole interval above zero, and exceeds rewards
    without information. Refuted if it is below more fine-tuning."""
    gain = results.difference("GRPO", "more SFT", number)
    gaps = {arm: results.difference("GRPO", arm, number) for arm in results.arms if arm not in ("GRPO", "base policy")}
    words = f"GRPO's {number} differs from that of " + ", ".join(f"{arm} by {gap}" for arm, gap in gaps.items())
    if gain.negative or not (gaps["random reward"].positive and gaps["format-only reward"].positive):
        return Verdict("refuted" if gain.negative else "no effect seen", words)
    return Verdict("confirmed" if gain.positive and gain.mean >= points else "no effect seen", words)


def train_for_steps(
    objective: Any,
    loader: Loader,
    rate: float,
    *,
    steps: int,
    seed: int,
    warmup: int = 0,
    evaluators: Sequence[Evaluator] = (),
) -> list[Mapping[str, Any]]:
    """Trains with AdamW without weight decay, the learning rate decaying to a tenth; returns the rows of metrics."""
    recorder = MetricsRecorder()
    optimizer = make_adamw(objective.model, lr=rate, weight_decay=0.0)
    schedule = make_lr_schedule(steps, warmup_steps=min(warmup, steps), shape="cosine", min_lr_ratio=0.1)
    settings = TrainingArguments(steps=steps, log_every=max(1, steps // 20), seed=seed)
    train(objective, loader, optimizer, schedule, settings, evaluators=evaluators, logger=recorder)
    return recorder.metrics
