"""The value estimate of PPO: a head on the policy's own trunk, or a separate value model (`value_model`)."""

from __future__ import annotations

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.layers.initialize import copy_module
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.value_loss import token_values
from llm_quest.recipes.policy import PolicyConfig
from llm_quest.recipes.reference_model import has_adapter
from llm_quest.rollouts.rollouts import RowScorer
from llm_quest.techniques.activation_checkpointing import ActivationCheckpointing
from llm_quest.techniques.adapter_merge import merge_adapter
from llm_quest.techniques.value_head import (
    ValueHead,
    attach_value_model,
    find_value_head,
    find_value_model,
    remove_value_head,
)


def value_scorer(model: Decoder) -> RowScorer:
    """A scorer of the value of each position, before its target is sampled."""
    return lambda batch: token_values(model, batch)


def init_value_model(config: PolicyConfig, model: Decoder, tokenizer: Tokenizer) -> Decoder | None:
    """Make the separate value model of a config: loaded, or a copy of the policy with its adapters merged; None without
    one. Call it before the run's techniques are applied. A value head of the policy that the run does not use is
    removed. UsageError for a value model that does not read what the policy writes."""
    part = config.value_model
    brought = find_value_head(model)
    if brought is not None and (not config.has_value_head or part is not None or find_value_model(model) is not None):
        remove_value_head(model)
    if part is None:
        return None
    own = copy_module(model) if part.load is None else load_value_model(part.load, model, tokenizer)
    if has_adapter(own):
        merge_adapter(own)
    if any(technique["name"] == "checkpointing" for technique in config.all_techniques):
        ActivationCheckpointing()(own)
    return own


def load_value_model(name_or_path: str, model: Decoder, tokenizer: Tokenizer) -> Decoder:
    """Load a reward model or a language model, in float32, without its value head."""
    own = load(name_or_path, dtype="float32", aligned=True)
    if not isinstance(own, Decoder) or load_tokenizer(name_or_path).hash != tokenizer.hash:
        raise UsageError(
            f"value_model.load={name_or_path} has another tokenizer than the policy: it would read other ids than were "
            "sampled"
        )
    if own.config.max_position_embeddings < model.config.max_position_embeddings:
        raise UsageError(f"value_model.load={name_or_path} has a shorter context than the policy; give a longer one")
    return remove_value_head(own)


def add_value_estimate(config: PolicyConfig, model: Decoder, own: Decoder | None) -> None:
    """Attach the separate value model, or a value head to the policy, if the config needs values and the policy has
    none."""
    if own is not None:
        attach_value_model(model, own)
    elif config.has_value_head and find_value_head(model) is None:
        ValueHead()(model)
