"""`quest train reward`: preferences -> a model that gives an answer one number. It goes on from a model that answers;
its head is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.preference_pairs import PreferenceBatch
from llm_quest.objectives.last_token import last_token_outputs
from llm_quest.objectives.reward_model import RewardModelLoss
from llm_quest.recipes.job import (
    LogFn,
    TrainingJob,
    apply_config_techniques,
    data_facts,
    load_for_finetuning,
    read_chat_template,
    run_job,
)
from llm_quest.recipes.preference_data import PairsEvaluator, pairs_loader, prepare_preferences
from llm_quest.recipes.run import RunOutcome, init_distributed, require_context
from llm_quest.recipes.tuning_config import RewardConfig
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import derive_seed


def train_reward(
    config: RewardConfig, settings: RawConfig, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, log: LogFn = print,
) -> RunOutcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with init_distributed(config, config.batch_size) as parallel:
        leader_log = log if parallel.is_main_process else lambda text: None
        return run_job(
            build_reward_job(config, parallel, leader_log), config, out, resume, env or {}, quiet, leader_log, parallel
        )


def build_reward_job(config: RewardConfig, parallel: DistributedContext, log: LogFn) -> TrainingJob:
    """Model, pairs, objective and feed."""
    model, tokenizer = load_for_finetuning(config.model)
    require_context(config.sequence_length, model.config.max_position_embeddings)
    seed = derive_seed(config.seed, "flips")
    pairs = prepare_preferences(
        config.data, ChatTemplate(tokenizer, read_chat_template(config.data)), config.sequence_length, seed
    )
    callbacks = apply_config_techniques(config, model, log)
    if find_score_head(model) is None:
        ScoreHead(1, seed=derive_seed(config.seed, "init"))(model)
    loader = pairs_loader(config, pairs, parallel)
    facts = data_facts(config.data, pairs.chat, pairs.drop_report, len(pairs.train), len(pairs.held_out), log)
    probe = PairsEvaluator(pairs.held_out, config.eval_steps, score_answers)
    return TrainingJob(
        RewardModelLoss(model, center_coefficient=config.center_rewards_coefficient), loader, lambda run: [probe], tokenizer, facts,
        {"data": loader.source.hash}, callbacks,
    )  # fmt: skip


def score_answers(model: Any, batch: PreferenceBatch) -> Tensor:
    """Of each row."""
    return last_token_outputs(model, batch.input_ids, batch.position_ids)[:, 0]
