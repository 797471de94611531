"""CLIP's image tower (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020): the eyes of LLaVA. What is new after ViT:

- One more LayerNorm, between the embedding and the first block (published as `pre_layrnorm`, misspelt).
- The patches' matrix has no bias.
- The GELU is x sigmoid(1.702 x); LayerNorm's eps is 1e-5.
- No classes: trained beside a text tower, it ends in the class token's vector after the final norm.

Commonly got wrong: the erf GELU in place of the quick one moves every feature by a little and raises nothing;
ImageNet's statistics in place of CLIP's own do the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP, quick_gelu
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.patch_embedding import ImageEmbedding
from llm_quest.layers.rotary import NoRotary
from llm_quest.models.family import ConcatRows, Family, Reshaped, WeightMap, expand_layers, require_field, require_value
from llm_quest.models.image_encoder import ImageEncoder


@dataclass(frozen=True)
class Config:
    """The tower's numbers. image_size, patch_size: sides in pixels."""

    image_size: int
    patch_size: int
    num_channels: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of an image: the patches and the class token."""
        return self.num_patches + 1


def block(config: Config, layer_idx: int) -> Block:
    """One layer: multi-head attention to everybody, then the MLP."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        rotary=NoRotary(),
        bias=True,
    )
    mlp = MLP(config.hidden_size, config.intermediate_size, quick_gelu, bias=True)
    return Block(
        mixer=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), attention),
        feed_forward=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), mlp),
    )


def assemble(config: Config) -> ImageEncoder:
    """The tower, without first values."""
    return ImageEncoder(
        ModelSpec("clip", config),
        embed=ImageEmbedding(config.image_size, config.patch_size, config.num_channels, config.hidden_size, bias=False),
        enter=LayerNorm(config.hidden_size, config.layer_norm_eps),
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=LayerNorm(config.hidden_size, config.layer_norm_eps),
        head=nn.Identity(),
    )


def initialize(model: ImageEncoder, generator: torch.Generator | None = None) -> None:
    """N(0, 0.02^2); what writes into the stream smaller by sqrt(2 layers)."""
    init_normal_(model, std=0.02, out_std=0.02 / (2 * model.config.num_hidden_layers) ** 0.5, generator=generator)


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    root, layer = "vision_model.", "vision_model.encoder.layers.{i}."
    table: dict[str, Any] = {
        "embed.start": root + "embeddings.class_embedding",
        "embed.positions": root + "embeddings.position_embedding.weight",
        "embed.patches.weight": Reshaped(
            root + "embeddings.patch_embedding.weight",
            (config.hidden_size, config.num_channels, config.patch_size, config.patch_size),
        ),
    }
    for kind in ("weight", "bias"):
        table |= {
            f"enter.{kind}": f"{root}pre_layrnorm.{kind}",
            f"blocks.{{i}}.mixer.norm.{kind}": f"{layer}layer_norm1.{kind}",
            f"blocks.{{i}}.mixer.layer.qkv.{kind}": ConcatRows(
                *(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
            ),
            f"blocks.{{i}}.mixer.layer.out.{kind}": f"{layer}self_attn.out_proj.{kind}",
            f"blocks.{{i}}.feed_forward.norm.{kind}": f"{layer}layer_norm2.{kind}",
            f"blocks.{{i}}.feed_forward.layer.up.{kind}": f"{layer}mlp.fc1.{kind}",
            f"blocks.{{i}}.feed_forward.layer.down.{kind}": f"{layer}mlp.fc2.{kind}",
            f"norm.{kind}": f"{root}post_layernorm.{kind}",
        }
    return expand_layers(table, config.num_hidden_layers)


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "hidden_act", "quick_gelu")
    return Config(
        image_size=require_field(hf_config, "image_size"),
        patch_size=require_field(hf_config, "patch_size"),
        num_channels=hf_config.get("num_channels", 3),
        hidden_size=require_field(hf_config, "hidden_size"),
        num_hidden_layers=require_field(hf_config, "num_hidden_layers"),
        num_attention_heads=require_field(hf_config, "num_attention_heads"),
        intermediate_size=require_field(hf_config, "intermediate_size"),
        layer_norm_eps=hf_config.get("layer_norm_eps", 1e-5),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": "quick_gelu",
    }


CLIP_LARGE = Config(336, 14, 3, 1024, 24, 16, 4096)

FAMILY = Family(
    name="clip",
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    Config=Config,
    assemble=assemble,  # type: ignore[arg-type]
    initialize=initialize,  # type: ignore[arg-type]
    names=names,
    read=read,
    publish=publish,
    pipeline_tag="image-feature-extraction",
    optional_prefix="vision_model.",
    keys_to_ignore=(r"(vision_model\.)?embeddings\.position_ids",),
    presets=(
        Preset(
            "clip-vit-large-patch14-336",
            CLIP_LARGE,
            303_507_456,
            "openai/clip-vit-large-patch14-336",
            notes="the image tower alone; within a whole CLIP",
        ),
        Preset("clip-tiny", Config(16, 4, 3, 48, 3, 4, 96)),
    ),
)
