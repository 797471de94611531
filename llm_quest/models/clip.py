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

from llm_quest.contracts import Card, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP, quick_gelu
from llm_quest.layers.initialize import fill_
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.patches import ImageEmbedding
from llm_quest.layers.rotary import NoRotary
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.page import Names, Page, Rows, Shaped, need, only, per_layer


@dataclass(frozen=True)
class Config:
    """The tower's numbers. image, patch: sides in pixels."""

    image: int
    patch: int
    channels: int
    width: int
    layers: int
    heads: int
    hidden: int
    eps: float = 1e-5

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2

    @property
    def context(self) -> int:
        """Tokens of an image: the patches and the class token."""
        return self.patches + 1


def block(config: Config, layer: int) -> Block:
    """One layer: multi-head attention to everybody, then the MLP."""
    attention = GroupedQueryAttention(
        config.width,
        heads=config.heads,
        groups=config.heads,
        head_width=config.width // config.heads,
        rotary=NoRotary(),
        bias=True,
        out_bias=True,
    )
    mlp = MLP(config.width, config.hidden, quick_gelu, bias=True)
    return Block(
        mixer=Sublayer(LayerNorm(config.width, config.eps), attention),
        ffn=Sublayer(LayerNorm(config.width, config.eps), mlp),
    )


def assemble(config: Config) -> ImageEncoder:
    """The tower, without first values."""
    return ImageEncoder(
        Card("clip", config),
        embed=ImageEmbedding(config.image, config.patch, config.channels, config.width, bias=False),
        enter=LayerNorm(config.width, config.eps),
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=LayerNorm(config.width, config.eps),
        head=nn.Identity(),
    )


def initialize(model: ImageEncoder, generator: torch.Generator | None = None) -> None:
    """N(0, 0.02^2); what writes into the stream smaller by sqrt(2 layers)."""
    fill_(model, std=0.02, out_std=0.02 / (2 * model.config.layers) ** 0.5, generator=generator)


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    root, layer = "vision_model.", "vision_model.encoder.layers.{i}."
    table: dict[str, Any] = {
        "embed.start": root + "embeddings.class_embedding",
        "embed.positions": root + "embeddings.position_embedding.weight",
        "embed.patches.weight": Shaped(
            root + "embeddings.patch_embedding.weight", (config.width, config.channels, config.patch, config.patch)
        ),
    }
    for kind in ("weight", "bias"):
        table |= {
            f"enter.{kind}": f"{root}pre_layrnorm.{kind}",
            f"blocks.{{i}}.mixer.norm.{kind}": f"{layer}layer_norm1.{kind}",
            f"blocks.{{i}}.mixer.layer.qkv.{kind}": Rows(*(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")),
            f"blocks.{{i}}.mixer.layer.out.{kind}": f"{layer}self_attn.out_proj.{kind}",
            f"blocks.{{i}}.ffn.norm.{kind}": f"{layer}layer_norm2.{kind}",
            f"blocks.{{i}}.ffn.layer.up.{kind}": f"{layer}mlp.fc1.{kind}",
            f"blocks.{{i}}.ffn.layer.down.{kind}": f"{layer}mlp.fc2.{kind}",
            f"norm.{kind}": f"{root}post_layernorm.{kind}",
        }
    return per_layer(table, config.layers)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "hidden_act", "quick_gelu")
    return Config(
        image=need(published, "image_size"),
        patch=need(published, "patch_size"),
        channels=published.get("num_channels", 3),
        width=need(published, "hidden_size"),
        layers=need(published, "num_hidden_layers"),
        heads=need(published, "num_attention_heads"),
        hidden=need(published, "intermediate_size"),
        eps=published.get("layer_norm_eps", 1e-5),
    )


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "image_size": config.image,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.eps,
        "hidden_act": "quick_gelu",
    }


LARGE = Config(336, 14, 3, 1024, 24, 16, 4096)

PAGE = Page(
    name="clip",
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    Config=Config,
    assemble=assemble,  # type: ignore[arg-type]
    initialize=initialize,  # type: ignore[arg-type]
    names=names,
    read=read,
    publish=publish,
    task="image-feature-extraction",
    optional_prefix="vision_model.",
    ignore=(r"(vision_model\.)?embeddings\.position_ids",),
    presets=(
        Preset(
            "clip-vit-large-patch14-336",
            LARGE,
            303_507_456,
            "openai/clip-vit-large-patch14-336",
            notes="the image tower alone; within a whole CLIP",
        ),
        Preset("clip-tiny", Config(16, 4, 3, 48, 3, 4, 96)),
    ),
)
