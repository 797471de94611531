"""`quest train grpo`: a model, problems that can be checked -> a model that solves more of them.

      questions -> samples -> rewards -> advantages -> policy gradient, with held-out accuracy before, during and after

`recipes/policy_setup.py` assembles the rollouts; here are the task and the rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llm_quest.contracts import Reward
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.problems import Problem, TaskSplit, draw_problem, parse_task
from llm_quest.data.problems.problem import make_rng
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import UsageError
from llm_quest.eval.evaluators import ProblemEvaluator, RatioRangeEvaluator
from llm_quest.hub.gsm8k import is_gsm8k, train_validation_split
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.reward_model import score_rows
from llm_quest.recipes.config import Choice, StrictModel
from llm_quest.recipes.config_schema import ModelConfig, NonNegativeInt, PositiveInt
from llm_quest.recipes.finetuning import StartModelConfig, load_for_finetuning
from llm_quest.recipes.model_config import WARMUP_CONTEXT, init_model
from llm_quest.recipes.policy import PolicyConfig
from llm_quest.recipes.policy_setup import (
    WarmupConfig,
    build_policy_setup,
    open_policy_run,
    require_demonstrations_fit,
    run_sft_warmup,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.rollouts.advantages import WeightedReward
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.rollouts.model_reward import ModelReward
from llm_quest.rollouts.rewards import CorrectnessReward, FormatReward, RandomReward, compute_step_rewards
from llm_quest.rollouts.sampler import PolicyPrompt
from llm_quest.rollouts.verifier_process import MathVerifyReward
from llm_quest.techniques.score_head import find_score_head
from llm_quest.train.arguments import TrainResult
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state import derive_seed

EncodeFn = Callable[[str], list[int]]


def load_reward_model(
    config: GrpoConfig, spec: RewardSpec, tokenizer: Tokenizer, parallel: DistributedContext
) -> Reward:
    """A reward model that reads the policy's ids."""
    name_or_path = str(spec.load)
    model = load(name_or_path, dtype="float32", aligned=True).to(parallel.device)
    if find_score_head(model) is None:
        raise UsageError(f"{name_or_path} is no reward model; train one (quest train reward)")
    if load_tokenizer(name_or_path).hash != tokenizer.hash:
        raise UsageError(
            f"{name_or_path} has another tokenizer than the policy: it would read other ids than were sampled"
        )
    return ModelReward(partial(score_rows, model))


RewardBuilder = Callable[["GrpoConfig", "RewardSpec", Tokenizer, DistributedContext], Reward]
REWARDS: dict[str, RewardBuilder] = {
    "correct": lambda config, spec, tokenizer, parallel: CorrectnessReward(),
    "format": lambda config, spec, tokenizer, parallel: FormatReward(),
    "random": lambda config, spec, tokenizer, parallel: RandomReward(derive_seed(config.seed, "random reward")),
    "model": load_reward_model,
    "math_verify": lambda config, spec, tokenizer, parallel: MathVerifyReward(),
}
"""Name -> how a reward of that name is made."""


class RewardSpec(StrictModel):
    """A reward and its weight."""

    name: Annotated[str, Choice(REWARDS)]
    weight: float = 1.0
    load: str | None = Field(default=None, description="the reward model's folder or run, for `model`")

    @model_validator(mode="after")
    def check_reward_model_path(self) -> RewardSpec:
        if (self.name == "model") != (self.load is not None):
            raise ValueError(
                "a reward model needs its folder: {name: model, load: FOLDER}"
                if self.name == "model"
                else f"load has no effect for the reward {self.name}; leave it out"
            )
        return self


class GrpoConfig(PolicyConfig):
    """A model and problems that can be checked in, a model that solves more of them out."""

    recipe: Literal["grpo"]
    task: str = Field(
        default="reverse", min_length=1, description="a task, options after a colon; or gsm8k, or its .jsonl"
    )
    apply_chat_template: bool = Field(default=False, description="ask through the model's chat template")
    model: ModelConfig
    warmup: WarmupConfig | None = Field(default=None, description="for a fresh model: demonstrations first")
    rewards: tuple[RewardSpec, ...] = Field(
        default=(RewardSpec(name="correct"),), min_length=1, description="the first one says what is right"
    )
    normalize_rewards_separately: bool = Field(
        default=False, description="each reward made an advantage by itself (GDPO)"
    )
    process_supervision: bool = Field(default=False, description="reward every step of the answer (chained)")
    eval_steps: NonNegativeInt = Field(default=20, description="steps between evaluations; 0: only at the end")
    eval_problems: PositiveInt = Field(default=200, description="held-out problems, answered greedily")
    eval_num_samples: NonNegativeInt = Field(default=0, description="samples of each, for mean@k and pass@k")

    @property
    def by_steps(self) -> bool:
        return self.process_supervision

    @field_validator("task")
    @classmethod
    def known_task(cls, task: str) -> str:
        if not is_gsm8k(task):
            parse_task(task)
        return task

    @model_validator(mode="after")
    def check_combination(self) -> GrpoConfig:
        fresh = self.model.load is None
        if fresh and is_gsm8k(self.task):
            raise ValueError("a fresh model cannot be warmed up on GSM8K; give model.load=FOLDER")
        if fresh and self.warmup is None:
            raise ValueError(
                "a fresh model solves nothing that a reward could tell apart; give warmup={max_steps: 400}"
            )
        if not fresh and self.warmup is not None:
            raise ValueError("warmup has no effect on a model that is loaded; leave it out (warmup=null)")
        if self.process_supervision and self.loss_type == "gspo":
            raise ValueError("process supervision gives each token its own advantage: take loss_type=gspo_token")
        if self.normalize_rewards_separately and len(self.rewards) < 2:
            raise ValueError("normalize_rewards_separately has no effect with one reward; leave it out")
        if self.process_supervision and (
            self.normalize_rewards_separately or self.overlong_buffer_tokens or self.advantage_estimator
        ):
            raise ValueError(
                "normalize_rewards_separately, overlong_buffer_tokens and advantage_estimator have no effect under "
                "process_supervision; leave them out"
            )
        return self


def build_grpo(config: GrpoConfig, context: Context) -> Job:
    """Model, problems, rollouts, objective."""
    parallel, log = context.parallel, context.log
    config = open_policy_run(config, context)
    problems = load_problems(config)
    model, tokenizer = init_policy(config, context)
    model.to(parallel.device)
    encode = prompt_encoder(config, tokenizer)
    rewards = [
        WeightedReward(one.name, REWARDS[one.name](config, one, tokenizer, parallel), one.weight)
        for one in config.rewards
    ]
    policy = build_policy_setup(
        config, model, tokenizer, partial(make_prompt, problems, encode), rewards, parallel, log,
        normalize_rewards_separately=config.normalize_rewards_separately,
        steps=partial(compute_step_rewards, tokenizer) if config.process_supervision else None,
    )  # fmt: skip
    evaluator = ProblemEvaluator(
        problems.held_out, tokenizer, encode, config.eval_steps, config.max_new_tokens, config.eval_num_samples,
        config.temperature, derive_seed(config.seed, "evaluation"), context.samples_dir, policy.whole_policy,
    )  # fmt: skip

    def report_before() -> Mapping[str, float]:
        found = evaluator.accuracy(model)
        log(f"held out, before: accuracy {found.greedy_accuracy}")
        return {"eval/accuracy": found.greedy_accuracy.share}

    def report_after(result: TrainResult) -> None:
        if result.status == "finished":
            log(f"held out, after:  accuracy {evaluator.accuracy(model.eval()).greedy_accuracy}")

    return Job(
        config,
        policy.objective,
        policy.rollouts,
        [evaluator, RatioRangeEvaluator(policy.objective, config.logging_steps, parallel.all_gather)],
        {"tokenizer": tokenizer.hash, "task": problems.identity},
        {"task": config.task, "held_out_problems": len(problems.held_out), "tokenizer_sha256": tokenizer.hash},
        tokenizer,
        callbacks=policy.callbacks,
        watchers=[Diagnostics(config.early_stopping_patience)],
        before=report_before,
        finish=report_after,
    )


@dataclass(frozen=True)
class ProblemSet:
    """An endless list of training problems, and the held-out ones."""

    train_problem: Callable[[int], Problem]
    held_out: list[Problem]
    identity: str


def load_problems(config: GrpoConfig) -> ProblemSet:
    """A task's own splits, or GSM8K's: its training part in a new order every epoch, a part of it held out."""
    seed, number = derive_seed(config.seed, "order"), config.eval_problems
    if not is_gsm8k(config.task):
        task = parse_task(config.task)
        return ProblemSet(
            partial(TaskSplit(task), seed),
            [draw_problem(task, "validation", i, seed) for i in range(number)],
            repr(task),
        )
    learned, held = train_validation_split(config.task)
    return ProblemSet(partial(shuffled_problem, learned, seed), held[:number], f"{config.task}: {len(learned)}")


def shuffled_problem(problems: Sequence[Problem], seed: int, index: int) -> Problem:
    """Every problem once per epoch, in an order of its own."""
    epoch, place = divmod(index, len(problems))
    order = list(range(len(problems)))
    make_rng("order", seed, epoch).shuffle(order)
    return problems[order[place]]


def init_policy(config: GrpoConfig, context: Context) -> tuple[Decoder, Tokenizer]:
    """The model that is loaded, or a fresh one that has been warmed up (for a plan it has not)."""
    if config.model.load is not None:
        return load_for_finetuning(StartModelConfig(load=config.model.load))
    assert config.warmup is not None
    task = parse_task(config.task)
    tokenizer = character_tokenizer(task.alphabet)
    require_demonstrations_fit(config.warmup, task, tokenizer, config.max_new_tokens, context.log)
    model = init_model(config.model, context.settings, tokenizer, context=WARMUP_CONTEXT, seed=config.seed)
    if not context.planning:
        run_sft_warmup(
            config, config.warmup, model, tokenizer, task, config.max_new_tokens, context.run_dir / "warmup",
            context.parallel, context.log,
        )  # fmt: skip
    return model, tokenizer


def prompt_encoder(config: GrpoConfig, tokenizer: Tokenizer) -> EncodeFn:
    """From a problem's prompt to ids: as plain text after the start token, or through the chat template."""
    if not config.apply_chat_template:
        return lambda text: [tokenizer.start_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    chat = ChatTemplate(tokenizer)
    return lambda text: chat.encode_prompt([{"role": "user", "content": text}])


def make_prompt(problems: ProblemSet, encode: EncodeFn, index: int) -> PolicyPrompt:
    """The prompt of training problem number `index`."""
    problem = problems.train_problem(index)
    return PolicyPrompt(tuple(encode(problem.prompt)), problem)


RECIPE = Recipe("grpo", GrpoConfig, build_grpo)
