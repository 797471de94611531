"""Qwen3.5's image encoder (2026), which is Qwen3-VL's without DeepStack. What is new after SigLIP:

- Images of any size whose sides are multiples of 32: each has its own grid of patches of 16 x 16, and its own number of
  vectors.
- The learned positions of a 48 x 48 grid are interpolated to the image's; on top, queries and keys are rotated by row
  and column.
- A patch is two frames of a film; a still image is the same frame twice.
- No final norm: the merger normalizes, joins 2 x 2 neighbors and projects them to the language model's width.

Commonly got wrong: rows and columns of the rotation are those of patches, not of merged vectors; published patches come
in blocks of 2 x 2, which is an order of the file format and nothing that the encoder computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llm_quest.contracts import ModelSpec, Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.axial_rotary import AxialRotary
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP, gelu_tanh
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.vision import PatchGridEmbedding
from llm_quest.models import clip
from llm_quest.models.config_fields import config_dataclass, hf_default, json_field, spelled
from llm_quest.models.family import Family
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.weight_names import Names, Reshaped, WeightMap, expand_layers, module_names

NORM_EPS = 1e-6


@config_dataclass
class Config:
    """The encoder's numbers, as config.json has them. num_position_embeddings: of the square grid that is interpolated;
    out_hidden_size: the language model's width; spatial_merge_size: patches that become one vector, along a side."""

    num_hidden_layers: int = spelled("depth", hf_default=27)
    hidden_size: int = hf_default(1152)
    num_attention_heads: int = spelled("num_heads", hf_default=16)
    intermediate_size: int = hf_default(4304)
    out_hidden_size: int = hf_default(3584)
    num_position_embeddings: int = hf_default(2304)
    patch_size: int = hf_default(16, default=16)
    spatial_merge_size: int = hf_default(2, default=2)
    temporal_patch_size: int = hf_default(2, default=2)
    num_channels: int = spelled("in_channels", hf_default=3, default=3)
    rope_theta: float = json_field(
        lambda c: float((c.json.get("rope_parameters") or {}).get("rope_theta") or 10_000.0),
        lambda theta, config: {"rope_parameters": {"rope_type": "axial", "rope_theta": theta}},
        default=10_000.0,
    )
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"

    @property
    def image_size(self) -> int:
        """The side of an image whose positions need no interpolation."""
        return math.isqrt(self.num_position_embeddings) * self.patch_size


@dataclass(frozen=True)
class PatchPositions:
    """(axes, B, N): row and column of every patch of images (B,C,H,W)."""

    patch_size: int

    def __call__(self, images: Tensor) -> Tensor:
        rows, columns = (torch.arange(side // self.patch_size, device=images.device) for side in images.shape[2:])
        grid = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([axis.flatten() for axis in grid])[:, None].expand(-1, images.shape[0], -1)


def block(config: Config, layer_idx: int) -> Block:
    """One layer: multi-head attention to everybody, rotated by row and column, then the MLP."""
    head_dim = config.hidden_size // config.num_attention_heads
    attention = GroupedQueryAttention(
        config.hidden_size, num_attention_heads=config.num_attention_heads, bias=True, head_dim=head_dim,
        num_key_value_heads=config.num_attention_heads, rotary=AxialRotary(head_dim, config.rope_theta),
    )  # fmt: skip
    mlp = MLP(config.hidden_size, config.intermediate_size, gelu_tanh, bias=True)
    return Block(
        mixer=Sublayer(LayerNorm(config.hidden_size, NORM_EPS), attention),
        feed_forward=Sublayer(LayerNorm(config.hidden_size, NORM_EPS), mlp),
    )


def assemble(config: Config) -> ImageEncoder:
    """The model, before its weights are initialized."""
    return ImageEncoder(
        ModelSpec("qwen3_5_vision", config),
        embed=PatchGridEmbedding(
            config.num_position_embeddings, config.patch_size, config.num_channels, config.hidden_size,
            temporal_patch_size=config.temporal_patch_size, factor=config.patch_size * config.spatial_merge_size,
        ),
        blocks=[block(config, layer) for layer in range(config.num_hidden_layers)],
        norm=nn.Identity(),
        head=nn.Identity(),
        positions=PatchPositions(config.patch_size),
    )  # fmt: skip


def patch_grid(tower: ImageEncoder, images: Tensor) -> Tensor:
    """The patches of each image as its grid (M,R,C,D)."""
    rows = images.shape[2] // tower.config.patch_size
    return tower.hidden_states(images).unflatten(1, (rows, -1))


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    side = config.patch_size
    pixels = (config.hidden_size, config.num_channels, config.temporal_patch_size, side, side)
    names: Names = {
        "embed.positions": "pos_embed.weight",
        "embed.patches.weight": Reshaped("patch_embed.proj.weight", pixels),
        "embed.patches.bias": "patch_embed.proj.bias",
    }
    parts = {"mixer.norm": "norm1", "mixer.layer.qkv": "attn.qkv", "mixer.layer.out": "attn.proj"}
    parts |= {"feed_forward.norm": "norm2", "feed_forward.layer.up": "mlp.linear_fc1"}
    parts |= {"feed_forward.layer.down": "mlp.linear_fc2"}
    layer = {f"blocks.{{i}}.{ours}": f"blocks.{{i}}.{theirs}" for ours, theirs in parts.items()}
    return expand_layers(names | module_names(layer, bias=True), config.num_hidden_layers)


LARGE = Config(27, 1152, 16, 4304, 5120, 2304)
FAMILY = Family(
    name="qwen3_5_vision",
    Config=Config,
    assemble=assemble,
    initialize=clip.initialize,
    weight_map=weight_map,
    architectures={"qwen3_5_vision": "Qwen3_5VisionModel"},
    extra_model_types=("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_vision"),
    pipeline_tag="image-feature-extraction",
    presets=(Preset("qwen3.5-vision-tower-tiny", Config(3, 48, 4, 96, 48, 36, 4)),),
)
"""A part of Qwen3.5; not a model of its own here. The hub's files give it the model_type of the whole."""
