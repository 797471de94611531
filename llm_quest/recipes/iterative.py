"""`quest train iterative`: GRPO with a reward model that is trained on (DeepSeekMath, arXiv:2402.03300, algorithm 1).

      reward model 0   from policy 0 and its samples, labeled by the verifier (or the environment)
      policy i         GRPO from policy i-1, its reference, with reward model i-1
      reward model i   trained on with comparisons of policy i's samples, a tenth of each batch from earlier iterations

Every stage is a run of its own in the folder, so the whole goes on where it was interrupted. In the metrics of a policy
`rewards/model` is what it is trained for and `rewards/correct` (or `rewards/environment`) is what it is worth: where
they part, the policy exploits the reward model. Not in the paper: the policy's optimizer starts anew in every
iteration.

Commonly got wrong: the reference of an iteration is the policy that it began with, not the first one, so its divergence
begins at 0; each reward model learns from earlier comparisons too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from llm_quest.contracts import LogFn
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, StoppedBySignal, UsageError
from llm_quest.files import atomic_write_json, atomic_write_text, damaged_file_errors, load_json
from llm_quest.hub.load_save import load, require_language_model, write_model_json
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.locate import RESULT_FILE
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.reward_model import RewardModelLoss
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.config_schema import ModelConfig, PositiveInt
from llm_quest.recipes.engine import run_job
from llm_quest.recipes.environment_setup import EnvironmentProblems
from llm_quest.recipes.grpo import (
    GrpoConfig,
    build_grpo,
    check_warmup,
    init_policy,
    load_problems,
    open_environment,
    prompt_encoder,
    sampler_wrapper,
)
from llm_quest.recipes.policy_setup import policy_sampler
from llm_quest.recipes.recipe import Context, Recipe, RunOutcome, no_single_job
from llm_quest.recipes.reward_specs import RewardSpec
from llm_quest.recipes.run_folder import init_run_dir
from llm_quest.recipes.schema import LocalPath, StrictModel
from llm_quest.rollouts.model_reward import ReplayLoader, make_comparisons
from llm_quest.rollouts.rewards import CorrectnessReward, EnvironmentReward
from llm_quest.rollouts.sampler import PolicyPrompt
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed
from llm_quest.train.run_dir import RunDir


class RewardModelConfig(StrictModel):
    """The reward model and how it is trained on. Labels come from the task's verifier, or the environment."""

    load: LocalPath | None = Field(default=None, description="a reward model; null: one is made from the first policy")
    max_steps: PositiveInt = Field(default=60, description="of training on, in each iteration")
    batch_size: PositiveInt = Field(default=32, description="comparisons in a step")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="learning rate, constant")
    num_prompts: PositiveInt = Field(default=128, description="asked of the newest policy for comparisons")
    replay_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="the part of a batch that earlier iterations wrote"
    )


class IterativeConfig(GrpoConfig):
    """GRPO with a reward model that is trained on the samples of each new policy (DeepSeekMath, algorithm 1)."""

    recipe: Literal["iterative"]  # type: ignore[assignment]
    num_outer_iterations: PositiveInt = Field(
        default=2, description="how often policy and reward model are trained in turn"
    )
    reward_model: RewardModelConfig = RewardModelConfig()

    @property
    def gold_reward(self) -> str:
        """The reward that labels comparisons: the environment's, or the verifier's."""
        return "correct" if self.environment is None else "environment"

    @model_validator(mode="after")
    def check_single_reward(self) -> IterativeConfig:
        if self.rewards != (RewardSpec(name=self.gold_reward),):
            raise ValueError(
                "rewards has no effect here: the reward model is the reward (reward_model.load); leave it out"
            )
        if self.process_supervision:
            raise ValueError(
                "process_supervision has no effect here: the reward model judges whole answers; leave it out"
            )
        return self


def run_iterative(config: IterativeConfig, context: Context) -> RunOutcome:
    """Run the recipe in a folder; the outcome is that of the last policy."""
    parallel, log, out = context.parallel, context.log, context.run_dir
    require_same_length(config, out)
    init_run_dir(config, context)
    init_policy(config, context)
    parallel.wait_for_main_process()
    policy = config.model.load or str(out / "warmup")
    reward_model, outcome = config.reward_model.load, None
    for number in range(config.num_outer_iterations + 1):
        folder = out / f"iteration-{number}"
        if number > 0:
            stage = policy_stage_config(config, policy, str(reward_model), number)
            stage_context = replace(context, run_dir=folder / "policy")
            outcome = run_job(build_grpo(stage, stage_context), stage_context)
            policy = str(folder / "policy")
            if outcome.status != "finished":
                return outcome
            if parallel.is_main_process:
                atomic_write_text(out / RESULT_FILE, f"iteration-{number}/policy\n")
            parallel.wait_for_main_process()  # which writes the policy that all load
        if number > 0 or reward_model is None:
            reward_model = str(train_reward_model_stage(config, policy, reward_model, out, number, parallel, log))
    assert outcome is not None
    return outcome


def require_same_length(config: IterativeConfig, out: Path) -> None:
    """Raise UsageError for another number of steps than that of the policies that exist."""
    if not (out / "config.yaml").is_file() or not (out / "iteration-0").exists():
        return
    before = parse_config(IterativeConfig, load_raw_config(str(out / "config.yaml")))
    if (before.max_steps, before.num_train_epochs) != (config.max_steps, config.num_train_epochs):
        length = f"{before.num_train_epochs:g} epochs" if before.num_train_epochs else f"{before.max_steps} steps"
        raise UsageError(
            f"{out} trains each policy for {length}, and reward models follow from the policies: its length stays; "
            "raise num_outer_iterations, or start another run"
        )


def policy_stage_config(config: IterativeConfig, policy: str, reward_model: str, number: int) -> GrpoConfig:
    """The config of one iteration's policy run: the reward model rewards, the verifier or environment is only
    reported."""
    given = config.model_dump(
        exclude={"num_outer_iterations", "reward_model", "recipe", "model", "warmup", "rewards", "seed"}
    )
    rewards = (RewardSpec(name=config.gold_reward, weight=0.0), RewardSpec(name="model", load=reward_model))
    seed = config.seed + number
    return GrpoConfig(recipe="grpo", model=ModelConfig(load=policy), warmup=None, rewards=rewards, seed=seed, **given)


def train_reward_model_stage(
    config: IterativeConfig,
    policy: str,
    reward_model: str | None,
    out: Path,
    number: int,
    parallel: DistributedContext,
    log: LogFn,
) -> Path:
    """Train this iteration's reward model; return its folder. Of several processes each holds the whole model and
    learns from the whole batch. StoppedBySignal where a signal ended it, after a checkpoint."""
    parallel = parallel.replicate()
    folder, part = out / f"iteration-{number}" / "judge", config.reward_model
    file = out / f"iteration-{number}" / "comparisons.json"
    if not parallel.broadcast(file.is_file()):
        comparisons = collect_comparisons(config, policy, number, parallel, log)
        if parallel.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(file, [comparison_to_json(comparison) for comparison in comparisons])
        parallel.wait_for_main_process()
    new = read_comparisons(file)
    history = [
        comparison
        for earlier in range(number)
        for comparison in read_comparisons(out / f"iteration-{earlier}" / "comparisons.json")
    ]
    if not new and reward_model is not None:
        log(f"reward model {number}: no question has both right and wrong answers any more; it stays what it was")
        return Path(reward_model)
    model, tokenizer = init_reward_model(reward_model or policy, derive_seed(config.seed, "judge"))
    objective = parallel.parallelize(RewardModelLoss(model))
    loader = ReplayLoader(
        new,
        history,
        batch_size=part.batch_size,
        replay_fraction=part.replay_fraction,
        seed=derive_seed(config.seed, f"judge {number}"),
    )
    with RunDir(folder, identity={"tokenizer": tokenizer.hash}, is_main_process=parallel.is_main_process) as run:
        if parallel.is_main_process:
            write_model_json(folder, model)
            tokenizer.save(folder / "tokenizer", model_max_length=model.config.max_position_embeddings)
        result = train(
            objective, loader, make_adamw(model, lr=part.learning_rate), lambda step: 1.0,
            TrainingArguments(part.max_steps, logging_steps=10, save_total_limit=1, name="reward model, step"), run,
            parallel=parallel,
        )  # fmt: skip
    if result.status == "interrupted":
        log(f"Interrupted; the reward model is saved at step {result.step}. quest train {out} goes on with it.")
        raise StoppedBySignal(result.exit_code - 128)
    parallel.wait_for_main_process()
    right = result.metrics["rewards/accuracy"]
    log(f"reward model {number}: {len(new)} new comparisons, {len(history)} earlier; last batch {right:.0%} right")
    return folder


def init_reward_model(name_or_path: str, seed: int) -> tuple[Decoder, Tokenizer]:
    """Load a reward model; the head of a language model is replaced."""
    model = require_language_model(load(name_or_path, dtype="float32", aligned=True), name_or_path)
    return (model if find_score_head(model) is not None else ScoreHead(1, seed=seed)(model)), load_tokenizer(
        name_or_path
    )


def collect_comparisons(
    config: IterativeConfig, policy: str, number: int, parallel: DistributedContext, log: LogFn
) -> Sequence[TokenizedPreference]:
    """Sample answers or episodes of the newest policy, and pair them by the verifier's or the environment's labels."""
    model, tokenizer = load(policy, dtype="float32", aligned=True).to(parallel.device), load_tokenizer(policy)
    problems = load_problems(config, lambda line: None)
    environments = open_environment(config, log)
    if environments is not None:
        problems = EnvironmentProblems(problems, environments, keep_answers=False).as_set()
    encode = prompt_encoder(config, tokenizer, problems)
    prompts = [
        problems.train_problem(10_000_000 * (number + 1) + index) for index in range(config.reward_model.num_prompts)
    ]
    questions = [
        PolicyPrompt(tuple(ids), problem) for ids, problem in zip(encode.encode_problems(prompts), prompts, strict=True)
    ]
    seed = derive_seed(config.seed, f"comparisons {number}")
    make_sampler = sampler_wrapper(config, environments, tokenizer, encode)
    sampler = make_sampler(policy_sampler(config, model, tokenizer, parallel))
    own_samples = sampler(model, questions, config.num_generations, seed, parallel.data_shard)
    groups = [group for part in parallel.all_gather(own_samples) for group in part]
    return make_comparisons(groups, CorrectnessReward() if environments is None else EnvironmentReward(), seed)


def comparison_to_json(one: TokenizedPreference) -> list[list[int]]:
    return [part.tolist() for part in (one.prompt, *one.answers)]


def read_comparisons(file: Path) -> list[TokenizedPreference]:
    """Read comparisons; none if there is no file (iteration 0 of a loaded reward model)."""
    if not file.is_file():
        return []
    remedy = "remove its reward model's folder, and both are made again"
    rows = load_json(file, list, remedy=remedy)
    with damaged_file_errors(file, remedy):
        ids = [[np.array(part, dtype=np.int64).reshape(len(part)) for part in row] for row in rows]
        return [TokenizedPreference(prompt, tuple(answers)) for prompt, *answers in ids]


def last_policy_dir(run_dir: Path) -> Path:
    """The run of the newest iteration's policy. DataError where no iteration has one yet."""
    folders = [path.parent for path in run_dir.glob("iteration-*/policy/config.yaml")]
    if not folders:
        raise DataError(f"{run_dir} has no policy of an iteration yet; go on with it: quest train {run_dir}")
    return max(folders, key=lambda policy: int(policy.parent.name.removeprefix("iteration-")))


RECIPE = Recipe(
    "iterative", IterativeConfig, no_single_job, check=check_warmup, run=run_iterative, result_dir=last_policy_dir
)
