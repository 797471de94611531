"""gpt-oss (OpenAI 2025, arXiv:2508.10925). What is new after Mixtral:

- Attention sinks on every layer, full ones too: a learned logit per head that takes weight and brings nothing.
- Every second layer, the first included, looks back 128 tokens; queries, keys, values and output have biases.
- The router has a bias, and the experts too, with another gate: (up + 1) * gate * sigmoid(1.702 gate), the gate at most
  7, up within +-7.
- YaRN (factor 32) with fractional ends of the ramp (`truncate` false), its temperature on cos and sin.
- The experts are published in 4 bits (MXFP4), which are decoded while they are read (`hub/mxfp4.py`).

Commonly got wrong: the rows of gate and up are stored in turn and not as halves, and the matrices (in, out); the gate
has no lower limit; the window of 128 counts the token itself; `hidden_act` says silu, which is not what is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts, clamped_swiglu
from llm_quest.layers.moe import MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding, YaRNScaling
from llm_quest.models import llama, mixtral
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, per_layer, rope_field, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, preset_table
from llm_quest.models.weight_names import Names, alternating_expert_names, attention_names, decoder_names, expand_layers
from llm_quest.models.windows import FULL, SLIDING, layer_pattern, layer_window, require_layer_types

THETA = 150_000.0
YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


@config_dataclass
class Config(mixtral.Config):
    """Mixtral's numbers. sliding_window: of the layers whose type is sliding_attention; swiglu_alpha, swiglu_limit: of
    the experts' gate."""

    head_dim: int = hf_default(64, null=lambda c: c.hidden_size // c.num_attention_heads)
    num_local_experts: int = spelled("num_local_experts", also=("num_experts",), hf_default=128)
    num_experts_per_tok: int = hf_default(4)
    rotary: RotaryEmbedding = rope_field(theta=THETA, absent=lambda c: YARN)
    sliding_window: int | None = hf_default(128, default=128)
    attention_bias: bool = hf_default(True, default=True)
    mlp_bias: bool = constant_field(default=False)
    layer_types: tuple[str, ...] = per_layer(
        FULL, SLIDING, hf_default=lambda c: layer_pattern(c.num_hidden_layers, 2), default=()
    )
    swiglu_alpha: float = hf_default(1.702, default=1.702)
    swiglu_limit: float = hf_default(7.0, default=7.0)

    def __post_init__(self) -> None:
        require_layer_types(self)


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer with a sink, a window on the even layers, and experts."""
    layer: Any = llama.block(config, layer_idx)  # type: ignore[arg-type]
    layer.mixer.layer.sliding_window = layer_window(config, layer_idx)
    layer.mixer.layer.attend.sink = nn.Parameter(torch.zeros(config.num_attention_heads))
    layer.feed_forward.layer = mixture(config)
    return layer  # type: ignore[no-any-return]


def mixture(config: Config) -> MixtureOfExperts:
    """The router and its experts. The softmax over the chosen alone is that over all, renormalized."""
    D, E, coef = config.hidden_size, config.num_local_experts, config.router_aux_loss_coef
    router = SoftmaxRouter(D, E, top_k=config.num_experts_per_tok, norm_topk_prob=True, aux_loss_coef=coef)
    router.bias = nn.Parameter(torch.zeros(E))
    experts = Experts(E, D, config.intermediate_size, bias=True)
    experts.expert_activation = clamped_swiglu(config.swiglu_alpha, config.swiglu_limit)
    return MixtureOfExperts(router, experts)


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("gpt_oss", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings) | attention_names(bias=config.attention_bias)
    table |= {"blocks.{i}.mixer.layer.attend.sink": "model.layers.{i}.self_attn.sinks"} | alternating_expert_names()
    return expand_layers(table, config.num_hidden_layers)


def gpt_oss_config(stretch: YaRNScaling = YaRNScaling(32.0, 4096, truncate=False), **numbers: Any) -> Config:
    """The two published sizes differ in layers and experts."""
    shared: dict[str, Any] = {
        "vocab_size": 201_088, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "intermediate_size": 2880, "max_position_embeddings": 131_072, "router_aux_loss_coef": 0.9,
        "num_experts_per_tok": 4, "layer_types": layer_pattern(numbers["num_hidden_layers"], 2),
    } | numbers  # fmt: skip
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], THETA, stretch))


TINY = gpt_oss_config(
    YaRNScaling(4.0, 64, truncate=False), vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=32, max_position_embeddings=256, sliding_window=5,
    num_local_experts=8, num_experts_per_tok=3, swiglu_limit=0.5, router_aux_loss_coef=0.001,
)  # fmt: skip
PRESETS = preset_table(
    "num_hidden_layers num_local_experts",
    ("gpt-oss-20b", "openai/gpt-oss-20b", 20_914_757_184, 24, 32),
    ("gpt-oss-120b", "openai/gpt-oss-120b", 116_829_156_672, 36, 128),
    make=gpt_oss_config,
    eos=(200_002, 199_999, 200_012),
)

FAMILY = Family(
    name="gpt_oss",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"gpt_oss": "GptOssForCausalLM"},
    presets=(*PRESETS, Preset("gpt-oss-tiny", TINY)),
)
