"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434), also DeepSeek-Coder-V2 and V2.5 (same code). What is new after Mixtral:

- Multi-head latent attention: the cache holds 576 numbers per token and layer (V2-Lite has no latent for queries).
- Many narrow experts (160, six a token) beside two that every token shares, which are one SwiGLU of twice the width;
  the first layer is dense.
- Routing by softmax within the three best of eight groups, a group being worth its best expert; weights keep their
  size, times 16. V2-Lite has neither groups nor factor.
- YaRN to 163,840 positions with mscale 0.707: the temperature is on the whole score, as in V3.

Commonly got wrong: the weights are not renormalized (`norm_topk_prob` false; with true DeepSeek's own code leaves the
factor out, transformers does not look at it: it is refused here); n_group is null without groups.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from llm_quest.contracts import Preset
from llm_quest.layers.block import Block
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.moe import BestGroups, SoftmaxRouter
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import RotaryEmbedding, YaRNScaling
from llm_quest.models import deepseek_v3
from llm_quest.models.config_fields import config_dataclass, constant_field, hf_default, spelled
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, preset_table
from llm_quest.models.weight_names import WeightMap


@config_dataclass
class Config(deepseek_v3.Config):
    """V3's numbers with V2's defaults. topk_method: the K best experts, or those of the topk_group best groups."""

    first_k_dense_replace: int = hf_default(0)
    n_routed_experts: int = spelled("n_routed_experts", also=("num_experts",), hf_default=64)
    num_experts_per_tok: int
    moe_intermediate_size: int = hf_default(1407)
    n_shared_experts: int = hf_default(2)
    n_group: int = hf_default(1)
    topk_group: int = hf_default(1)
    routed_scaling_factor: float = hf_default(1.0)
    max_position_embeddings: int = hf_default(2048)
    norm_topk_prob: Literal[False] = False
    num_nextn_predict_layers: int = constant_field(default=0)
    scoring_func: Literal["softmax"] = "softmax"  # type: ignore[assignment]
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"  # type: ignore[assignment]
    mlp_bias: Literal[False] = False


def router(config: Config) -> SoftmaxRouter:
    """Softmax over all experts, the K largest of the best groups, times the factor."""
    router = SoftmaxRouter(
        config.hidden_size,
        config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=config.norm_topk_prob,
        aux_loss_coef=0.003 / config.num_experts_per_tok,  # alpha_1 of section 3.1.2, where the loss is divided by K
    )
    router.routed_scaling_factor = config.routed_scaling_factor
    if config.topk_method == "group_limited_greedy":
        router.mask_groups = groups = BestGroups(config.n_group, config.topk_group, members=1)
        groups.check(config.num_experts_per_tok, config.n_routed_experts)
    return router


def block(config: Config, layer_idx: int) -> Block:
    """V3's layer with another router."""
    layer: Any = deepseek_v3.block(config, layer_idx)
    if layer_idx >= config.first_k_dense_replace:
        layer.feed_forward.layer.router = router(config)
    return layer  # type: ignore[no-any-return]


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("deepseek_v2", config, block, TokenEmbedding, RMSNorm)


def weight_map(config: Config) -> WeightMap:
    """Our parameters -> published names: V3's without the routers' biases."""
    names = deepseek_v3.weight_map(config)
    return {ours: theirs for ours, theirs in names.items() if not ours.endswith("router.bias")}


def deepseek_v2_config(stretch: YaRNScaling, **numbers: Any) -> Config:
    """The released sizes share most numbers."""
    shared: dict[str, Any] = {
        "vocab_size": 102_400, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "first_k_dense_replace": 1, "num_experts_per_tok": 6, "n_shared_experts": 2, "max_position_embeddings": 163_840,
    } | numbers  # fmt: skip
    return Config(**shared, rotary=RotaryEmbedding(shared["qk_rope_head_dim"], 10_000.0, stretch, interleaved=True))


COLUMNS = (
    "num_hidden_layers hidden_size num_attention_heads q_lora_rank intermediate_size n_routed_experts "
    "moe_intermediate_size n_group topk_group routed_scaling_factor topk_method"
)
GREEDY, GROUPS = (1, 1, 1.0, "greedy"), (8, 3, 16.0, "group_limited_greedy")
LITE = (15_706_484_224, 27, 2048, 16, None, 10_944, 64, 1408, *GREEDY)
PRESETS = preset_table(
    COLUMNS,
    ("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite", *LITE),
    ("deepseek-v2", "deepseek-ai/DeepSeek-V2", 235_741_434_880, 60, 5120, 128, 1536, 12_288, 160, 1536, *GROUPS),
    ("deepseek-coder-v2-lite", "deepseek-ai/DeepSeek-Coder-V2-Lite-Base", *LITE),
    make=partial(deepseek_v2_config, YaRNScaling(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)),
    eos=(100_001,),
)
TINY = deepseek_v2_config(
    YaRNScaling(4.0, 64, mscale=0.707, mscale_all_dim=0.707), vocab_size=97, hidden_size=48, num_hidden_layers=3,
    num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=16,
    intermediate_size=96, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, n_group=4, topk_group=2,
    routed_scaling_factor=2.0, topk_method="group_limited_greedy", max_position_embeddings=256,
)  # fmt: skip

FAMILY = Family(
    name="deepseek_v2",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={"deepseek_v2": "DeepseekV2ForCausalLM"},
    presets=(*PRESETS, Preset("deepseek-v2-tiny", TINY)),
)
