"""The rewards of a recipe: the entries of `rewards:`, and the reward function of each.

      rewards: [{name: correct}, {name: model, load: FOLDER, weight: 0.5}]         one of REWARDS
      rewards: [{function: my_rewards.py:score}]                                   a function of a Python file
      rewards: [{judge: http://localhost:8000/v1, model: NAME, prompt: FILE}]      a language model behind a URL

Each has a `weight`, and its own metric under its name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from llm_quest.contracts import LogFn, Reward
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.objectives.readouts import READOUTS, ROW_READOUTS, find_readout, step_ends, token_scores
from llm_quest.objectives.reward_model import score_rows
from llm_quest.recipes.config_schema import NonNegativeInt, PositiveFloat, PositiveInt
from llm_quest.recipes.schema import Choice, LocalPath, StrictModel
from llm_quest.rollouts.advantages import StepRewards, WeightedReward
from llm_quest.rollouts.function_reward import FailureSummary, FunctionReward
from llm_quest.rollouts.judge_reward import JudgeReward, read_judge_prompt
from llm_quest.rollouts.model_reward import ModelReward
from llm_quest.rollouts.rewards import CorrectnessReward, EnvironmentReward, FormatReward, RandomReward
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.user_code import check_reference, hash_user_code, split_reference
from llm_quest.rollouts.verifier_process import MathVerifyReward
from llm_quest.techniques.score_head import find_score_head
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed


@dataclass(frozen=True)
class RewardContext:
    """The arguments of rewards besides their entries."""

    seed: int
    tokenizer: Tokenizer
    parallel: DistributedContext
    log: LogFn


def make_model_reward(spec: RewardSpec, context: RewardContext) -> Reward:
    """Load a reward model that reads the policy's ids, by its own read-out or another one."""
    model = load_scoring_model(str(spec.load), context.tokenizer, context.parallel)
    own = find_readout(model)
    chosen = spec.readout or own
    if chosen in READOUTS_OF_STEPS and not find_step_token_ids(model):
        raise UsageError(
            f"rewards: readout {chosen} reads the steps of a process reward model, and {spec.load} is none; train one "
            "(quest train prm), or leave readout out"
        )
    if chosen == own and own in ROW_READOUTS:
        return ModelReward(partial(score_rows, model))
    return ReadoutReward(model, chosen)


def load_scoring_model(name_or_path: str, tokenizer: Tokenizer, parallel: DistributedContext) -> Any:
    """Load a model with a score head and the policy's tokenizer, in float32. UsageError for any other."""
    model = load(name_or_path, dtype="float32", aligned=True).to(parallel.device)
    if find_score_head(model) is None:
        raise UsageError(f"{name_or_path} is no reward model; train one (quest train reward)")
    if load_tokenizer(name_or_path).hash != tokenizer.hash:
        raise UsageError(
            f"{name_or_path} has another tokenizer than the policy: it would read other ids than were sampled"
        )
    return model


def load_process_reward_model(name_or_path: str, tokenizer: Tokenizer, parallel: DistributedContext) -> StepRewards:
    """Load a process reward model as the rewards of a sample's steps."""
    model = load_scoring_model(name_or_path, tokenizer, parallel)
    if not find_step_token_ids(model):
        raise UsageError(f"{name_or_path} is no process reward model; train one (quest train prm)")
    return ModelStepRewards(model)


def find_step_token_ids(model: Any) -> tuple[int, ...]:
    head = find_score_head(model)
    return () if head is None else head.step_token_ids


def start_function_reward(spec: RewardSpec, context: RewardContext) -> Reward:
    """Start a user's function in its process; UsageError if its file cannot be run."""
    reward = FunctionReward(str(spec.function), timeout_seconds=spec.timeout_seconds, log=context.log)
    try:
        reward.worker.start()
    except UsageError as error:
        raise UsageError(f"rewards: {spec.function} cannot be loaded: {error}") from None
    return reward


READOUTS_OF_STEPS = tuple(name for name in READOUTS if name not in ROW_READOUTS)


def make_judge_reward(spec: RewardSpec, context: RewardContext) -> Reward:
    """Make the reward of a language model behind a URL. Its key is in the environment variable OPENAI_API_KEY."""
    return JudgeReward(
        str(spec.judge), str(spec.model), read_judge_prompt(str(spec.prompt)), low=spec.score_range[0],
        high=spec.score_range[1], timeout_seconds=spec.timeout_seconds, max_retries=spec.max_retries,
        max_tokens=spec.max_tokens, concurrency=spec.concurrency, api_key=os.environ.get("OPENAI_API_KEY", ""),
        log=context.log,
    )  # fmt: skip


RewardBuilder = Callable[["RewardSpec", RewardContext], Reward]
REWARDS: dict[str, RewardBuilder] = {
    "correct": lambda spec, context: CorrectnessReward(),
    "format": lambda spec, context: FormatReward(),
    "environment": lambda spec, context: EnvironmentReward(),
    "random": lambda spec, context: RandomReward(derive_seed(context.seed, "random reward")),
    "model": make_model_reward,
    "math_verify": lambda spec, context: MathVerifyReward(),
}
"""Name -> the function that builds the reward."""

NEED_ANSWERS = ("correct", "format", "math_verify")
"""Rewards that compare with the answer of a problem."""


class RewardKind(NamedTuple):
    """A form of entry. build: makes its reward; keys: allowed besides its own key and weight; per_batch: see
    `WeightedReward`."""

    build: RewardBuilder
    keys: tuple[str, ...]
    per_batch: bool = False


REWARD_KINDS = {
    "name": RewardKind(lambda spec, context: REWARDS[str(spec.name)](spec, context), ("load", "readout")),
    "function": RewardKind(start_function_reward, ("timeout_seconds",), per_batch=True),
    "judge": RewardKind(
        make_judge_reward,
        ("model", "prompt", "score_range", "timeout_seconds", "max_retries", "max_tokens", "concurrency"),
        per_batch=True,
    ),
}
"""The key that an entry begins with -> its form."""


class RewardSpec(StrictModel):
    """A reward and its weight: exactly one of name, function and judge."""

    name: Annotated[str, Choice(REWARDS)] | None = Field(default=None, description="which reward")
    function: str | None = Field(default=None, description="FILE.py:NAME, called as TRL calls its reward functions")
    judge: str | None = Field(default=None, pattern=r"^https?://", description="a URL like http://localhost:8000/v1")
    weight: float = Field(default=1.0, description="factor of this reward in the sum")
    load: LocalPath | None = Field(default=None, description="the reward model's folder or run, for the name model")
    readout: Annotated[str, Choice(READOUTS)] | None = Field(
        default=None, description="which of its scores, for the name model; null: as it was trained"
    )
    model: str | None = Field(default=None, description="the name under which a judge's URL serves it")
    prompt: str | None = Field(default=None, description="a judge's prompt: a file with {prompt} and {completion}")
    score_range: tuple[float, float] = Field(default=(0.0, 10.0), description="a judge's scores: lowest, highest")
    timeout_seconds: PositiveFloat = Field(default=60.0, description="of a batch for function, of a request for judge")
    max_retries: NonNegativeInt = Field(default=3, description="of a judge's request")
    max_tokens: PositiveInt = Field(default=512, description="of a judge's reply, its reasoning included")
    concurrency: PositiveInt = Field(default=8, description="requests to a judge at once")

    @field_validator("function")
    @classmethod
    def check_function(cls, function: str | None) -> str | None:
        return None if function is None else check_reference(function)

    @field_validator("prompt")
    @classmethod
    def check_prompt(cls, prompt: str | None) -> str | None:
        if prompt is None:
            return None
        read_judge_prompt(prompt)
        return str(Path(prompt).resolve())

    @model_validator(mode="after")
    def check_judge(self) -> RewardSpec:
        if self.judge is not None and (self.model is None or self.prompt is None):
            raise ValueError(
                "a judge needs the name of its model and its prompt: {judge: URL, model: NAME, prompt: FILE}"
            )
        if not self.score_range[0] < self.score_range[1]:
            raise ValueError("score_range: the first number must be the smaller one")
        return self

    @model_validator(mode="after")
    def check_kind(self) -> RewardSpec:
        given = [key for key in REWARD_KINDS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(REWARD_KINDS)} ({' and '.join(given) or 'none'} given)")
        for key, field in type(self).model_fields.items():
            unused = key not in (*REWARD_KINDS, "weight", *REWARD_KINDS[given[0]].keys)
            if unused and getattr(self, key) != field.default:
                raise ValueError(f"{key} has no effect for a reward of a {given[0]}; leave it out")
        if self.readout is not None and self.name != "model":
            raise ValueError(f"readout has no effect for the reward {self.label}; leave it out")
        if (self.name == "model") != (self.load is not None):
            raise ValueError(
                "a reward model needs its folder: {name: model, load: FOLDER}"
                if self.name == "model"
                else f"load has no effect for the reward {self.label}; leave it out"
            )
        return self

    @property
    def kind(self) -> str:
        return next(key for key in REWARD_KINDS if getattr(self, key) is not None)

    @property
    def label(self) -> str:
        """The name of its metric."""
        return self.name or (split_reference(self.function)[1] if self.function else self.kind)


def reward_labels(specs: Sequence[RewardSpec]) -> list[str]:
    """The name of each reward's metric; a second one of a name is NAME_2."""
    labels = [spec.label for spec in specs]
    earlier = [labels[:n].count(label) for n, label in enumerate(labels)]
    return [f"{label}_{number + 1}" if number else label for label, number in zip(labels, earlier, strict=True)]


def check_labels(specs: Sequence[RewardSpec]) -> None:
    """Raise ValueError for a reward that is given twice, and for two whose metrics would have one name."""
    labels, kinds = reward_labels(specs), [spec.model_copy(update={"weight": 1.0}) for spec in specs]
    for n, spec in enumerate(specs):
        if kinds[n] in kinds[:n] or labels[n] in labels[:n]:
            raise ValueError(f"two rewards are called {spec.label}, and their metrics would have one name")


def build_rewards(specs: Sequence[RewardSpec], context: RewardContext) -> list[WeightedReward]:
    """Build the rewards, in order."""
    return [
        WeightedReward(label, kind.build(spec, context), spec.weight, kind.per_batch)
        for label, spec in zip(reward_labels(specs), specs, strict=True)
        for kind in (REWARD_KINDS[spec.kind],)
    ]


def reward_file_hashes(specs: Sequence[RewardSpec]) -> dict[str, str]:
    """Name -> hash of each file that decides a reward, code or a judge's prompt: what a resumed run may not change."""
    hashes = {}
    for label, spec in zip(reward_labels(specs), specs, strict=True):
        if spec.function is not None:
            hashes[f"reward {label}"] = hash_user_code(spec.function)
        if spec.prompt is not None:
            hashes[f"reward {label}"] = hashlib.sha256(Path(spec.prompt).read_bytes()).hexdigest()
    return hashes


def reward_failures(rewards: Sequence[WeightedReward]) -> list[str]:
    """A line for each reward that failed on some samples."""
    counted = [
        (reward.name, reward.reward_fn.summary()) for reward in rewards if isinstance(reward.reward_fn, FailureSummary)
    ]
    return [f"the reward {name} failed, {summary}" for name, summary in counted if summary]


@dataclass(frozen=True)
class ReadoutReward:
    """Scores completions with any read-out of a reward model's or a process reward model's scores."""

    model: Any
    readout: str

    def __call__(self, group: Sequence[Sample]) -> list[float]:
        scored = zip(group, completion_scores(self.model, group), strict=True)
        return [float(READOUTS[self.readout](scores, completion_step_ends(self.model, s))) for s, scores in scored]


@dataclass(frozen=True)
class ModelStepRewards:
    """Rewards of steps by a process reward model: for each step of a sample (index of its last token, sigma(score))."""

    model: Any

    def __call__(self, sample: Sample) -> list[tuple[int, float]]:
        (scores,) = completion_scores(self.model, [sample])
        return [(end, float(torch.sigmoid(scores[end]))) for end in completion_step_ends(self.model, sample)]


@torch.no_grad()
def completion_scores(model: Any, samples: Sequence[Sample]) -> list[Tensor]:
    """The scores of every token of each completion, read behind its prompt."""
    scores_of_tokens = token_scores(model, [sample.prompt_ids + sample.completion_ids for sample in samples])
    return [scores[len(sample.prompt_ids) :].cpu() for sample, scores in zip(samples, scores_of_tokens, strict=True)]


def completion_step_ends(model: Any, sample: Sample) -> list[int]:
    """The index of each step's last token in the completion."""
    head = find_score_head(model)
    return step_ends(sample.completion_ids, 0, head.step_token_ids if head is not None else ())
