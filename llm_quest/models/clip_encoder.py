"""What CLIP's two encoders share: their layers, the projection into the space of both, their weights' names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.feed_forward import MLP, quick_gelu
from llm_quest.layers.norm import LayerNorm
from llm_quest.layers.rotary import NoRotary
from llm_quest.models.config_fields import json_field
from llm_quest.models.weight_names import ConcatRows, Names

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
HiddenAct = Literal["quick_gelu", "gelu"]
PROJECTION_DIM = 512


def block(config: Any, layer_idx: int, activation: Callable[[Tensor], Tensor] | None = None) -> Block:
    """One layer, SigLIP's too: multi-head attention to all that the scope lets see, then the MLP."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        rotary=NoRotary(),
        bias=True,
    )
    mlp = MLP(config.hidden_size, config.intermediate_size, activation or ACTIVATIONS[config.hidden_act], bias=True)
    return Block(
        mixer=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), attention),
        feed_forward=Sublayer(LayerNorm(config.hidden_size, config.layer_norm_eps), mlp),
    )


def projection_field(*classes: str) -> Any:
    """`projection_dim`, which every CLIP writes, where config.json names one of these classes, which project; 0 where
    it names none. It is written with the first of them."""

    def read(c: Any) -> int:
        is_projected = any(name in classes for name in c.json.get("architectures") or ())
        return (c.json.get("projection_dim") or PROJECTION_DIM) if is_projected else 0

    def write(value: int, config: Any) -> dict[str, Any]:
        return {"projection_dim": value, "architectures": [classes[0]]} if value else {}

    return json_field(read, write, default=0)


def projection(config: Any) -> nn.Module:
    """Into the space that images and texts share, without a bias; nothing where the config names no such space."""
    return nn.Linear(config.hidden_size, config.projection_dim, bias=False) if config.projection_dim else nn.Identity()


def project_if_stored(name: str) -> Callable[[Any, Collection[str]], Any]:
    """`Family.resolve_config`: without a projection where the files hold none."""
    return lambda config, stored: config if name in stored else replace(config, projection_dim=0)


def encoder_names(config: Any, root: str, names: Mapping[str, str], norms: Mapping[str, str], head: str) -> Names:
    """Our names -> published ones. names, norms: of what stands before and after the layers; head: the projection."""
    layer = f"{root}encoder.layers.{{i}}."
    parts = {ours: root + theirs for ours, theirs in norms.items()} | {
        "blocks.{i}.mixer.norm": f"{layer}layer_norm1",
        "blocks.{i}.mixer.layer.out": f"{layer}self_attn.out_proj",
        "blocks.{i}.feed_forward.norm": f"{layer}layer_norm2",
        "blocks.{i}.feed_forward.layer.up": f"{layer}mlp.fc1",
        "blocks.{i}.feed_forward.layer.down": f"{layer}mlp.fc2",
    }
    entries: Names = {ours: root + theirs for ours, theirs in names.items()}
    for kind in ("weight", "bias"):
        entries |= {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in parts.items()}
        qkv = (f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
        entries[f"blocks.{{i}}.mixer.layer.qkv.{kind}"] = ConcatRows(*qkv)
    return entries | ({"head.weight": head} if config.projection_dim else {})
