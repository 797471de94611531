"""Qwen3, dense and mixture of experts (Yang et al. 2025, arXiv:2505.09388). What is new after Llama:

- Queries and keys are normalized per head (RMSNorm, one weight shared by all heads) before the rotation.
- head_dim is 128 whatever the model's width, so heads times head_dim may exceed the width of the stream.
- Base 1e6, no stretch; eps 1e-6.
- The large models are sparse: 128 experts, 8 a token, weights renormalized; no shared expert.

Commonly got wrong: q/k norm stands *before* the rotation and has no bias; `norm_topk_prob` is true in the released
models although the class's default is false; `sliding_window` is to be ignored while `use_sliding_window` is false.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.moe import MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.config_fields import config_dataclass, hf_default, nested, rope_field, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, preset_table
from llm_quest.models.weight_names import (
    WeightMap,
    attention_names,
    decoder_names,
    expand_layers,
    expert_names,
    swiglu_names,
)


@config_dataclass
class MoEConfig:
    """The mixture's numbers. moe_intermediate_size: of one expert. A layer is sparse if (layer + 1) divides by
    decoder_sparse_step and mlp_only_layers does not name it."""

    num_experts: int = spelled("num_experts", "num_local_experts", hf_default=128)
    num_experts_per_tok: int = hf_default(8)
    moe_intermediate_size: int = hf_default(768)
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = hf_default(False, default=True)
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1

    def __post_init__(self) -> None:
        if type(self.decoder_sparse_step) is not int or self.decoder_sparse_step < 1:
            raise ValueError(
                f"decoder_sparse_step is {self.decoder_sparse_step!r}; every so many layers are sparse: 1 or more"
            )

    def is_sparse(self, layer_idx: int) -> bool:
        return layer_idx not in self.mlp_only_layers and (layer_idx + 1) % self.decoder_sparse_step == 0


def is_moe(hf_config: Any) -> bool:
    return bool(hf_config.get("model_type") == "qwen3_moe")


@config_dataclass
class Config:
    """Qwen3's numbers, as config.json has them. intermediate_size: of the dense layers; moe: None in the dense
    models."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = hf_default(lambda c: 4 if is_moe(c.json) else 32, null=lambda c: c.num_attention_heads)
    head_dim: int = hf_default(lambda c: c.hidden_size // c.num_attention_heads if is_moe(c.json) else 128)
    intermediate_size: int
    max_position_embeddings: int = hf_default(32_768)
    rotary: RotaryEmbedding = rope_field()
    tie_word_embeddings: bool = hf_default(False)
    moe: MoEConfig | None = nested(MoEConfig, when=is_moe, default=None)
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    use_sliding_window: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"


def block(config: Config, layer_idx: int) -> Block:
    """One layer: attention with normalized queries and keys, then SwiGLU or the experts."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary=config.rotary,
        bias=config.attention_bias,
        q_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
        k_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
    )
    return Block(
        mixer=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), attention),
        feed_forward=Sublayer(RMSNorm(config.hidden_size, config.rms_norm_eps), feed_forward(config, layer_idx)),
    )


def feed_forward(config: Config, layer_idx: int) -> nn.Module:
    """Dense or sparse."""
    moe = config.moe
    if moe is None or not moe.is_sparse(layer_idx):
        return GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    router = SoftmaxRouter(
        config.hidden_size,
        moe.num_experts,
        top_k=moe.num_experts_per_tok,
        norm_topk_prob=moe.norm_topk_prob,
        aux_loss_coef=moe.router_aux_loss_coef,
    )
    return MixtureOfExperts(router, Experts(moe.num_experts, config.hidden_size, moe.moe_intermediate_size, F.silu))


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("qwen3", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names."""
    table = decoder_names(tied=config.tie_word_embeddings) | attention_names(bias=config.attention_bias, qk_norm=True)
    layers = range(config.num_hidden_layers)
    sparse = [layer for layer in layers if config.moe and config.moe.is_sparse(layer)]
    experts = expert_names(config.moe.num_experts) if config.moe else {}
    dense = expand_layers(swiglu_names(), (layer for layer in layers if layer not in sparse))
    return expand_layers(table, layers) | dense | expand_layers(experts, sparse)


def qwen3_config(**numbers: Any) -> Config:
    """The published sizes share vocabulary, context, head_dim and base."""
    shared = {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 40_960} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"], 1_000_000.0))


COLUMNS = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size tie_word_embeddings
    moe"""
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 96, "max_position_embeddings": 256,
}  # fmt: skip
DENSE_TINY = qwen3_config(**TINY, num_hidden_layers=2, tie_word_embeddings=True)
MOE_TINY = qwen3_config(**TINY, num_hidden_layers=3, tie_word_embeddings=False, moe=MoEConfig(8, 3, 32, (1,)))
A3B, A22B = MoEConfig(128, 8, moe_intermediate_size=768), MoEConfig(128, 8, moe_intermediate_size=1536)
PRESETS = preset_table(
    COLUMNS,
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", 596_049_920, 1024, 28, 16, 8, 3072, True, None),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1_720_574_976, 2048, 28, 16, 8, 6144, True, None),
    ("qwen3-4b", "Qwen/Qwen3-4B", 4_022_468_096, 2560, 36, 32, 8, 9728, True, None),
    ("qwen3-8b", "Qwen/Qwen3-8B", 8_190_735_360, 4096, 36, 32, 8, 12_288, False, None),
    ("qwen3-14b", "Qwen/Qwen3-14B", 14_768_307_200, 5120, 40, 40, 8, 17_408, False, None),
    ("qwen3-32b", "Qwen/Qwen3-32B", 32_762_123_264, 5120, 64, 64, 8, 25_600, False, None),
    ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 30_532_122_624, 2048, 48, 32, 4, 6144, False, A3B),
    ("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", 235_093_634_560, 4096, 94, 64, 4, 12_288, False, A22B),
    make=qwen3_config,
    eos=(151_645, 151_643),
)

FAMILY = Family(
    name="qwen3",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"},
    choose_model_type=lambda config: "qwen3" if config.moe is None else "qwen3_moe",
    presets=(*PRESETS, Preset("qwen3-tiny", DENSE_TINY), Preset("qwen3-moe-tiny", MOE_TINY)),
)
