"""The supervised warm-up of a fresh policy on demonstrations: a run of its own inside the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from llm_quest.contracts import Loader, LogFn
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.problems import Task, draw_problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole_documents import Demonstrations
from llm_quest.errors import StoppedBySignal, UsageError
from llm_quest.eval.problems import evaluate_problems
from llm_quest.hub.load_save import write_model_json
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.recipes.config_schema import PositiveInt, RunConfig
from llm_quest.recipes.schema import StrictModel
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw, make_lr_schedule
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed
from llm_quest.train.run_dir import RunDir

CHECK_EVERY = 25
CHECK_PROBLEMS, CHECK_SAMPLES, CHECK_DEMONSTRATIONS = 50, 4, 200


class WarmupConfig(StrictModel):
    """Fine-tuning on the task's demonstrations, without which a fresh model earns no reward. Best stopped where some
    samples are right: before that all rewards of a group are 0, long after it all are 1, and both give no gradient."""

    max_steps: PositiveInt = Field(default=400, description="at most")
    target_accuracy: float = Field(
        default=0.4, gt=0, le=1, description="stop when this share of samples is right, held out"
    )
    batch_size: PositiveInt = Field(default=64, description="demonstrations in a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="learning rate after 25 steps of warm-up")


@dataclass(frozen=True)
class StopRule:
    """The end of a warm-up: after max_steps, or when the accuracy (measured every CHECK_EVERY steps) reaches its
    target."""

    max_steps: int
    learning_rate: float
    target_accuracy: float = 1.0
    measure_accuracy: Callable[[], float] | None = None


def require_demonstrations_fit(
    warmup: WarmupConfig, task: Task, tokenizer: Tokenizer, max_new_tokens: int, log: LogFn
) -> None:
    """Raise UsageError if fewer demonstrations than the warm-up's target accuracy fit into max_new_tokens: the rest are
    cut off and never right, so that the target cannot be reached. Logs a line if some do not fit."""
    demonstrations = Demonstrations(task, tokenizer)
    lengths = [len(demonstrations.encode_example(n, 0)[1]) for n in range(CHECK_DEMONSTRATIONS)]
    require_lengths_fit(lengths, max_new_tokens, warmup.target_accuracy, "warmup.target_accuracy", log)


def require_lengths_fit(lengths: Sequence[int], max_new_tokens: int, target: float, key: str, log: LogFn) -> None:
    """Raise UsageError for demonstrations that do not fit, as `require_demonstrations_fit`. lengths: tokens of
    demonstrations. key: of the target in the config."""
    longest = max(lengths)
    fit = sum(length <= max_new_tokens for length in lengths) / len(lengths)
    share_line = f"{fit:.0%} of the task's demonstrations fit into max_new_tokens={max_new_tokens} (longest: {longest})"
    if fit < target:
        raise UsageError(
            f"{share_line}, and {key} is {target:.0%}, which can never be reached: set max_new_tokens={longest}"
        )
    if fit < 1:
        log(f"warm-up: {share_line}; answers that are cut off are never right")


def run_sft_warmup(
    config: RunConfig,
    warmup: WarmupConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    task: Task,
    max_new_tokens: int,
    folder: Path,
    parallel: DistributedContext,
    log: LogFn,
) -> None:
    """Fine-tune a fresh model on the task's demonstrations, until some of its samples are right; a finished warm-up is
    loaded from its checkpoint."""
    loader = ShardedLoader(
        Demonstrations(task, tokenizer),
        batch_size=warmup.batch_size,
        micro_batch_size=warmup.batch_size,
        seed=derive_seed(config.seed, "demonstrations"),
    )
    problems = [draw_problem(task, "validation", index) for index in range(CHECK_PROBLEMS)]

    def measure_accuracy() -> float:
        return evaluate_problems(
            model, tokenizer, problems, num_samples=CHECK_SAMPLES, max_new_tokens=max_new_tokens
        ).mean_at_k

    stop_rule = StopRule(warmup.max_steps, warmup.learning_rate, warmup.target_accuracy, measure_accuracy)
    step, reached = train_until(config, model, tokenizer, loader, stop_rule, folder, parallel, log)
    log(f"warm-up: {step} steps on demonstrations; {reached:.0%} of samples are right")


def train_until(
    config: RunConfig, model: Decoder, tokenizer: Tokenizer, loader: Loader, stop_rule: StopRule, folder: Path,
    parallel: DistributedContext, log: LogFn,
) -> tuple[int, float]:  # fmt: skip
    """Train the model in a run folder until the stop rule holds; return the steps and the accuracy. Of several
    processes each holds the whole model and learns from the whole batch. StoppedBySignal where a signal ended it, after
    a checkpoint."""
    parallel = parallel.replicate()
    objective = parallel.parallelize(NextTokenLoss(model))
    every = CHECK_EVERY if stop_rule.measure_accuracy is not None else stop_rule.max_steps
    accuracy, step = 0.0, 0
    while step < stop_rule.max_steps and accuracy < stop_rule.target_accuracy:
        step = min((step // every + 1) * every, stop_rule.max_steps)
        with RunDir(folder, identity={"tokenizer": tokenizer.hash}, is_main_process=parallel.is_main_process) as run:
            if parallel.is_main_process:
                write_model_json(folder, model)
                tokenizer.save(folder / "tokenizer", model_max_length=model.config.max_position_embeddings)
            result = train(
                objective,
                loader,
                make_adamw(model, lr=stop_rule.learning_rate, betas=(0.9, 0.95)),
                make_lr_schedule(
                    stop_rule.max_steps, shape="constant", warmup_steps=min(CHECK_EVERY, stop_rule.max_steps)
                ),
                TrainingArguments(
                    max_steps=step,
                    logging_steps=CHECK_EVERY,
                    save_total_limit=1,
                    seed=derive_seed(config.seed, "dropout"),
                    name=f"{folder.name}, step",
                ),
                run,
                parallel=parallel,
            )
        step = result.step
        if result.status == "interrupted":
            log(f"Interrupted; the warm-up is saved at step {step}. quest train {folder.parent} goes on with it.")
            raise StoppedBySignal(result.exit_code - 128)
        if step % every and step < stop_rule.max_steps:
            continue  # a resumed warm-up is measured at the same steps as one that was never interrupted
        model.eval()
        accuracy = stop_rule.measure_accuracy() if stop_rule.measure_accuracy is not None else 0.0
    return step, accuracy
