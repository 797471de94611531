"""CLIP's image encoder (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020); LLaVA reads images with it. What is new after ViT:

- One more LayerNorm, between the embedding and the first block (published as `pre_layrnorm`, misspelled).
- The patches' matrix has no bias.
- The GELU is x sigmoid(1.702 x); LayerNorm's eps is 1e-5. (OpenCLIP's own models have the erf GELU.)
- No classes: trained beside a text encoder, it ends in the class token's vector after the final norm, projected without
  a bias into the space that both encoders share (`image_embeds`). Inside a language model nothing is projected.

Commonly got wrong: the erf GELU in place of the quick one moves every feature by a little and raises nothing;
ImageNet's statistics in place of CLIP's own do the same.
"""

from __future__ import annotations

import torch

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.vision import ImageEmbedding
from llm_quest.models.clip_encoder import (
    PROJECTION_DIM,
    HiddenAct,
    block,
    encoder_names,
    project_if_stored,
    projection,
    projection_field,
)
from llm_quest.models.config_fields import config_dataclass, hf_default
from llm_quest.models.family import Family, SubConfig
from llm_quest.models.image_encoder import ImageEncoder, SquareImages
from llm_quest.models.weight_names import Reshaped, WeightMap, expand_layers


@config_dataclass
class Config(SquareImages):
    """The encoder's numbers, as config.json has them. image_size, patch_size: sides in pixels. projection_dim: of the
    space that images and texts share; 0: the class token's vector is not projected."""

    image_size: int
    patch_size: int
    num_channels: int = hf_default(3)
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: HiddenAct = "quick_gelu"
    projection_dim: int = projection_field("CLIPVisionModelWithProjection", "CLIPModel")


def assemble(config: Config) -> ImageEncoder:
    """The model, before its weights are initialized."""
    return ImageEncoder(
        ModelSpec("clip", config),
        embed=ImageEmbedding(config.image_size, config.patch_size, config.num_channels, config.hidden_size, bias=False),
        enter=LayerNorm(config.hidden_size, config.layer_norm_eps),
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=LayerNorm(config.hidden_size, config.layer_norm_eps),
        head=projection(config),
    )


def initialize(model: ImageEncoder, generator: torch.Generator | None = None) -> None:
    """N(0, 0.02^2); what writes into the stream smaller by sqrt(2 layers)."""
    init_normal_(model, std=0.02, out_std=0.02 / (2 * model.config.num_hidden_layers) ** 0.5, generator=generator)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    root, P = "vision_model.", config.patch_size
    names = {"embed.start": "embeddings.class_embedding", "embed.positions": "embeddings.position_embedding.weight"}
    norms = {"enter": "pre_layrnorm", "norm": "post_layernorm"}
    table = encoder_names(config, root, names, norms, "visual_projection.weight")
    pixels = (config.hidden_size, config.num_channels, P, P)
    table["embed.patches.weight"] = Reshaped(f"{root}embeddings.patch_embedding.weight", pixels)
    return expand_layers(table, config.num_hidden_layers)


CLIP_LARGE = Config(336, 14, 3, 1024, 24, 16, 4096)
VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
CLIP_NOTE = "the image encoder of clip-vit-large-patch14-336, as LLaVA has it"

FAMILY = Family(
    name="clip",
    Config=Config,
    assemble=assemble,
    initialize=initialize,
    weight_map=weight_map,
    architectures={"clip_vision_model": "CLIPVisionModel"},
    pipeline_tag="image-feature-extraction",
    parts={
        "clip": SubConfig("vision_config", "clip_vision_model", VISION_DEFAULTS, {"projection_dim": PROJECTION_DIM})
    },
    other_parts=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    resolve_config=project_if_stored("visual_projection.weight"),
    presets=(
        Preset("clip-vision-large-patch14-336", CLIP_LARGE, 303_507_456, notes=CLIP_NOTE),
        Preset("clip-tiny", Config(16, 4, 3, 48, 3, 4, 96)),
    ),
)
