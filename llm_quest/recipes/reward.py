"""`quest train reward`: preferences -> a model that gives an answer one number. It starts from a model that answers,
whose head is replaced.

Commonly got wrong: the reward is read at a text's last token, not at its padding; K ranked answers are K(K-1)/2 pairs
that weigh as one question; a model with a head of several classes is a classifier and is refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from llm_quest.data.builtin_qa import builtin_preferences
from llm_quest.data.preference_pairs import PreferenceBatch, PreferenceDataset
from llm_quest.errors import UsageError
from llm_quest.eval.evaluators import PairsEvaluator
from llm_quest.objectives.readouts import read_rewards
from llm_quest.objectives.reward_model import RewardModelLoss
from llm_quest.recipes.config_schema import NonNegativeInt
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.finetuning import (
    PairBatchedConfig,
    PreferenceDataConfig,
    StartModelConfig,
    apply_config_techniques,
    begin_finetuning,
    count_steps,
    data_facts,
    pairs_loader,
    prepare_preferences,
)
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.techniques.score_head import ScoreHead, find_score_head
from llm_quest.train.rng_state import derive_seed


class RewardConfig(PairBatchedConfig):
    """A model and preferences in, a model that gives an answer one number out."""

    recipe: Literal["reward"]
    model: StartModelConfig
    data: PreferenceDataConfig = PreferenceDataConfig()
    center_rewards_coefficient: float = Field(default=0.01, ge=0, description="weight of (r_chosen + r_rejected)^2")
    readout: Literal["last_token", "mean_tokens"] = Field(
        default="last_token", description="the score of the last token, or the mean of all tokens' scores"
    )
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")


def build_reward(config: RewardConfig, context: Context) -> Job:
    """Model, pairs, reward-model loss."""
    parallel, log = context.parallel, context.log
    config, model, tokenizer = begin_finetuning(config, context, builtin_preferences)
    pairs = prepare_preferences(config.data, tokenizer, config.sequence_length, derive_seed(config.seed, "flips"))
    callbacks = apply_config_techniques(config, model, log, scores=True)
    if (head := find_score_head(model)) is None:
        ScoreHead(1, seed=derive_seed(config.seed, "init"), readout=config.readout)(model)
    elif head.readout != config.readout:
        raise UsageError(
            f"model.load={config.model.load} is read by {head.readout}, not by readout={config.readout}; "
            "go on from a language model, or leave readout as it is there"
        )
    elif head.outputs != 1:
        raise UsageError(
            f"model.load={config.model.load} is a classifier of {head.outputs} classes: a reward model gives one number"
        )
    config = count_steps(config, context, model, len(pairs.train))
    loader = pairs_loader(config, pairs, parallel)
    facts = data_facts(config.data, pairs.chat, pairs.drop_report, len(pairs.train), len(pairs.held_out), log)
    return Job(
        config,
        RewardModelLoss(model, center_coefficient=config.center_rewards_coefficient),
        loader,
        [PairsEvaluator(pairs.held_out, config.eval_steps, score_answers)] if pairs.held_out else [],
        {"tokenizer": tokenizer.hash, "data": loader.source.hash, "held_out": PreferenceDataset(pairs.held_out).hash},
        facts,
        tokenizer,
        callbacks=callbacks,
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
    )


def score_answers(model: Any, batch: PreferenceBatch) -> Tensor:
    """The reward of each row."""
    return read_rewards(model, batch.input_ids, batch.position_ids)


RECIPE = Recipe("reward", RewardConfig, build_reward)
