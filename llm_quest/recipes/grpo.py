"""`quest train grpo`: a model, prompts and rewards -> a model whose answers earn more of them.

      prompts -> samples -> rewards -> advantages -> policy gradient, with held-out reward and accuracy before, during
                                                     and after

Prompts are a task's problems or rows of a file (`recipes/policy_prompts.py`); rewards are in `recipes/reward_specs.py`;
`recipes/policy_setup.py` assembles the rollouts.

Commonly got wrong: with an adapter the reference is the model with its adapters off, in the same memory; a run that is
resumed in the middle of a rollout must not sample it again with other weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llm_quest.contracts import LogFn
from llm_quest.data.conversation_forms import ANSWER_KEYS
from llm_quest.data.problems import parse_task
from llm_quest.data.problems.answer_forms import ANSWER_FORMS, GRADINGS
from llm_quest.data.template_program import find_reserved_argument
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.errors import DataError
from llm_quest.eval.evaluators import RatioRangeEvaluator
from llm_quest.eval.policy import PolicyEvaluator
from llm_quest.hub.gsm8k import is_gsm8k
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.assembly import count_epochs, source_name
from llm_quest.recipes.chat_template_config import ChatTemplateConfig, fix_template_date
from llm_quest.recipes.config_schema import ModelConfig, NonNegativeInt, PositiveInt
from llm_quest.recipes.environment_setup import (
    EnvironmentProblems,
    EpisodeConfig,
    environment_failures,
    environment_hashes,
    episode_sampler_wrapper,
    game_problems,
    start_environment,
)
from llm_quest.recipes.finetuning import StartModelConfig, load_for_finetuning
from llm_quest.recipes.held_out_reward import HeldOutLog, RefinementConfig, draw_held_out, make_refinement
from llm_quest.recipes.model_config import WARMUP_CONTEXT, init_model
from llm_quest.recipes.policy_prompts import (
    ProblemSet,
    PromptDataConfig,
    PromptEncoder,
    drop_long_prompts,
    log_tools,
    make_prompt,
    make_prompt_encoder,
    problems_of_rows,
    problems_of_task,
)
from llm_quest.recipes.policy_setup import PolicySetup, build_policy_setup, open_policy_run
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.reward_specs import (
    NEED_ANSWERS,
    RewardContext,
    RewardSpec,
    build_rewards,
    check_labels,
    load_process_reward_model,
    reward_failures,
    reward_file_hashes,
)
from llm_quest.recipes.schema import Choice, LocalPath
from llm_quest.recipes.sft_warmup import WarmupConfig, require_demonstrations_fit, run_sft_warmup
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.rollouts.advantages import StepRewards
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.rollouts.environments import EnvironmentClient
from llm_quest.rollouts.included_environments import NEED_ROWS
from llm_quest.rollouts.rewards import compute_step_rewards
from llm_quest.rollouts.sampler import RolloutSampler, Sampler
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed


class GrpoConfig(EpisodeConfig):
    """A model and problems that can be checked in, a model that solves more of them out."""

    recipe: Literal["grpo"]
    task: str | None = Field(
        default=None, min_length=1, description="a task, options after a colon; or gsm8k, or its .jsonl; null: reverse"
    )
    data: PromptDataConfig | None = Field(default=None, description="prompts of your own, in place of a task")
    apply_chat_template: bool | None = Field(
        default=None,
        description="ask through the model's chat template; null: for rows, and where there is a system prompt",
    )
    system_prompt: str | None = Field(
        default=None, description="the system message of every prompt; null: it asks for the form of the answer"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template for a task's prompts, such as {enable_thinking: false}",
    )
    answer_form: Annotated[str, Choice(ANSWER_FORMS)] | None = Field(
        default=None, description="the form of the answer in a completion; null: the task's own"
    )
    grading: Annotated[str, Choice(GRADINGS)] = Field(
        default="strict", description="tolerant: the last thing that looks like the answer is read"
    )
    model: ModelConfig
    warmup: WarmupConfig | None = Field(default=None, description="for a fresh model: demonstrations first")
    rewards: tuple[RewardSpec, ...] = Field(
        default=(RewardSpec(name="correct"),), min_length=1, description="the first one decides which answers are right"
    )
    normalize_rewards_separately: bool = Field(
        default=False, description="advantages of each reward by itself, then their sum (GDPO)"
    )
    process_supervision: bool = Field(default=False, description="reward every step of the answer (chained)")
    process_reward_model: LocalPath | None = Field(
        default=None, description="a model of quest train prm that rewards the steps; null: the task's program does"
    )
    eval_steps: NonNegativeInt = Field(default=20, description="steps between evaluations; 0: only at the end")
    eval_problems: PositiveInt = Field(default=200, description="held-out problems, answered greedily")
    eval_num_samples: NonNegativeInt = Field(
        default=0, description="samples of each, for mean@k, pass@k, maj@k and best@k"
    )
    eval_refinement: RefinementConfig | None = Field(
        default=None, description="the policy revises its held-out answers by its own feedback, for refine@k; null: no"
    )

    @property
    def by_steps(self) -> bool:
        return self.process_supervision

    @field_validator("task")
    @classmethod
    def check_task(cls, task: str | None) -> str | None:
        if task is not None and not is_gsm8k(task):
            parse_task(task)
        return task

    @field_validator("rewards")
    @classmethod
    def check_reward_labels(cls, rewards: tuple[RewardSpec, ...]) -> tuple[RewardSpec, ...]:
        check_labels(rewards)
        return rewards

    @property
    def task_name(self) -> str:
        return self.task or "reverse"

    @model_validator(mode="after")
    def check_combination(self) -> GrpoConfig:
        fresh = self.model.load is None
        if self.data is not None and self.task is not None:
            raise ValueError("task and data both say what is asked; give one of them (task=null takes it away)")
        if self.data is not None and self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs is for a task's prompts; for rows give data.chat_template_kwargs")
        if name := find_reserved_argument(self.chat_template_kwargs):
            raise ValueError(f"chat_template_kwargs: {name!r} is given to every chat template; leave it out")
        if self.data is not None and fresh:
            raise ValueError("prompts of your own need a model that can read them: give model.load=FOLDER")
        if self.environment is not None and fresh:
            raise ValueError("an environment needs a model that can talk to it: give model.load=FOLDER")
        if self.environment is not None and self.eval_refinement is not None:
            raise ValueError("eval_refinement is for single answers; leave it out, or environment")
        if self.environment is None and any(spec.name == "environment" for spec in self.rewards):
            raise ValueError("the reward environment comes from an environment: name one, or leave it out")
        if self.environment in NEED_ROWS and self.task is None and self.data is None:
            raise ValueError(f"{self.environment} needs questions with answers: give task=addition or data.source=FILE")
        if self.grading != "strict" and self.answer_form is None and self.data is None:
            raise ValueError("grading has no effect without answer_form or data; leave it out")
        if fresh and is_gsm8k(self.task_name):
            raise ValueError("a fresh model cannot be warmed up on GSM8K; give model.load=FOLDER")
        if fresh and self.warmup is None:
            raise ValueError(
                "a fresh model solves nothing that a reward could tell apart; give warmup={max_steps: 400}"
            )
        if not fresh and self.warmup is not None:
            raise ValueError("warmup has no effect on a model that is loaded; leave it out (warmup=null)")
        if self.process_reward_model is not None and not self.process_supervision:
            raise ValueError("process_reward_model has no effect without process_supervision=true; leave it out")
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

    @property
    def prompt_template(self) -> ChatTemplateConfig:
        """The chat template of the rows or of the task's prompts."""
        return self.data or ChatTemplateConfig(chat_template_kwargs=self.chat_template_kwargs)


def build_step_rewards(config: GrpoConfig, tokenizer: Tokenizer, parallel: DistributedContext) -> StepRewards | None:
    """The rewards of a sample's steps, by a model or by the task's program; None without process supervision."""
    if not config.process_supervision:
        return None
    if config.process_reward_model is not None:
        return load_process_reward_model(config.process_reward_model, tokenizer, parallel)
    return partial(compute_step_rewards, tokenizer)


def build_grpo(config: GrpoConfig, context: Context) -> Job:
    """Model, problems, rollouts, objective."""
    parallel, log = context.parallel, context.log
    config = fix_template_date(config, context)
    problems = load_problems(config, log)
    config = open_policy_run(count_epochs(config, context.settings, problems.num_prompts, log), context)
    environments = open_environment(config, log)
    if environments is not None:
        problems = EnvironmentProblems(problems, environments, bool(config.answer_form)).as_set()
    model, tokenizer = init_policy(config, context)
    model.to(parallel.device)
    encode = prompt_encoder(config, tokenizer, problems)
    log_tools(problems, encode, log)
    problems = drop_long_prompts(problems, encode, model.config.max_position_embeddings - config.max_new_tokens, log)
    rewards = build_rewards(config.rewards, RewardContext(config.seed, tokenizer, parallel, log))
    policy = build_policy_setup(
        config, model, tokenizer, partial(make_prompt, problems, encode), rewards, parallel, log,
        normalize_rewards_separately=config.normalize_rewards_separately,
        steps=build_step_rewards(config, tokenizer, parallel),
        wrap_sampler=sampler_wrapper(config, environments, tokenizer, encode),
    )  # fmt: skip
    evaluator = held_out_evaluator(config, context, policy, problems, encode, tokenizer)
    report = HeldOutLog(evaluator, model, log, lambda: [*reward_failures(rewards), *environment_failures(environments)])
    return Job(
        config,
        policy.objective,
        policy.rollouts,
        [evaluator, RatioRangeEvaluator(policy.objective, config.logging_steps, parallel.all_gather)],
        {
            "tokenizer": tokenizer.hash, **encode.identity(problems), **reward_file_hashes(config.rewards),
            **environment_hashes(config.environment, config.environment_kwargs),
        },
        {
            "task": source_name(config.data) if config.data else config.task or config.environment or "reverse",
            "held_out_problems": len(problems.held_out), "tokenizer_sha256": tokenizer.hash, **problems.facts,
        },
        tokenizer,
        callbacks=policy.callbacks,
        watchers=[Diagnostics(config.diagnostics_patience)],
        watch_loss=False,
        blocks=policy.blocks,
        before=report.before,
        finish=report.after,
    )  # fmt: skip


def held_out_evaluator(
    config: GrpoConfig, context: Context, policy: PolicySetup, problems: ProblemSet, encode: PromptEncoder,
    tokenizer: Tokenizer,
) -> PolicyEvaluator:  # fmt: skip
    """The evaluator of held-out problems: every reward, on greedy answers."""
    sampler, pipeline = policy.rollouts.sampler, policy.rollouts.reward_pipeline
    return PolicyEvaluator(
        problems.held_out,
        draw_held_out(sampler, tokenizer, encode, config.max_new_tokens),
        pipeline.compute_rewards, [(reward.name, reward.weight) for reward in pipeline.rewards], config.eval_steps,
        config.eval_num_samples, config.temperature, derive_seed(config.seed, "evaluation"), context.samples_dir,
        policy.whole_policy,
        refinement=make_refinement(
            config.eval_refinement, tokenizer, encode, policy.rollouts.policy.config.max_position_embeddings,
            config.max_new_tokens,
        ),
    )  # fmt: skip


def open_environment(config: GrpoConfig, log: LogFn) -> EnvironmentClient | None:
    """Start the environment that the config names; None if it names none."""
    if config.environment is None:
        return None
    return start_environment(
        config.environment, config.environment_kwargs, timeout_seconds=config.environment_timeout, log=log
    )


def sampler_wrapper(
    config: GrpoConfig, environments: EnvironmentClient | None, tokenizer: Tokenizer, encode: PromptEncoder
) -> Callable[[Sampler], RolloutSampler]:
    """A function that makes the recipe's sampler from one of single answers."""
    if environments is None:
        return lambda sampler: sampler
    return episode_sampler_wrapper(
        environments, tokenizer, encode, max_turns=config.max_turns, max_episode_tokens=config.max_episode_tokens
    )


def load_problems(config: GrpoConfig, log: LogFn) -> ProblemSet:
    """Load the problems of the task, or of the rows. DataError where no row has the answer that a reward compares
    with."""
    seed, number, form = derive_seed(config.seed, "order"), config.eval_problems, config.answer_form or ""
    if config.environment is not None and config.data is None and config.task is None:
        return game_problems(number, seed)
    if config.data is None:
        return problems_of_task(config.task_name, form, config.grading, number, seed)
    problems = problems_of_rows(config.data, form, config.grading, number, seed, log)
    wanting = [spec.label for spec in config.rewards if spec.name in NEED_ANSWERS]
    if wanting and not problems.has_answers:
        raise DataError(
            f"{source_name(config.data)} has no {', '.join(ANSWER_KEYS[:-1])} or {ANSWER_KEYS[-1]}, which the reward "
            f"{wanting[0]} compares with; give rewards=[{{function: my_rewards.py:score}}] or a reward model"
        )
    return problems


def init_policy(config: GrpoConfig, context: Context) -> tuple[Decoder, Tokenizer]:
    """Load the policy, or build it and run its warm-up (not for a plan)."""
    if config.model.load is not None:
        return load_for_finetuning(StartModelConfig(load=config.model.load))
    assert config.warmup is not None
    task = parse_task(config.task_name)
    tokenizer = character_tokenizer(task.alphabet)
    require_demonstrations_fit(config.warmup, task, tokenizer, config.max_new_tokens, context.log)
    model = init_model(config.model, context.settings, tokenizer, context=WARMUP_CONTEXT, seed=config.seed)
    if not context.planning:
        run_sft_warmup(
            config, config.warmup, model, tokenizer, task, config.max_new_tokens, context.run_dir / "warmup",
            context.parallel, context.log,
        )  # fmt: skip
    return model, tokenizer


def prompt_encoder(config: GrpoConfig, tokenizer: Tokenizer, problems: ProblemSet) -> PromptEncoder:
    """The encoder of problems as ids of prompts."""
    own = "" if config.environment is not None and config.system_prompt is None else config.system_prompt
    return make_prompt_encoder(
        tokenizer, problems, config.prompt_template, apply_chat_template=config.apply_chat_template, system_prompt=own
    )


def check_warmup(config: GrpoConfig, settings: RawConfig) -> GrpoConfig:
    """Return the config; UsageError for a warm-up whose demonstrations do not fit into max_new_tokens."""
    if config.warmup is not None:
        task = parse_task(config.task_name)
        tokenizer = character_tokenizer(task.alphabet)
        require_demonstrations_fit(config.warmup, task, tokenizer, config.max_new_tokens, lambda line: None)
    return config


RECIPE = Recipe("grpo", GrpoConfig, build_grpo, check=check_warmup)
