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

from llm_quest.contracts import Card, Preset
from llm_quest.errors import DataError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP
from llm_quest.layers.initialize import fill_by_depth_
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.patches import ImageEmbedding, resized_positions
from llm_quest.layers.rotary import NoRotary
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.page import Names, Page, Rows, Shaped, need, only, per_layer


@dataclass(frozen=True)
class Config:
    """ViT's numbers. image, patch: sides in pixels; labels: names of the classes, where they have names; dropout: on
    attention weights, branches and embedding, in training."""

    image: int
    patch: int
    channels: int
    width: int
    layers: int
    heads: int
    hidden: int
    classes: int
    eps: float = 1e-12
    dropout: float = 0.0
    qkv_bias: bool = True
    labels: tuple[str, ...] = ()

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
        bias=config.qkv_bias,
        out_bias=True,
        dropout=config.dropout,
    )
    return Block(
        mixer=Sublayer(LayerNorm(config.width, config.eps), attention, dropout=config.dropout),
        ffn=Sublayer(
            LayerNorm(config.width, config.eps),
            MLP(config.width, config.hidden, F.gelu, bias=True),
            dropout=config.dropout,
        ),
    )


def assemble(config: Config) -> ImageEncoder:
    """The model, without first values."""
    return ImageEncoder(
        Card("vit", config),
        embed=ImageEmbedding(config.image, config.patch, config.channels, config.width, dropout=config.dropout),
        blocks=[block(config, layer) for layer in range(config.layers)],
        norm=LayerNorm(config.width, config.eps),
        head=nn.Linear(config.width, config.classes),
    )


def resized(model: ImageEncoder, image: int) -> ImageEncoder:
    """The same model for images of another side: its positions are stretched over the new grid, all else is shared
    (section 3.2: fine-tuning at a higher resolution)."""
    config = replace(model.config, image=image)
    with torch.device("meta"):
        other = assemble(config)
    state = model.state_dict()
    state["embed.positions"] = resized_positions(state["embed.positions"], image // config.patch)
    other.load_state_dict(state, assign=True)
    return other.train(model.training)


def names(config: Config) -> Names:
    """Our parameters and their published names."""
    layer = "vit.encoder.layer.{i}."
    attention = layer + "attention.attention."
    table: dict[str, Any] = {
        "embed.start": Shaped("vit.embeddings.cls_token", (1, 1, config.width)),
        "embed.positions": Shaped("vit.embeddings.position_embeddings", (1, config.context, config.width)),
        "embed.patches.weight": Shaped(
            "vit.embeddings.patch_embeddings.projection.weight",
            (config.width, config.channels, config.patch, config.patch),
        ),
        "embed.patches.bias": "vit.embeddings.patch_embeddings.projection.bias",
        "blocks.{i}.mixer.norm.weight": layer + "layernorm_before.weight",
        "blocks.{i}.mixer.norm.bias": layer + "layernorm_before.bias",
        "blocks.{i}.mixer.layer.qkv.weight": Rows(*(f"{attention}{part}.weight" for part in ("query", "key", "value"))),
        "blocks.{i}.mixer.layer.out.weight": layer + "attention.output.dense.weight",
        "blocks.{i}.mixer.layer.out.bias": layer + "attention.output.dense.bias",
        "blocks.{i}.ffn.norm.weight": layer + "layernorm_after.weight",
        "blocks.{i}.ffn.norm.bias": layer + "layernorm_after.bias",
        "blocks.{i}.ffn.layer.up.weight": layer + "intermediate.dense.weight",
        "blocks.{i}.ffn.layer.up.bias": layer + "intermediate.dense.bias",
        "blocks.{i}.ffn.layer.down.weight": layer + "output.dense.weight",
        "blocks.{i}.ffn.layer.down.bias": layer + "output.dense.bias",
        "norm.weight": "vit.layernorm.weight",
        "norm.bias": "vit.layernorm.bias",
        "head.weight": "classifier.weight",
        "head.bias": "classifier.bias",
    }
    if config.qkv_bias:
        table["blocks.{i}.mixer.layer.qkv.bias"] = Rows(
            *(f"{attention}{part}.bias" for part in ("query", "key", "value"))
        )
    return per_layer(table, config.layers)


def read(published: Mapping[str, Any]) -> Config:
    """From the contents of config.json."""
    only(published, "hidden_act", "gelu")
    names = class_names(published)
    return Config(
        image=side(published, "image_size", 224),
        patch=side(published, "patch_size", 16),
        channels=published.get("num_channels", 3),
        width=need(published, "hidden_size"),
        layers=need(published, "num_hidden_layers"),
        heads=need(published, "num_attention_heads"),
        hidden=need(published, "intermediate_size"),
        classes=len(names),
        eps=published.get("layer_norm_eps", 1e-12),
        dropout=published.get("hidden_dropout_prob", 0.0),
        qkv_bias=published.get("qkv_bias", True),
        labels=() if names == unnamed(len(names)) else names,
    )


def class_names(published: Mapping[str, Any]) -> tuple[str, ...]:
    """`id2label` in the order of its ids; a config that leaves it out has transformers' two classes."""
    told = published.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(told, Mapping) or {str(i) for i in range(len(told))} != {str(key) for key in told}:
        raise DataError("config.json: id2label must name every class from 0 on, each once: {'0': 'cat', '1': 'dog'}")
    return tuple(str(name) for _, name in sorted(told.items(), key=lambda item: int(item[0])))


def unnamed(classes: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(classes))


def side(published: Mapping[str, Any], field: str, default: int) -> int:
    """A side in pixels; [224, 224] is 224."""
    told = published.get(field, default)
    if isinstance(told, list | tuple) and len(told) == 2 and told[0] == told[1]:
        told = told[0]
    if type(told) is not int:
        raise DataError(f"config.json: {field} is {told!r}; this page reads square images and patches only")
    return told


def publish(config: Config) -> dict[str, Any]:
    """The contents of config.json."""
    labels = config.labels or unnamed(config.classes)
    return {
        "image_size": config.image,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_eps": config.eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu",
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
    }


def sized(width: int, layers: int, heads: int) -> Config:
    """The published sizes with patches of 16, for ImageNet's thousand classes at 224."""
    return Config(224, 16, 3, width, layers, heads, 4 * width, 1000)


PAGE = Page(
    name="vit",
    model_type="vit",
    architecture="ViTForImageClassification",
    Config=Config,
    assemble=assemble,  # type: ignore[arg-type]
    initialize=fill_by_depth_,  # type: ignore[arg-type]
    names=names,
    read=read,
    publish=publish,
    task="image-classification",
    ignore=(r"vit\.pooler\.dense\.(weight|bias)",),
    presets=(
        Preset("vit-base-patch16-224", sized(768, 12, 12), 86_567_656, "google/vit-base-patch16-224"),
        Preset("vit-large-patch16-224", sized(1024, 24, 16), 304_326_632, "google/vit-large-patch16-224"),
        Preset("vit-tiny", Config(16, 4, 3, 48, 2, 4, 96, 10)),
    ),
)
