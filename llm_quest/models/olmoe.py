"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): a small, fully open mixture of experts. What is new after Llama:

- Every layer is sparse: 64 narrow experts, eight a token, no shared expert. The weights are the softmax over all
  experts and keep their size: they sum to less than 1.
- Queries and keys are normalized over all heads together, before the rotation, as in OLMo 2; the other norms stand
  before the layers, as in Llama.
- `clip_qkv`: queries, keys and values may be limited to [-c, c]. (No released model uses it.)

Commonly got wrong: the limit acts on normalized queries and keys, before the rotation, and on the values too;
`intermediate_size` is the width of one expert; renormalized weights (as in Mixtral) give other outputs.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts
from llm_quest.layers.moe import MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import AcrossHeads, Clamp, RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import SIZES, Family, preset_table
from llm_quest.models.weight_names import (
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    expert_names,
    layer_names,
)


@config_dataclass
class Config(llama.Config):
    """Llama's numbers and the mixture's. intermediate_size: of one expert; clip_qkv: None for no limit."""

    max_position_embeddings: int = hf_default(4096)
    rms_norm_eps: float = 1e-5
    mlp_bias: bool = constant_field(default=False)
    num_experts: int = spelled("num_experts", also=("num_local_experts",), hf_default=64, default=64)
    num_experts_per_tok: int = hf_default(8, default=8)
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.01
    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        if self.clip_qkv is not None and not self.clip_qkv > 0:
            raise ValueError(f"clip_qkv is {self.clip_qkv!r}; numbers are limited to [-clip_qkv, clip_qkv]: above 0")


def block(config: Config, layer_idx: int) -> Block:
    """Llama's layer with normalized, perhaps limited queries and keys, and experts in the MLP's place."""
    layer: Any = llama.block(config, layer_idx)
    attention = layer.mixer.layer
    limit = nn.Identity() if config.clip_qkv is None else Clamp(config.clip_qkv)
    widths = [heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)]
    norms = [AcrossHeads(RMSNorm(width, config.rms_norm_eps)) for width in widths]
    attention.q_norm, attention.k_norm = (nn.Sequential(norm, limit) for norm in norms)
    attention.v_norm = limit
    layer.feed_forward.layer = mixture(config)
    return layer  # type: ignore[no-any-return]


def mixture(config: Config) -> MixtureOfExperts:
    """The router and its experts."""
    router = SoftmaxRouter(
        config.hidden_size,
        config.num_experts,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        aux_loss_coef=config.router_aux_loss_coef,
    )
    return MixtureOfExperts(router, Experts(config.num_experts, config.hidden_size, config.intermediate_size, F.silu))


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("olmoe", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings) | attention_names(bias=config.attention_bias)
    table |= expert_names(config.num_experts) | layer_names(QK_NORMS)
    return expand_layers(table, config.num_hidden_layers)


QK_NORMS = {f"mixer.layer.{part}_norm.0.norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}


def olmoe_config(**numbers: Any) -> Config:
    """The published size's vocabulary, context, head width and base."""
    shared: dict[str, Any] = {"vocab_size": 50_304, "max_position_embeddings": 4096, "head_dim": 128}
    shared |= {"tie_word_embeddings": False} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 10_000.0))


TINY = olmoe_config(
    vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    intermediate_size=32, max_position_embeddings=128, num_experts=8, num_experts_per_tok=3, clip_qkv=1.5,
)  # fmt: skip
PRESETS = preset_table(
    SIZES,
    ("olmoe-1b-7b", "allenai/OLMoE-1B-7B-0924", 6_919_161_856, 16, 2048, 16, 16, 1024),
    make=olmoe_config,
    eos=(50_279,),
)

FAMILY = Family(
    name="olmoe",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"olmoe": "OlmoeForCausalLM"},
    classifiers={"olmoe": None},
    presets=(*PRESETS, Preset("olmoe-tiny", TINY)),
)
