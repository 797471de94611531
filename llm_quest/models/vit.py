"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929). What is new after
GPT-2:

- A word is a square of the image: its pixels through one matrix, with a learned position.
- A class token stands before the patches; what the last block makes of it is classified.
- Everyone sees everyone: there is no order to predict in, so nothing is hidden and nothing is cached.
- The GELU is the exact one (erf), and LayerNorm's eps is 1e-12, as in Hugging Face's conversion, which is what is read
  here. (Google's own code, in which these models were trained, has the tanh form and 1e-6.)

Commonly got wrong: the statistics. These models were trained on images scaled to -1..1 (mean and deviation 0.5 in every
channel), not normalised by ImageNet's; the wrong ones cost accuracy and raise nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.errors import DataError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP
from llm_quest.layers.initialize import init_depth_scaled_
from llm_quest.layers.linear import Linear
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.patch_embedding import ImageEmbedding, interpolate_pos_encoding
from llm_quest.layers.rotary import NoRotary
from llm_quest.layers.scaled_dot_product import ScaledDotProduct
from llm_quest.models.family import ConcatRows, Family, Reshaped, WeightMap, expand_layers, require_field, require_value
from llm_quest.models.image_encoder import ImageEncoder


@dataclass(frozen=True)
class Config:
    """ViT's numbers. image_size, patch_size: sides in pixels; label_names: names of the classes, where they have names;
    hidden_dropout_prob: on attention weights, branches and embedding, in training."""

    image_size: int
    patch_size: int
    num_channels: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    num_labels: int
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    qkv_bias: bool = True
    label_names: tuple[str, ...] = ()

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
    return Block(
        mixer=Sublayer(
            LayerNorm(config.hidden_size, config.layer_norm_eps), attention, dropout=config.hidden_dropout_prob
        ),
        feed_forward=Sublayer(
            LayerNorm(config.hidden_size, config.layer_norm_eps),
            MLP(config.hidden_size, config.intermediate_size, F.gelu, bias=True),
            dropout=config.hidden_dropout_prob,
        ),
    )


def assemble(config: Config) -> ImageEncoder:
    """The model, without first values."""
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
        head=nn.Linear(config.hidden_size, config.num_labels),
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


def names(config: Config) -> WeightMap:
    """Our parameters and their published names."""
    layer = "vit.encoder.layer.{i}."
    attention = layer + "attention.attention."
    table: dict[str, Any] = {
        "embed.start": Reshaped("vit.embeddings.cls_token", (1, 1, config.hidden_size)),
        "embed.positions": Reshaped(
            "vit.embeddings.position_embeddings", (1, config.max_position_embeddings, config.hidden_size)
        ),
        "embed.patches.weight": Reshaped(
            "vit.embeddings.patch_embeddings.projection.weight",
            (config.hidden_size, config.num_channels, config.patch_size, config.patch_size),
        ),
        "embed.patches.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "blocks.{i}.mixer.norm.weight": layer + "layernorm_before.weight",
        "blocks.{i}.mixer.norm.bias": layer + "layernorm_before.bias",
        "blocks.{i}.mixer.layer.qkv.weight": ConcatRows(
            *(f"{attention}{part}.weight" for part in ("query", "key", "value"))
        ),
        "blocks.{i}.mixer.layer.out.weight": layer + "attention.output.dense.weight",
        "blocks.{i}.mixer.layer.out.bias": layer + "attention.output.dense.bias",
        "blocks.{i}.feed_forward.norm.weight": layer + "layernorm_after.weight",
        "blocks.{i}.feed_forward.norm.bias": layer + "layernorm_after.bias",
        "blocks.{i}.feed_forward.layer.up.weight": layer + "intermediate.dense.weight",
        "blocks.{i}.feed_forward.layer.up.bias": layer + "intermediate.dense.bias",
        "blocks.{i}.feed_forward.layer.down.weight": layer + "output.dense.weight",
        "blocks.{i}.feed_forward.layer.down.bias": layer + "output.dense.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
        "head.weight": "classifier.weight",
        "head.bias": "classifier.bias",
    }
    if config.qkv_bias:
        table["blocks.{i}.mixer.layer.qkv.bias"] = ConcatRows(
            *(f"{attention}{part}.bias" for part in ("query", "key", "value"))
        )
    return expand_layers(table, config.num_hidden_layers)


def read(hf_config: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    require_value(hf_config, "hidden_act", "gelu")
    names = read_label_names(hf_config)
    return Config(
        image_size=read_square_size(hf_config, "image_size", 224),
        patch_size=read_square_size(hf_config, "patch_size", 16),
        num_channels=hf_config.get("num_channels", 3),
        hidden_size=require_field(hf_config, "hidden_size"),
        num_hidden_layers=require_field(hf_config, "num_hidden_layers"),
        num_attention_heads=require_field(hf_config, "num_attention_heads"),
        intermediate_size=require_field(hf_config, "intermediate_size"),
        num_labels=len(names),
        layer_norm_eps=hf_config.get("layer_norm_eps", 1e-12),
        hidden_dropout_prob=hf_config.get("hidden_dropout_prob", 0.0),
        qkv_bias=hf_config.get("qkv_bias", True),
        label_names=() if names == default_label_names(len(names)) else names,
    )


def read_label_names(hf_config: Mapping[str, Any]) -> tuple[str, ...]:
    """`id2label` in the order of its ids; a config that leaves it out has transformers' two classes."""
    id2label = hf_config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(id2label, Mapping) or {str(i) for i in range(len(id2label))} != {str(key) for key in id2label}:
        raise DataError("config.json: id2label must name every class from 0 on, each once: {'0': 'cat', '1': 'dog'}")
    return tuple(str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0])))


def default_label_names(num_labels: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(num_labels))


def read_square_size(hf_config: Mapping[str, Any], field: str, default: int) -> int:
    """A side in pixels; [224, 224] is 224."""
    value = hf_config.get(field, default)
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int:
        raise DataError(f"config.json: {field} is {value!r}; this page reads square images and patches only")
    return value


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    label_names = config.label_names or default_label_names(config.num_labels)
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.hidden_dropout_prob,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu",
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
    }


def vit_config(hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> Config:
    """The published sizes with patches of 16, for ImageNet's thousand classes at 224."""
    return Config(224, 16, 3, hidden_size, num_hidden_layers, num_attention_heads, 4 * hidden_size, 1000)


FAMILY = Family(
    name="vit",
    model_type="vit",
    architecture="ViTForImageClassification",
    Config=Config,
    assemble=assemble,  # type: ignore[arg-type]
    initialize=init_depth_scaled_,  # type: ignore[arg-type]
    names=names,
    read=read,
    publish=publish,
    pipeline_tag="image-classification",
    keys_to_ignore=(r"vit\.pooler\.dense\.(weight|bias)",),
    presets=(
        Preset("vit-base-patch16-224", vit_config(768, 12, 12), 86_567_656, "google/vit-base-patch16-224"),
        Preset("vit-large-patch16-224", vit_config(1024, 24, 16), 304_326_632, "google/vit-large-patch16-224"),
        Preset("vit-tiny", Config(16, 4, 3, 48, 2, 4, 96, 10)),
    ),
)
