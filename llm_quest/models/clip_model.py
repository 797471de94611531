"""CLIP whole (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020): an image encoder and a text encoder whose vectors of a matching image and text point the same way.

- logits_per_image[m, n] = exp(logit_scale) cos(image m, text n): figure 3's pseudocode. A softmax over texts that name
  classes is a classifier that was never shown one of them (section 3.1, "zero-shot").
- logit_scale is learned, as the logarithm of an inverse temperature.

Commonly got wrong: the vectors before they are normalized; exp forgotten; the label alone as text, where the prompt "a
photo of a {label}." is worth several points of accuracy (section 3.1.4).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.models import clip, clip_text
from llm_quest.models.clip_encoder import PROJECTION_DIM
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field
from llm_quest.models.dual_encoder import LOGIT_SCALE, CLIPModel
from llm_quest.models.family import Family
from llm_quest.models.multimodal_config import read_part
from llm_quest.models.weight_names import WeightMap


def encoder_field(name: str, family: Family, defaults: Mapping[str, Any]) -> Any:
    """One of the two encoders, with the projection of the whole. What `vision_config_dict` says comes before
    `vision_config`, as in transformers."""

    def read(c: Any) -> Any:
        inner = c.json.get(f"{name}_dict") or c.json.get(name)
        given = c.json if inner is None else ChainMap({name: inner}, c.json)  # type: ignore[arg-type]
        return replace(read_part(given, name, (family,), family.model_type, defaults), projection_dim=c.projection_dim)

    return json_field(read, lambda value, config: {name: family.publish(value)})


@config_dataclass
class Config:
    """The numbers of a CLIP. projection_dim: of the space that images and texts share. vision_config, text_config: of
    the encoders."""

    projection_dim: int = hf_default(PROJECTION_DIM)
    vision_config: Any = encoder_field("vision_config", clip.FAMILY, clip.VISION_DEFAULTS)
    text_config: Any = encoder_field("text_config", clip_text.FAMILY, {})

    vocab_size = property(lambda config: config.text_config.vocab_size, doc="Of texts.")
    max_position_embeddings = property(lambda config: config.text_config.max_position_embeddings, doc="Of texts.")

    @property
    def num_hidden_layers(self) -> int:
        """The layers of both encoders together."""
        return int(self.vision_config.num_hidden_layers + self.text_config.num_hidden_layers)


def assemble(config: Config) -> CLIPModel:
    """The model, before its weights are initialized."""
    encoders = clip.assemble(config.vision_config), clip_text.assemble(config.text_config)
    return CLIPModel(ModelSpec("clip_model", config), *encoders)


def initialize(model: CLIPModel, generator: torch.Generator | None = None) -> None:
    """Each encoder as its own family does; an inverse temperature of 1 / 0.07."""
    clip.initialize(model.image_encoder, generator)
    clip_text.FAMILY.initialize(model.text_encoder, generator)
    nn.init.constant_(model.logit_scale, LOGIT_SCALE)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names: the encoders' own maps."""
    image, text = clip.weight_map(config.vision_config), clip_text.weight_map(config.text_config)
    names = {f"image_encoder.{ours}": theirs for ours, theirs in image.items()}
    return names | {f"text_encoder.{ours}": theirs for ours, theirs in text.items()} | {"logit_scale": "logit_scale"}


def clip_config(image: tuple[int, ...], text: tuple[int, ...], projection_dim: int) -> Config:
    """A published size. image: side, side of a patch, width, layers, heads; text: width, layers, heads."""
    side, patch, width, layers, heads = image
    vision = clip.Config(side, patch, 3, width, layers, heads, 4 * width, projection_dim=projection_dim)
    narrow, depth, groups = text
    words = clip_text.Config(49_408, narrow, depth, groups, 4 * narrow, 77, 2, projection_dim=projection_dim)
    return Config(projection_dim, vision, words)


BASE, LARGE = (512, 12, 8), (768, 12, 12)
SIZES = {
    "clip-vit-base-patch32": (clip_config((224, 32, 768, 12, 12), BASE, 512), 151_277_313),
    "clip-vit-base-patch16": (clip_config((224, 16, 768, 12, 12), BASE, 512), 149_620_737),
    "clip-vit-large-patch14": (clip_config((224, 14, 1024, 24, 16), LARGE, 768), 427_616_513),
    "clip-vit-large-patch14-336": (clip_config((336, 14, 1024, 24, 16), LARGE, 768), 427_944_193),
}
TINY_VISION = clip.Config(16, 4, 3, 48, 3, 4, 96, projection_dim=24)
TINY_TEXT = clip_text.Config(97, 32, 2, 4, 64, 24, 96, projection_dim=24)

FAMILY = Family(
    name="clip_model",
    Config=Config,
    assemble=assemble,
    initialize=initialize,
    weight_map=weight_map,
    architectures={"clip": "CLIPModel"},
    pipeline_tag="zero-shot-image-classification",
    presets=(
        *(Preset(name, config, count, f"openai/{name}") for name, (config, count) in SIZES.items()),
        Preset("clip-model-tiny", Config(24, TINY_VISION, TINY_TEXT)),
    ),
)
