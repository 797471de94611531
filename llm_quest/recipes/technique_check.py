"""What a dry run says of a run's techniques: they are applied to the run's model, on the meta device."""

from __future__ import annotations

from typing import Any

from llm_quest.hub.load_save import load
from llm_quest.hub.locate import resolve_checkpoint
from llm_quest.models.build import build_meta_model, preset
from llm_quest.recipes.assembly import apply_techniques
from llm_quest.recipes.config_schema import ModelConfig, RunConfig
from llm_quest.recipes.finetuning import StartModelConfig
from llm_quest.recipes.model_config import WARMUP_CONTEXT, build_model_config
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.techniques.value_head import remove_value_head
from llm_quest.train.optimizers import trainable_parameters

WITH_SCORES = ("classify", "reward", "prm")
"""Recipes that train a score head, which they attach after the techniques."""
ANY_VOCAB_SIZE = 512
"""Of a tokenizer that is not there yet; no technique reads it."""
STAND_INS = {"vit": "vit-tiny", "vlm": "llava-tiny"}
"""Recipes whose model is made of more than a family and its sizes -> a model of the same kind."""


def check_techniques(config: RunConfig, settings: RawConfig) -> None:
    """UsageError for techniques that the run's model refuses, and where nothing of it would be trained. A model that is
    not here yet (a folder that an earlier command makes, a hub id) is left to the run."""
    loaded = getattr(getattr(config, "model", None), "load", None) is not None
    if (not config.all_techniques and not loaded) or (model := make_meta_model(config, settings)) is None:
        return
    scores = config.recipe in WITH_SCORES
    apply_techniques(config.all_techniques, model, lambda text: None, scores=scores)
    if not scores and not getattr(config, "has_value_head", False):
        trainable_parameters(model)


def make_meta_model(config: Any, settings: RawConfig) -> Any:
    """The model that the run begins with, without memory; of images one of the family, whose sizes no technique reads;
    None where it cannot be known yet."""
    part = getattr(config, "model", None)
    if (name := getattr(part, "load", None)) is not None:
        if not resolve_checkpoint(name).exists():
            return None
        model = load(name, device="meta", vision=config.recipe == "vlm")
        return remove_value_head(model) if isinstance(part, StartModelConfig) else model
    if isinstance(part, ModelConfig):
        context = getattr(config, "sequence_length", WARMUP_CONTEXT)
        return build_meta_model(build_model_config(part, settings, vocab=ANY_VOCAB_SIZE, context=context))
    return build_meta_model(preset(STAND_INS[config.recipe]).config) if config.recipe in STAND_INS else None
