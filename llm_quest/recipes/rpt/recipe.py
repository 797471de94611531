"""`quest train rpt`: reinforcement pre-training (arXiv:2506.08007). A model and plain text -> a model that reasons
before it predicts the next token.

      documents -> places where a proxy is uncertain -> n samples each -> reward 1 if right, to the byte and to a
      token's end -> policy gradient, with held-out accuracy by the entropy of the proxy

The cost is counted in FLOPs (`teraflops` in the metrics), so that `quest train rpt_control` can spend as much on plain
next tokens.

Commonly got wrong: finding the places, and the passes of a reference, cost FLOPs too; a prompt that is sampled several
times is read once; the order of the places is another one in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llm_quest.contracts import LogFn, Reward
from llm_quest.cost.flops import ModelCost, PassCost
from llm_quest.data.loader import shuffle_indices
from llm_quest.data.policy_batch import PolicyBatch, PolicyRow
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.eval.evaluators import RatioRangeEvaluator
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.assembly import count_epochs, source_name
from llm_quest.recipes.config_schema import NonNegativeInt
from llm_quest.recipes.policy_setup import PolicySetup, build_policy_setup, open_policy_run, policy_sampler
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.rpt.documents import RptDocuments, RptTextConfig, load_documents
from llm_quest.recipes.rpt.evaluation import TABLES_FILE, NextTokenReasoningEval, PositionEvaluator
from llm_quest.recipes.rpt.positions import SelectedPositions, find_or_load_positions
from llm_quest.recipes.rpt.prompts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    AnswerFormatReward,
    Position,
    PrefixMatchReward,
)
from llm_quest.recipes.rpt.start_model import RptStart, RptWarmupConfig, check_thoughts, init_rpt_models
from llm_quest.recipes.schema import Choice
from llm_quest.rollouts.advantages import WeightedReward
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.rollouts.rewards import RandomReward
from llm_quest.rollouts.rollouts import RolloutLoader
from llm_quest.rollouts.sampler import ContextFactory, PolicyPrompt, Sample
from llm_quest.train.arguments import TrainResult
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed

TERA = 1e12

RPT_REWARD_BUILDERS: dict[str, Callable[[RptTextConfig], Reward]] = {
    "prefix": lambda config: PrefixMatchReward(config.prompt.opening_tag),
    "format": lambda config: AnswerFormatReward(config.prompt.opening_tag),
    "random": lambda config: RandomReward(derive_seed(config.seed, "random reward")),
}


class RptConfig(RptTextConfig):
    """A model and text in, a model that reasons before it predicts the next token out."""

    recipe: Literal["rpt"]
    warmup: RptWarmupConfig | None = Field(default=None, description="for a fresh model, on a task's documents")
    reward: Annotated[str, Choice(RPT_REWARD_BUILDERS)] = Field(
        default="prefix", description="format and random are controls, without which a curve proves nothing"
    )
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    @model_validator(mode="after")
    def check_combination(self) -> RptConfig:
        fresh = self.model.load is None
        if fresh and (self.warmup is None or not self.data.is_task):
            raise ValueError(
                "a fresh model has not learned to think, and only a task's documents come with thoughts to learn from "
                "(data.source=registers warmup={}); or give model.load=FOLDER"
            )
        if not fresh and self.warmup is not None:
            raise ValueError("warmup has no effect on a model that is loaded; leave it out (warmup=null)")
        if fresh and (self.prompt.prefix or self.prompt.suffix != THINK_OPEN):
            raise ValueError(
                "a fresh model is taught to think behind the text alone; leave prompt.prefix and prompt.suffix out"
            )
        if any(
            tag in self.prompt.suffix.removesuffix(THINK_OPEN)
            for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
        ):
            raise ValueError(f"prompt.suffix may end with {THINK_OPEN} and hold no other tag of the answer's form")
        return self


def build_rpt(config: RptConfig, context: Context) -> Job:
    """Model, text, positions, rollouts, objective. Beside the run: positions.json, foretold.json; a fresh model's base/
    and warmup/."""
    parallel, log, out = context.parallel, context.log, context.run_dir
    config = open_policy_run(config, context)
    start = init_rpt_models(config, config.warmup, context)
    text = load_documents(config, start.tokenizer, start.model.config.max_position_embeddings, parallel, log)
    proxy_cost = ModelCost(start.proxy)
    flops = sum(proxy_cost.forward(len(ids) - 1) for ids in text.train)
    positions = parallel.broadcast(
        find_or_load_positions(config, start.proxy, flops, text, out) if parallel.is_main_process else None
    )
    log(
        f"places: {len(positions.train):,} to think about, {len(positions.held_out):,} held out"
        f"{dropped_summary(positions)}"
    )
    config = count_epochs(config, context.settings, len(positions.train), log)
    policy, meter = build_rollouts(config, start, text, positions, ModelCost(start.model), parallel, log)
    evaluator = PositionEvaluator(
        make_position_evaluation(config, start.model, start.tokenizer, text, positions, parallel, policy.whole_policy),
        start.model,
        config.eval_steps,
        out / TABLES_FILE if context.samples_dir is not None else None,
        context.samples_dir,
    )
    return Job(
        config,
        policy.objective,
        MeteredRolloutLoader(policy.rollouts, meter),
        [evaluator, RatioRangeEvaluator(policy.objective, config.logging_steps, parallel.all_gather)],
        {"tokenizer": start.tokenizer.hash, "documents": text.hash, "positions": positions.hash},
        {
            "source": source_name(config.data),
            **positions.facts,
            **text.facts,
            "tokenizer_sha256": start.tokenizer.hash,
        },
        start.tokenizer,
        callbacks=policy.callbacks,
        watchers=[Diagnostics(config.diagnostics_patience)],
        watch_loss=False,
        blocks=policy.blocks,
        before=partial(report_before, evaluator, log),
        finish=partial(report_after, evaluator, log),
    )


def report_before(evaluator: PositionEvaluator, log: LogFn) -> Mapping[str, float]:
    metrics = evaluator.report_table("before", log).metrics()
    return {f"{evaluator.name}/{name}": value for name, value in metrics.items()}


def report_after(evaluator: PositionEvaluator, log: LogFn, result: TrainResult) -> tuple[str, ...]:
    if result.status == "finished":
        evaluator.report_table("after", log)
    return ()


def dropped_summary(selected: SelectedPositions) -> str:
    return "".join(f"; dropped, {why}: {number:,}" for why, number in selected.facts["dropped_places"].items())


def build_rollouts(
    config: RptConfig,
    start: RptStart,
    text: RptDocuments,
    selected: SelectedPositions,
    cost: PassCost,
    parallel: DistributedContext,
    log: LogFn,
) -> tuple[PolicySetup, FlopsMeter]:
    """Build the rollouts, with every place once per epoch in an order of its own. The meter starts with the FLOPs of
    finding the places."""
    ask = partial(position_question, text, selected.train, derive_seed(config.seed, "order"))
    meter = FlopsMeter(
        cost, num_scorings=(config.kl_coef > 0) + (config.sampler_correction is not None), flops=selected.flops
    )
    rewards = [WeightedReward(config.reward, RPT_REWARD_BUILDERS[config.reward](config))]
    return build_policy_setup(config, start.model, start.tokenizer, ask, rewards, parallel, log), meter


def position_question(text: RptDocuments, positions: Sequence[Position], seed: int, index: int) -> PolicyPrompt:
    """Prompt number `index` of an endless list."""
    epoch, at = divmod(index, len(positions))
    one = positions[position_order(len(positions), seed, epoch)[at]]
    return text.prompt_builder.build_prompt(text.train[one.document], one.place)


@lru_cache(maxsize=2)
def position_order(number: int, seed: int, epoch: int) -> list[int]:
    return list(shuffle_indices(number, seed, epoch))


def make_position_evaluation(
    config: RptConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    text: RptDocuments,
    selected: SelectedPositions,
    parallel: DistributedContext,
    whole_model: ContextFactory,
) -> NextTokenReasoningEval:
    """The evaluation of held-out positions."""
    writer = policy_sampler(config, model, tokenizer, parallel)
    reward = PrefixMatchReward(config.prompt.opening_tag)
    return NextTokenReasoningEval(text.held_out, selected.held_out, text.prompt_builder, writer, reward, whole_model)


class FlopsMeter:
    """Counts the FLOPs of a run. flops: so far. num_scorings: forward passes over a sample besides the training (a
    reference, a sampler correction)."""

    def __init__(self, cost: PassCost, *, num_scorings: int = 0, flops: float = 0.0):
        self.cost, self.num_scorings, self.flops = cost, num_scorings, flops

    def count_sampling(self, groups: Sequence[Sequence[Sample]]) -> None:
        """Count the groups of a rollout, those without spread too."""
        for group in groups:
            before = len(group[0].prompt_ids)
            self.flops += self.cost.forward(before)
            for sample in group:
                self.flops += self.cost.decoding(before, len(sample.completion_ids))
                self.flops += self.num_scorings * self.cost.forward(before + len(sample.completion_ids) - 1)

    def count_training(self, rows: Sequence[PolicyRow]) -> None:
        self.flops += sum(self.cost.training(row.length) for row in rows)


class MeteredRolloutLoader:
    """A loader of rollouts with a meter: its metrics hold `teraflops`, the FLOPs spent so far."""

    def __init__(self, rollout_loader: RolloutLoader, meter: FlopsMeter):
        self.rollout_loader, self.meter, self.flops_before_step = rollout_loader, meter, meter.flops

    def rewind(self) -> None:
        self.rollout_loader.rewind()
        self.meter.flops = self.flops_before_step

    def batches(self, step: int) -> list[PolicyBatch]:
        loader, self.flops_before_step = self.rollout_loader, self.meter.flops
        before, batches = loader.rollout, loader.batches(step)
        if loader.rollout is not None and loader.rollout is not before:
            self.meter.count_sampling(loader.rollout.groups)
        self.meter.count_training(loader.rows_to_read(loader.minibatch(step % loader.plan.steps_per_rollout)))
        metric_sums = {**batches[0].metric_sums, "teraflops": (self.meter.flops / TERA, 1.0)}
        return [replace(batches[0], metric_sums=metric_sums), *batches[1:]]

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": self.rollout_loader.state_dict(), "flops": float(self.meter.flops)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.rollout_loader.load_state_dict(state_dict["rollouts"])
        self.meter.flops = float(state_dict["flops"])


RECIPE = Recipe("rpt", RptConfig, build_rpt, check=check_thoughts)
