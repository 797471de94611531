"""CLIP's image encoder (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020); LLaVA reads images with it. What is new after ViT:

- One more LayerNorm, between the embedding and the first block (published as `pre_layrnorm`, misspelt).
- The patches' matrix has no bias.
- The GELU is x sigmoid(1.702 x); LayerNorm's eps is 1e-5.
- No classes: trained beside a text tower, it ends in the class token's vector after the final norm.

Commonly got wrong: the erf GELU in place of the quick one moves every feature by a little and raises nothing;
ImageNet's statistics in place of CLIP's own do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP, quick_gelu
from llm_quest.layers.initialize import init_normal_
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import NoRotary
from llm_quest.layers.vision import ImageEmbedding
from llm_quest.models.config_fields import config_dataclass, hf_default
from llm_quest.models.family import Family, SubConfig
from llm_quest.models.image_encoder import ImageEncoder, SquareImages
from llm_quest.models.weight_names import ConcatRows, Names, Reshaped, WeightMap, expand_layers


@config_dataclass
class Config(SquareImages):
    """The encoder's numbers, as config.json has them. image_size, patch_size: sides in pixels."""

    image_size: int
    patch_size: int
    num_channels: int = hf_default(3)
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: Literal["quick_gelu"] = "quick_gelu"


def block(config: Any, layer_idx: int, activation: Callable[[Tensor], Tensor] = quick_gelu) -> Block:
    """One layer, SigLIP's too: multi-head attention to everybody, then the MLP."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        rotary=NoRotary(),
        bias=True,
    )
    mlp = MLP(config.hidden_size, config.intermediate_size, activation, bias=True)
    return Block(
        mixer=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), attention),
        feed_forward=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), mlp),
    )


def assemble(config: Config) -> ImageEncoder:
    """The model, before its weights are initialized."""
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


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    root, layer, P = "vision_model.", "vision_model.encoder.layers.{i}.", config.patch_size
    pixels = (config.hidden_size, config.num_channels, P, P)
    names: Names = {
        "embed.start": f"{root}embeddings.class_embedding",
        "embed.positions": f"{root}embeddings.position_embedding.weight",
        "embed.patches.weight": Reshaped(f"{root}embeddings.patch_embedding.weight", pixels),
    }
    parts = {
        "enter": f"{root}pre_layrnorm",
        "blocks.{i}.mixer.norm": f"{layer}layer_norm1",
        "blocks.{i}.mixer.layer.out": f"{layer}self_attn.out_proj",
        "blocks.{i}.feed_forward.norm": f"{layer}layer_norm2",
        "blocks.{i}.feed_forward.layer.up": f"{layer}mlp.fc1",
        "blocks.{i}.feed_forward.layer.down": f"{layer}mlp.fc2",
        "norm": f"{root}post_layernorm",
    }
    for kind in ("weight", "bias"):
        names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in parts.items()}
        qkv = (f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
        names[f"blocks.{{i}}.mixer.layer.qkv.{kind}"] = ConcatRows(*qkv)
    return expand_layers(names, config.num_hidden_layers)


CLIP_LARGE = Config(336, 14, 3, 1024, 24, 16, 4096)
VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
CLIP_NAME, CLIP_NOTE = "clip-vit-large-patch14-336", "the image encoder alone; within a whole CLIP"

FAMILY = Family(
    name="clip",
    Config=Config,
    assemble=assemble,
    initialize=initialize,
    weight_map=weight_map,
    architectures={"clip_vision_model": "CLIPVisionModel"},
    pipeline_tag="image-feature-extraction",
    parts={"clip": SubConfig("vision_config", "clip_vision_model", VISION_DEFAULTS)},
    other_parts=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    keys_to_ignore=(r"(vision_model\.)?embeddings\.position_ids",),
    presets=(
        Preset(CLIP_NAME, CLIP_LARGE, 303_507_456, f"openai/{CLIP_NAME}", CLIP_NOTE),
        Preset("clip-tiny", Config(16, 4, 3, 48, 3, 4, 96)),
    ),
)
