"""`quest train grpo`: a model, problems that can be checked -> a model that solves more of them.

      questions -> samples -> rewards -> advantages -> policy gradient, with held-out accuracy before, during and after

How a policy learns from its samples is in `recipes/policy.py`; here is what it is asked, and who judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm_quest.contracts import Evaluator, Reward
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.problems import Problem, TaskSplit, draw_problem, parse_task
from llm_quest.data.problems.problem import make_rng
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.gsm8k import is_gsm8k, train_validation_split
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.reward_model import score_rows
from llm_quest.recipes.finetuning import StartModelConfig
from llm_quest.recipes.grpo_config import GrpoConfig, RewardSpec
from llm_quest.recipes.job import LogFn, TrainingJob, load_for_finetuning, run_job
from llm_quest.recipes.policy import build_policy_setup, setup_policy_run
from llm_quest.recipes.policy_evaluators import ProblemEvaluator, RatioRangeEvaluator
from llm_quest.recipes.recipe import Context, Recipe, no_single_job
from llm_quest.recipes.run import RunOutcome
from llm_quest.recipes.sft_warmup import run_sft_warmup
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.rollouts.model_reward import ModelReward
from llm_quest.rollouts.reward_pipeline import WeightedReward
from llm_quest.rollouts.rewards import CorrectnessReward, FormatReward, RandomReward
from llm_quest.rollouts.sampler import PolicyPrompt
from llm_quest.rollouts.step_rewards import compute_step_rewards
from llm_quest.techniques.score_head import find_score_head
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.state_dict import derive_seed

EncodeFn = Callable[[str], list[int]]


def run_grpo(config: GrpoConfig, context: Context) -> RunOutcome:
    """Run the recipe in a folder."""
    log, parallel = context.log, context.parallel
    config = setup_policy_run(config, context)
    grpo_job = build_grpo_job(config, context.settings, context.run_dir, parallel, log)
    before = grpo_job.evaluator.accuracy(grpo_job.job.model)
    log(f"held out, before: accuracy {before.greedy_accuracy}")
    outcome = run_job(grpo_job.job, config, context.run_dir, context.resume, context.env, context.quiet, log, parallel)
    if outcome.status == "finished":
        after = grpo_job.evaluator.accuracy(grpo_job.job.model.eval())
        log(f"held out, after:  accuracy {after.greedy_accuracy}")
    return outcome


@dataclass(frozen=True)
class GrpoJob:
    """The recipe's job, and the eye it keeps on held-out problems."""

    job: TrainingJob
    evaluator: ProblemEvaluator


def build_grpo_job(
    config: GrpoConfig, settings: RawConfig, out: Path, parallel: DistributedContext, log: LogFn
) -> GrpoJob:
    """Model, problems, rollouts, objective."""
    problems = load_problems(config)
    model, tokenizer = init_policy(config, settings, out, parallel, log)
    model.to(parallel.device)
    encode = prompt_encoder(config, tokenizer)
    rewards = [
        WeightedReward(one.name, build_reward(config, one, tokenizer, parallel), one.weight) for one in config.rewards
    ]
    steps = partial(compute_step_rewards, tokenizer) if config.process_supervision else None
    policy = build_policy_setup(
        config, model, tokenizer, partial(make_question, problems, encode), rewards, parallel, log,
        normalize_rewards_separately=config.normalize_rewards_separately, steps=steps,
    )  # fmt: skip
    evaluator = ProblemEvaluator(
        problems.held_out, tokenizer, encode, config.eval_steps, config.max_new_tokens,
        config.eval_num_samples, config.temperature, derive_seed(config.seed, "evaluation"),
    )  # fmt: skip

    def probes(run: RunDir) -> Sequence[Evaluator]:
        evaluator.samples_dir = run.samples if run.is_main_process else None
        return [evaluator, RatioRangeEvaluator(policy.objective, config.logging_steps)]

    facts = {"task": config.task, "held_out_problems": len(problems.held_out), "tokenizer_sha256": tokenizer.hash}
    job = TrainingJob(
        policy.objective, policy.rollouts, probes, tokenizer, facts, {"task": problems.identity}, policy.callbacks,
        watchers=[Diagnostics(config.early_stopping_patience)],
    )  # fmt: skip
    return GrpoJob(job, evaluator)


@dataclass(frozen=True)
class ProblemSet:
    """Problem number i of an endless list to learn from, and those that are held out."""

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


def init_policy(
    config: GrpoConfig, settings: RawConfig, out: Path, parallel: DistributedContext, log: LogFn
) -> tuple[Decoder, Tokenizer]:
    """The model that is loaded, or a fresh one that has been warmed up."""
    if config.model.load is not None:
        return load_for_finetuning(StartModelConfig(load=config.model.load))
    assert config.warmup is not None
    return run_sft_warmup(config, config.warmup, settings, parse_task(config.task), out / "warmup", parallel, log)


def prompt_encoder(config: GrpoConfig, tokenizer: Tokenizer) -> EncodeFn:
    """From a problem's prompt to ids: as plain text after the start token, or through the chat template."""
    if not config.apply_chat_template:
        return lambda text: [tokenizer.start_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    chat = ChatTemplate(tokenizer)
    return lambda text: chat.encode_prompt([{"role": "user", "content": text}])


def make_question(problems: ProblemSet, encode: EncodeFn, index: int) -> PolicyPrompt:
    """Number `index` of those to learn from."""
    problem = problems.train_problem(index)
    return PolicyPrompt(tuple(encode(problem.prompt)), problem)


def build_reward(config: GrpoConfig, spec: RewardSpec, tokenizer: Tokenizer, parallel: DistributedContext) -> Reward:
    return (
        load_reward_model(str(spec.load), tokenizer, parallel)
        if spec.name == "model"
        else REWARD_BUILDERS[spec.name](config)
    )


def load_reward_model(name_or_path: str, tokenizer: Tokenizer, parallel: DistributedContext) -> Reward:
    """A reward model that reads the policy's ids."""
    model = load(name_or_path, dtype="float32", aligned=True).to(parallel.device)
    if find_score_head(model) is None:
        raise UsageError(f"{name_or_path} is no reward model; train one (quest train reward)")
    if load_tokenizer(name_or_path).hash != tokenizer.hash:
        raise UsageError(
            f"{name_or_path} has another tokenizer than the policy: it would read other ids than were sampled"
        )
    return ModelReward(partial(score_rows, model))


REWARD_BUILDERS: dict[str, Callable[[GrpoConfig], Reward]] = {
    "correct": lambda config: CorrectnessReward(),
    "format": lambda config: FormatReward(),
    "random": lambda config: RandomReward(derive_seed(config.seed, "random reward")),
}


RECIPE = Recipe("grpo", GrpoConfig, no_single_job, run=run_grpo)
