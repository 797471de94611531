"""`quest train reward`: preferences -> a model that gives an answer one number. It goes on from a model that answers;
its head is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.data.chat import Chat
from llm_quest.data.pairs import AnswerBatch
from llm_quest.objectives.last_outputs import last_outputs
from llm_quest.objectives.reward_model import RewardLoss
from llm_quest.recipes.course import Outcome, company
from llm_quest.recipes.preferring import HeldPairs, feed_of, prepared
from llm_quest.recipes.tuning import Job, Say, carried_out, edited, opened, require_room, template_of, told
from llm_quest.recipes.tuning_config import Reward
from llm_quest.recipes.yaml import Settings
from llm_quest.techniques.score_head import ScoreHead, score_head
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed


def train_reward(
    config: Reward, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with company(config, config.batch.rows) as parallel:
        tell = say if parallel.leader else lambda text: None
        return carried_out(assembled(config, parallel, tell), config, out, resume, env or {}, quiet, tell, parallel)


def assembled(config: Reward, parallel: Parallel, say: Say) -> Job:
    """Model, pairs, objective and feed."""
    model, tokenizer = opened(config.model)
    require_room(config.batch.length, model)
    seed = derive_seed(config.seed, "flips")
    pairs = prepared(config.data, Chat(tokenizer, template_of(config.data)), config.batch.length, seed)
    callbacks = edited(config, model, say)
    if score_head(model) is None:
        ScoreHead(1, seed=derive_seed(config.seed, "init"))(model)
    feed = feed_of(config, pairs, parallel)
    facts = told(config.data, pairs.chat, pairs.ledger, len(pairs.train), len(pairs.held), say)
    probe = HeldPairs(pairs.held, config.evaluate.every, rewards)
    return Job(
        RewardLoss(model, center=config.center), feed, lambda run: [probe], tokenizer, facts,
        {"data": feed.source.hash}, callbacks,
    )  # fmt: skip


def rewards(model: Any, batch: AnswerBatch) -> Tensor:
    """Of each row."""
    return last_outputs(model, batch.tokens, batch.positions)[:, 0]
