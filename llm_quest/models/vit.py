"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929). What is new after
GPT-2:

- A word is a square of the image: its pixels through one matrix, with a learned position.
- A class token stands before the patches; what the last block makes of it is classified.
- Everyone sees everyone: there is no order to predict in, so nothing is hidden and nothing is cached.
- The GELU is the exact one (erf), and LayerNorm's eps is 1e-12, as in Hugging Face's conversion, which is what is read
  here. (Google's own code, in which these models were trained, has the tanh form and 1e-6.)

Commonly got wrong: the statistics. These models were trained on images scaled to -1..1 (mean and deviation 0.5 in every
channel), not normalized by ImageNet's; the wrong ones cost accuracy and raise nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP
from llm_quest.layers.linear import Linear
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import NoRotary
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.layers.vision import ImageEmbedding, interpolate_pos_encoding
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field, spelled, unwritten
from llm_quest.models.family import Family, preset_table
from llm_quest.models.image_encoder import (
    ImageEncoder,
    SquareImages,
    read_custom_label_names,
    read_label_names,
    read_square_size,
    write_label_names,
)
from llm_quest.models.weight_names import ConcatRows, Names, Reshaped, WeightMap, expand_layers


def read_problem_type(c: Any) -> str | None:
    """Several labels of an image, or (None) one, which is what every other value amounts to for the logits."""
    kind = c.json.get("problem_type")
    return kind if kind == "multi_label_classification" else None


def write_problem_type(kind: str | None, config: Any) -> dict[str, Any]:
    return {} if kind is None else {"problem_type": kind}


@config_dataclass
class Config(SquareImages):
    """ViT's numbers, as config.json has them. image_size, patch_size: sides in pixels; num_labels: 0 in a model without
    classes, which gives the class token's vector; label_names: of the classes, where they have names;
    problem_type: multi_label_classification where an image may have several, each with a probability of its own;
    hidden_dropout_prob: on attention weights, branches and embedding, in training."""

    image_size: int = json_field(lambda c: read_square_size(c.json, "image_size", 224))
    patch_size: int = json_field(lambda c: read_square_size(c.json, "patch_size", 16))
    num_channels: int = hf_default(3)
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_labels: int = json_field(lambda c: len(read_label_names(c.json)), unwritten)
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = spelled("hidden_dropout_prob", "attention_probs_dropout_prob", default=0.0)
    qkv_bias: bool = True
    label_names: tuple[str, ...] = json_field(read_custom_label_names, write_label_names, default=())
    problem_type: str | None = json_field(read_problem_type, write_problem_type, default=None)
    hidden_act: Literal["gelu"] = "gelu"


def block(config: Config, layer_idx: int) -> Block:
    """One layer: multi-head attention to everybody, then the MLP."""
    head_dim = config.hidden_size // config.num_attention_heads
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=head_dim,
        rotary=NoRotary(),
        bias=config.qkv_bias,
        attend=ScaledDotProduct(head_dim**-0.5, dropout=config.hidden_dropout_prob),
    )
    attention.out = Linear(config.hidden_size, config.hidden_size)
    mlp = MLP(config.hidden_size, config.intermediate_size, F.gelu, bias=True)
    norm, ffn_norm = (LayerNorm(config.hidden_size, config.layer_norm_eps) for _ in range(2))
    return Block(
        mixer=Sublayer(norm, attention, dropout=config.hidden_dropout_prob),
        feed_forward=Sublayer(ffn_norm, mlp, dropout=config.hidden_dropout_prob),
    )


def assemble(config: Config) -> ImageEncoder:
    """The model, before its weights are initialized."""
    return ImageEncoder(
        ModelSpec("vit", config),
        embed=ImageEmbedding(
            config.image_size,
            config.patch_size,
            config.num_channels,
            config.hidden_size,
            dropout=config.hidden_dropout_prob,
        ),
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=LayerNorm(config.hidden_size, config.layer_norm_eps),
        head=nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity(),
    )


def resize_images(model: ImageEncoder, image_size: int) -> ImageEncoder:
    """The same model for images of another side: its positions are stretched over the new grid, all else is shared
    (section 3.2: fine-tuning at a higher resolution)."""
    config = replace(model.config, image_size=image_size)
    with torch.device("meta"):
        other = assemble(config)
    state = model.state_dict()
    state["embed.positions"] = interpolate_pos_encoding(state["embed.positions"], image_size // config.patch_size)
    other.load_state_dict(state, assign=True)
    return other.train(model.training)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    embeddings, layer, P = "vit.embeddings.", "vit.encoder.layer.{i}.", config.patch_size
    pixels, positions = (config.hidden_size, config.num_channels, P, P), config.max_position_embeddings
    projection = f"{embeddings}patch_embeddings.projection"
    names: Names = {
        "embed.start": Reshaped(f"{embeddings}cls_token", (1, 1, config.hidden_size)),
        "embed.positions": Reshaped(f"{embeddings}position_embeddings", (1, positions, config.hidden_size)),
        "embed.patches.weight": Reshaped(f"{projection}.weight", pixels),
        "embed.patches.bias": f"{projection}.bias",
    }
    parts = {
        "blocks.{i}.mixer.norm": f"{layer}layernorm_before",
        "blocks.{i}.mixer.layer.out": f"{layer}attention.output.dense",
        "blocks.{i}.feed_forward.norm": f"{layer}layernorm_after",
        "blocks.{i}.feed_forward.layer.up": f"{layer}intermediate.dense",
        "blocks.{i}.feed_forward.layer.down": f"{layer}output.dense",
        "norm": "vit.layernorm",
        **({"head": "classifier"} if config.num_labels else {}),
    }
    names |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in parts.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        qkv = (f"{layer}attention.attention.{part}.{kind}" for part in ("query", "key", "value"))
        names[f"blocks.{{i}}.mixer.layer.qkv.{kind}"] = ConcatRows(*qkv)
    return expand_layers(names, config.num_hidden_layers)


def resolve_config(config: Config, stored: Collection[str]) -> Config:
    """Without classes where the files hold no classifier (a ViTModel, such as those trained on ImageNet-21k)."""
    return config if "classifier.weight" in stored else replace(config, num_labels=0, label_names=())


def vit_config(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> Config:
    """The published sizes with patches of 16, for ImageNet's thousand classes at 224."""
    return Config(224, 16, 3, hidden_size, num_hidden_layers, num_attention_heads, 4 * hidden_size, 1000)


FAMILY = Family(
    name="vit",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"vit": "ViTForImageClassification"},
    pipeline_tag="image-classification",
    resolve_config=resolve_config,
    keys_to_ignore=(r"vit\.pooler\.dense\.(weight|bias)",),
    presets=(
        *preset_table(
            "hidden_size num_hidden_layers num_attention_heads",
            ("vit-base-patch16-224", "google/vit-base-patch16-224", 86_567_656, 768, 12, 12),
            ("vit-large-patch16-224", "google/vit-large-patch16-224", 304_326_632, 1024, 24, 16),
            make=vit_config,
        ),
        Preset("vit-tiny", Config(16, 4, 3, 48, 2, 4, 96, 10)),
    ),
)
