"""`quest train rpt`: reinforcement pre-training (arXiv:2506.08007). A model and plain text -> a model that thinks
before it says the next token.

      documents -> places that a proxy finds hard -> "think, then foretell", n samples each -> right, to the byte and to
      a token's end: 1, else 0 -> policy gradient, with held-out accuracy by how hard the proxy finds the place

What is spent is counted in FLOPs (`teraflops` in the metrics), so that `quest train rpt_control` can spend as much on
plain next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from llm_quest.contracts import Evaluator
from llm_quest.cost.flops import ModelCost, PassCost
from llm_quest.data.loader import shuffle_indices
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.job import TrainingJob, run_job
from llm_quest.recipes.policy import LogFn, PolicySetup, build_policy_setup, policy_sampler, setup_policy_run
from llm_quest.recipes.policy_evaluators import RatioRangeEvaluator
from llm_quest.recipes.recipe import Context, Recipe, no_single_job
from llm_quest.recipes.rpt.config import RPT_REWARD_BUILDERS, RptConfig
from llm_quest.recipes.rpt.evaluation import NextTokenReasoningEval
from llm_quest.recipes.rpt.flops_meter import FlopsMeter, MeteredRolloutLoader
from llm_quest.recipes.rpt.passages import RptDocuments, SelectedPositions, find_or_load_positions, load_documents
from llm_quest.recipes.rpt.positions import Position
from llm_quest.recipes.rpt.prefix_match import PrefixMatchReward
from llm_quest.recipes.rpt.probe import TABLES_FILE, PositionEvaluator
from llm_quest.recipes.rpt.start_model import RptStart, init_rpt_models
from llm_quest.recipes.run import RunOutcome
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.rollouts.reward_pipeline import WeightedReward
from llm_quest.rollouts.sampler import PolicyPrompt
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import RunDir
from llm_quest.train.state_dict import derive_seed


def run_rpt(config: RptConfig, context: Context) -> RunOutcome:
    """Run the recipe in a folder. Beside the run: positions.json, foretold.json; a fresh model's base/ and warmup/."""
    log, parallel = context.log, context.parallel
    config = setup_policy_run(config, context)
    rpt_job = build_rpt_job(config, context.settings, context.run_dir, parallel, log)
    rpt_job.evaluator.report_table("before", log)
    outcome = run_job(rpt_job.job, config, context.run_dir, context.resume, context.env, context.quiet, log, parallel)
    if outcome.status == "finished":
        rpt_job.evaluator.report_table("after", log)
    return outcome


@dataclass(frozen=True)
class RptJob:
    """The recipe's job, and the eye it keeps on held-out places."""

    job: TrainingJob
    evaluator: PositionEvaluator


def build_rpt_job(
    config: RptConfig, settings: RawConfig, out: Path, parallel: DistributedContext, log: LogFn
) -> RptJob:
    """Model, text, places, rollouts, objective."""
    start = init_rpt_models(config, settings, out, parallel, log)
    text = load_documents(config, start.tokenizer, start.model.config.max_position_embeddings, parallel, log)
    proxy_cost = ModelCost(start.proxy)
    flops = sum(proxy_cost.forward(len(ids) - 1) for ids in text.train)
    positions = parallel.broadcast(
        find_or_load_positions(config, start.proxy, flops, text, out) if parallel.is_main_process else None
    )
    log(
        f"places: {len(positions.train):,} to think about, {len(positions.held_out):,} held out{dropped_summary(positions)}"
    )
    cost = ModelCost(start.model)
    policy, meter = build_rollouts(config, start, text, positions, cost, parallel, log)
    evaluator = PositionEvaluator(
        make_position_evaluation(config, start.model, start.tokenizer, text, positions, parallel), start.model, config.eval_steps,
        out / TABLES_FILE if parallel.is_main_process else None,
    )  # fmt: skip

    def probes(run: RunDir) -> Sequence[Evaluator]:
        evaluator.samples = run.samples if run.is_main_process else None
        return [evaluator, RatioRangeEvaluator(policy.objective, config.logging_steps)]

    facts = {"source": config.data.source, **positions.facts, "tokenizer_sha256": start.tokenizer.hash}
    job = TrainingJob(
        policy.objective, MeteredRolloutLoader(policy.rollouts, meter), probes, start.tokenizer, facts, {"documents": text.hash},
        policy.callbacks, watchers=[Diagnostics(config.early_stopping_patience)],
    )  # fmt: skip
    return RptJob(job, evaluator)


def dropped_summary(found: SelectedPositions) -> str:
    return "".join(f"; dropped, {why}: {number:,}" for why, number in found.facts["dropped_places"].items())


def build_rollouts(
    config: RptConfig,
    start: RptStart,
    text: RptDocuments,
    found: SelectedPositions,
    cost: PassCost,
    parallel: DistributedContext,
    log: LogFn,
) -> tuple[PolicySetup, FlopsMeter]:
    """Every place once per epoch, in an order of its own. The meter begins with what finding the places cost."""
    ask = partial(position_question, text, found.train, derive_seed(config.seed, "order"))
    meter = FlopsMeter(
        cost, num_scorings=(config.kl_coef > 0) + (config.sampler_correction is not None), flops=found.flops
    )
    judges = [WeightedReward(config.reward, RPT_REWARD_BUILDERS[config.reward](config))]
    return build_policy_setup(config, start.model, start.tokenizer, ask, judges, parallel, log), meter


def position_question(text: RptDocuments, found: Sequence[Position], seed: int, index: int) -> PolicyPrompt:
    """Question number `index` of an endless list."""
    epoch, at = divmod(index, len(found))
    one = found[epoch_order(len(found), seed, epoch)[at]]
    return text.prompt_builder.build_prompt(text.train[one.document], one.place)


@lru_cache(maxsize=2)
def epoch_order(number: int, seed: int, epoch: int) -> list[int]:
    return list(shuffle_indices(number, seed, epoch))


def make_position_evaluation(
    config: RptConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    text: RptDocuments,
    found: SelectedPositions,
    parallel: DistributedContext,
) -> NextTokenReasoningEval:
    """How held-out places are looked at."""
    writer = policy_sampler(config, model, tokenizer, parallel)
    return NextTokenReasoningEval(
        text.held_out, found.held_out, text.prompt_builder, writer, PrefixMatchReward(config.prompt.opening_tag)
    )


RECIPE = Recipe("rpt", RptConfig, no_single_job, run=run_rpt)
