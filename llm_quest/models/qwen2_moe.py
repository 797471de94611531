"""Qwen1.5-MoE and Qwen2-MoE (Yang et al. 2024, arXiv:2407.10671, section 2.2.2). What is new after Qwen2:

- Up to 64 narrow experts, whose weights are the softmax over all of them and keep their size: they sum to less than 1.
- A shared expert, wide as several of them, reads every token; its output is times sigmoid(gate(x)), one number a token.
- Windowed layers, where there are any, are the *even* ones below `max_window_layers`. (No released model uses them.)

Commonly got wrong: `norm_topk_prob` is false here and true in Qwen3's releases; `intermediate_size` is the width of the
dense layers, of which the released models have none; Qwen2's windowed layers are the last ones, these the first.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import qwen2, qwen3, qwen3_next
from llm_quest.models.config_fields import config_dataclass, hf_default, kv_heads_default, nested, per_layer, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import WeightMap, attention_names, decoder_names, expand_layers, swiglu_names
from llm_quest.models.windows import FULL, SLIDING


@config_dataclass
class MoEConfig(qwen3.MoEConfig):
    """Qwen3's numbers of the mixture, and the width of the shared expert."""

    num_experts: int = spelled("num_experts", hf_default=60)
    num_experts_per_tok: int = hf_default(4)
    moe_intermediate_size: int = hf_default(1408)
    norm_topk_prob: bool = False
    shared_expert_intermediate_size: int = hf_default(5632, default=5632)


def default_layer_types(c: Any) -> tuple[str, ...]:
    """Windowed where the layer is even and below max_window_layers, if there is a window."""
    windowed = c.max_window_layers if c.use_sliding_window else 0
    return tuple(SLIDING if layer % 2 == 0 and layer < windowed else FULL for layer in range(c.num_hidden_layers))


@config_dataclass
class Config(qwen2.Config):
    """Qwen2's numbers and the mixture's. attention_bias: of queries, keys and values; intermediate_size: of the dense
    layers."""

    num_key_value_heads: int = kv_heads_default(16)
    attention_bias: bool = spelled("qkv_bias", hf_default=True, default=True)
    layer_types: tuple[str, ...] = per_layer(FULL, SLIDING, hf_default=default_layer_types, default=())
    moe: MoEConfig = nested(MoEConfig, default=MoEConfig(60, 4, 1408))


def block(config: Config, layer_idx: int) -> Block:
    """Qwen2's layer, with experts in the MLP's place where the layer is sparse."""
    layer: Any = qwen2.block(config, layer_idx)
    if config.moe.is_sparse(layer_idx):
        layer.feed_forward.layer = mixture(config, layer_idx)
    return layer  # type: ignore[no-any-return]


def mixture(config: Any, layer_idx: int) -> nn.Module:
    """Qwen3's experts beside a gated shared one."""
    layer: Any = qwen3.feed_forward(config, layer_idx)
    layer.shared = GatedMLP(config.hidden_size, config.moe.shared_expert_intermediate_size, F.silu)
    layer.shared_gate = nn.Linear(config.hidden_size, 1, bias=False)
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("qwen2_moe", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Any) -> WeightMap:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings)
    table |= attention_names(bias=config.attention_bias, out_bias=False)
    layers = range(config.num_hidden_layers)
    sparse = [layer for layer in layers if config.moe.is_sparse(layer)]
    dense = expand_layers(swiglu_names(), (layer for layer in layers if layer not in sparse))
    return expand_layers(table, layers) | dense | expand_layers(qwen3_next.feed_forward_names(config), sparse)


def qwen2_moe_config(**numbers: Any) -> Config:
    """The published sizes share vocabulary, head width and base."""
    shared: dict[str, Any] = {"vocab_size": 151_936, "head_dim": 128, "tie_word_embeddings": False}
    shared |= {"layer_types": (FULL,) * numbers["num_hidden_layers"]} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 1_000_000.0))


COLUMNS = f"{SIZES} max_position_embeddings moe"
SMALL_MOE = MoEConfig(60, 4, 1408, shared_expert_intermediate_size=5632)
LARGE_MOE = MoEConfig(64, 8, 2560, shared_expert_intermediate_size=20_480)
TINY = qwen2_moe_config(
    vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    intermediate_size=64, max_position_embeddings=128, use_sliding_window=True, sliding_window=5,
    layer_types=(SLIDING, FULL, SLIDING), moe=MoEConfig(8, 3, 32, (1,), shared_expert_intermediate_size=48),
)  # fmt: skip
PRESETS = preset_table(
    COLUMNS,
    ("qwen1.5-moe-a2.7b", "Qwen/Qwen1.5-MoE-A2.7B", 14_315_784_192, 24, 2048, 16, 16, 5632, 8192, SMALL_MOE),
    ("qwen2-57b-a14b", "Qwen/Qwen2-57B-A14B", 57_408_658_944, 28, 3584, 28, 4, 18_944, 131_072, LARGE_MOE),
    make=qwen2_moe_config,
    eos=(151_643,),
)

FAMILY = Family(
    name="qwen2_moe",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"qwen2_moe": "Qwen2MoeForCausalLM"},
    presets=(*PRESETS, Preset("qwen2-moe-tiny", TINY)),
)
