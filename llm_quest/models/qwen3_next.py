"""Qwen3-Next (80B-A3B, 2025) and the text part of Qwen3.5. What is new after Qwen3:

- Three of four layers have no attention but a Gated DeltaNet: a memory of fixed size instead of a growing cache.
- The fourth is attention with an output gate, made beside the query, and rotates only the first quarter of each head.
- Block and q/k norms scale by 1 + weight (the weight centered at zero); the norm inside the DeltaNet does not.
- 512 experts of width 512, ten a token, and a shared one that each token opens by a gate (Qwen3.5: dense or sparse).

Commonly got wrong: query and gate are interleaved per head, not halves of the projection; the rotation's exponents
divide by the rotated width, not the head's; the DeltaNet's norm comes before its gate.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import nn
from torch.nn import functional as F

from llm_quest.contracts import Preset
from llm_quest.layers.attention import GroupedQueryAttention, SigmoidOutputGate
from llm_quest.layers.axial_rotary import MultimodalRotary
from llm_quest.layers.block import Block, Sublayer
from llm_quest.layers.delta_net import FlatProjection, GatedDeltaNet, InterleavedProjection
from llm_quest.layers.embedding import TokenEmbedding
from llm_quest.layers.experts import Experts
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.moe import MixtureOfExperts, SoftmaxRouter
from llm_quest.layers.norm import ZeroCenteredRMSNorm
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.config_fields import (
    config_dataclass,
    hf_default,
    json_field,
    nested,
    per_layer,
    rope_field,
    unwritten,
)
from llm_quest.models.decoder import Decoder, decoder_of_blocks
from llm_quest.models.family import Family, SubConfig, preset_table
from llm_quest.models.weight_names import (
    ConcatRows,
    Names,
    attention_names,
    decoder_names,
    expand_layers,
    expert_names,
    layer_names,
    swiglu_names,
)
from llm_quest.models.windows import FULL, layer_pattern, require_type_of_each_layer

LINEAR = "linear_attention"
SPARSE = ("qwen3_next", "qwen3_5_moe_text")
DENSE_WIDTHS = {"qwen3_next": 5632, "qwen3_5_text": 12_288}


@config_dataclass
class DeltaNetConfig:
    """The Gated DeltaNet's numbers. interleaved: Qwen3-Next's layout of its projections; Qwen3.5's is flat."""

    linear_num_key_heads: int = hf_default(16)
    linear_num_value_heads: int = hf_default(32)
    linear_key_head_dim: int = hf_default(128)
    linear_value_head_dim: int = hf_default(128)
    linear_conv_kernel_dim: int = hf_default(4)
    interleaved: bool = json_field(lambda c: c.json.get("model_type") == "qwen3_next", unwritten)


@config_dataclass
class MoEConfig:
    """The mixture's numbers: widths of an expert and of the shared one."""

    num_experts: int = hf_default(lambda c: 512 if c.json.get("model_type") == "qwen3_next" else 256)
    num_experts_per_tok: int = hf_default(lambda c: 10 if c.json.get("model_type") == "qwen3_next" else 8)
    moe_intermediate_size: int = hf_default(512)
    shared_expert_intermediate_size: int = hf_default(512)
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: Literal[1] = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mlp_only_layers:
            raise ValueError(
                f"mlp_only_layers is {list(self.mlp_only_layers)}; only a model without dense layers is computed"
            )


MROPE_SECTION = (11, 11, 10)


def read_mrope_section(c: Any) -> tuple[int, ...]:
    """How the model with images divides the rotated pairs between time, row and column; for text they are one."""
    rope = c.json.get("rope_parameters") or c.json.get("rope_scaling") or {}
    return tuple(rope.get("mrope_section") or MROPE_SECTION)


def publish_mrope(config: Any) -> dict[str, Any]:
    sections = {"mrope_section": list(config.mrope_section), "mrope_interleaved": True}
    return {} if config.delta_net.interleaved else sections


@config_dataclass
class Config:
    """Their numbers, as config.json has them. intermediate_size: of a dense feed-forward layer; layer_types:
    full_attention or linear_attention (the DeltaNet); moe: None in the dense models."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = hf_default(256)
    intermediate_size: int = hf_default(lambda c: DENSE_WIDTHS.get(c.json.get("model_type"), 0))
    max_position_embeddings: int = hf_default(32_768)
    layer_types: tuple[str, ...] = per_layer(
        FULL,
        LINEAR,
        hf_default=lambda c: layer_pattern(c.num_hidden_layers, c.json.get("full_attention_interval") or 4, LINEAR),
    )
    delta_net: DeltaNetConfig = nested(DeltaNetConfig)
    rotary: RotaryEmbedding = rope_field(partial=0.25, extra=publish_mrope)
    tie_word_embeddings: bool = hf_default(False)
    moe: MoEConfig | None = nested(
        MoEConfig,
        when=lambda json: json.get("model_type") in SPARSE and json.get("num_experts") != 0,
        default=None,
        absent=lambda config: {"num_experts": 0} if config.delta_net.interleaved else {},
    )
    mrope_section: tuple[int, ...] = json_field(read_mrope_section, unwritten, default=MROPE_SECTION)
    rms_norm_eps: float = 1e-6
    attention_bias: Literal[False] = False
    attn_output_gate: Literal[True] = True
    hidden_act: Literal["silu"] = "silu"

    def __post_init__(self) -> None:
        require_type_of_each_layer(self)


def block(config: Config, layer_idx: int) -> Block:
    """One layer: gated attention or Gated DeltaNet, then SwiGLU or the experts."""
    return Block(
        mixer=Sublayer(ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps), mixer(config, layer_idx)),
        feed_forward=Sublayer(ZeroCenteredRMSNorm(config.hidden_size, config.rms_norm_eps), feed_forward(config)),
    )


def mixer(config: Config, layer_idx: int) -> nn.Module:
    """What moves information between positions in this layer."""
    if config.layer_types[layer_idx] == FULL:
        return gated_attention(config)
    delta_net = config.delta_net
    return GatedDeltaNet(
        config.hidden_size,
        num_k_heads=delta_net.linear_num_key_heads,
        num_v_heads=delta_net.linear_num_value_heads,
        head_k_dim=delta_net.linear_key_head_dim,
        head_v_dim=delta_net.linear_value_head_dim,
        conv_kernel_size=delta_net.linear_conv_kernel_dim,
        eps=config.rms_norm_eps,
        inputs=InterleavedProjection if delta_net.interleaved else FlatProjection,
    )


def gated_attention(config: Config) -> GroupedQueryAttention:
    """Grouped-query attention whose output is gated; the gate is projected with the query."""
    attention = GroupedQueryAttention(
        config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary=MultimodalRotary(config.rotary, config.mrope_section),
        q_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps),
        k_norm=ZeroCenteredRMSNorm(config.head_dim, config.rms_norm_eps),
    )
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention.qkv = PackedLinear(config.hidden_size, q=2 * q_rows, k=kv_rows, v=kv_rows)
    attention.output_gate = SigmoidOutputGate()
    return attention


def feed_forward(config: Config) -> nn.Module:
    """Dense, or experts beside a gated shared one."""
    moe = config.moe
    if moe is None:
        return GatedMLP(config.hidden_size, config.intermediate_size, F.silu)
    return MixtureOfExperts(
        SoftmaxRouter(
            config.hidden_size,
            moe.num_experts,
            top_k=moe.num_experts_per_tok,
            norm_topk_prob=moe.norm_topk_prob,
            aux_loss_coef=moe.router_aux_loss_coef,
        ),
        Experts(moe.num_experts, config.hidden_size, moe.moe_intermediate_size, F.silu),
        shared=GatedMLP(config.hidden_size, moe.shared_expert_intermediate_size, F.silu),
        shared_gate=nn.Linear(config.hidden_size, 1, bias=False),
    )


def assemble(config: Config) -> Decoder:
    """The model, before its weights are initialized."""
    return decoder_of_blocks("qwen3_next", config, block, TokenEmbedding, ZeroCenteredRMSNorm)


def weight_map(config: Config) -> Names:
    """Our parameters -> published names."""
    everywhere = decoder_names(tied=config.tie_word_embeddings) | feed_forward_names(config)
    attending = [i for i, kind in enumerate(config.layer_types) if kind == FULL]
    others = [i for i, kind in enumerate(config.layer_types) if kind == LINEAR]
    names = expand_layers(everywhere, config.num_hidden_layers) | expand_layers(
        attention_names(qk_norm=True), attending
    )
    return names | expand_layers(delta_names(config.delta_net), others)


def delta_names(delta_net: DeltaNetConfig) -> Names:
    """A Gated DeltaNet's."""
    theirs = "model.layers.{i}.linear_attn."
    flat: Names = {
        "qkvz": ConcatRows(f"{theirs}in_proj_qkv.weight", f"{theirs}in_proj_z.weight"),
        "ba": ConcatRows(f"{theirs}in_proj_b.weight", f"{theirs}in_proj_a.weight"),
    }
    interleaved: Names = {part: f"{theirs}in_proj_{part}.weight" for part in flat}
    inputs = interleaved if delta_net.interleaved else flat
    parts = {"conv": "conv1d.weight", "A_log": "A_log", "dt_bias": "dt_bias", "norm.weight": "norm.weight"}
    parts["out.weight"] = "out_proj.weight"
    names = layer_names({f"mixer.layer.{a}": f"linear_attn.{b}" for a, b in parts.items()})
    return names | {f"blocks.{{i}}.mixer.layer.inputs.{part}.weight": one for part, one in inputs.items()}


def feed_forward_names(config: Config) -> Names:
    """A dense feed-forward layer's, or the experts'."""
    if config.moe is None:
        return swiglu_names()
    shared = swiglu_names("blocks.{i}.feed_forward.layer.shared.", "model.layers.{i}.mlp.shared_expert.")
    gate = layer_names({"feed_forward.layer.shared_gate.weight": "mlp.shared_expert_gate.weight"})
    return expert_names(config.moe.num_experts) | shared | gate


def choose_model_type(config: Config) -> str:
    """Qwen3-Next, or Qwen3.5 by its feed-forward layers."""
    if config.delta_net.interleaved:
        return "qwen3_next"
    return "qwen3_5_text" if config.moe is None else "qwen3_5_moe_text"


def qwen3_next_config(*, linear_num_value_heads: int = 32, interleaved: bool = False, **numbers: Any) -> Config:
    """The published sizes share context, head_dim, pattern and the DeltaNet's widths, Qwen3.5's their vocabulary."""
    shared: dict[str, Any] = {"vocab_size": 248_320, "head_dim": 256, "max_position_embeddings": 262_144}
    shared |= {"layer_types": layer_pattern(numbers["num_hidden_layers"], 4, LINEAR)}
    shared |= {"delta_net": DeltaNetConfig(16, linear_num_value_heads, 128, 128, 4, interleaved)} | numbers
    return Config(**shared, rotary=RotaryEmbedding(shared["head_dim"] // 4, 10_000_000.0))


COLUMNS = """hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size
    linear_num_value_heads tie_word_embeddings"""
NEXT_80B = qwen3_next_config(
    vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=2,
    intermediate_size=5120, tie_word_embeddings=False, moe=MoEConfig(512, 10, 512, 512), interleaved=True,
)  # fmt: skip
MOE_35B = qwen3_next_config(
    hidden_size=2048, num_hidden_layers=40, num_attention_heads=16, num_key_value_heads=2, intermediate_size=0,
    tie_word_embeddings=False, moe=MoEConfig(256, 8, 512, 512),
)  # fmt: skip
TINY = partial(
    qwen3_next_config, vocab_size=97, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, intermediate_size=96, max_position_embeddings=256,
)  # fmt: skip
NEXT_TINY = TINY(
    delta_net=DeltaNetConfig(2, 4, 8, 12, 4, interleaved=True), tie_word_embeddings=False, moe=MoEConfig(8, 3, 32, 32)
)
DENSE_TINY = TINY(delta_net=DeltaNetConfig(2, 4, 8, 12, 4, interleaved=False), tie_word_embeddings=True)
NEXT_ID, NEXT_EOS, MOE_ID = "Qwen/Qwen3-Next-80B-A3B-Instruct", (151_645, 151_643), "Qwen/Qwen3.5-35B-A3B"
DENSE_DEFAULTS = {
    "vocab_size": 248_320, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4,
}  # fmt: skip
MOE_DEFAULTS = {
    "vocab_size": 248_320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
    "num_key_value_heads": 2,
}  # fmt: skip
EOS_TOKEN_IDS, MULTIMODAL = (248_046, 248_044), "text; within a multimodal model"

FAMILY = Family(
    name="qwen3_next",
    Config=Config,
    assemble=assemble,
    weight_map=weight_map,
    architectures={
        "qwen3_next": "Qwen3NextForCausalLM",
        "qwen3_5_text": "Qwen3_5ForCausalLM",
        "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    },
    choose_model_type=choose_model_type,
    classifiers={"qwen3_5_text": "Qwen3_5TextForSequenceClassification", "qwen3_5_moe_text": None},
    parts={
        "qwen3_5": SubConfig("text_config", "qwen3_5_text", DENSE_DEFAULTS),
        "qwen3_5_moe": SubConfig("text_config", "qwen3_5_moe_text", MOE_DEFAULTS),
    },
    other_parts=("visual.",),
    keys_to_ignore=(r"(model\.)?mtp\..*",),
    presets=(
        Preset("qwen3-next-80b-a3b", NEXT_80B, 79_674_391_296, NEXT_ID, "without MTP", NEXT_EOS),
        *preset_table(
            COLUMNS,
            ("qwen3.5-0.8b", "Qwen/Qwen3.5-0.8B", 752_393_024, 1024, 24, 8, 2, 3584, 16, True),
            ("qwen3.5-2b", "Qwen/Qwen3.5-2B", 1_881_825_088, 2048, 24, 8, 2, 6144, 16, True),
            ("qwen3.5-4b", "Qwen/Qwen3.5-4B", 4_205_751_296, 2560, 32, 16, 4, 9216, 32, True),
            ("qwen3.5-9b", "Qwen/Qwen3.5-9B", 8_953_803_264, 4096, 32, 16, 4, 12_288, 32, False),
            ("qwen3.5-27b", "Qwen/Qwen3.5-27B", 26_895_998_464, 5120, 64, 24, 4, 17_408, 48, False),
            make=qwen3_next_config,
            eos=EOS_TOKEN_IDS,
            notes=MULTIMODAL,
        ),
        Preset("qwen3.5-35b-a3b", MOE_35B, 34_660_610_688, MOE_ID, MULTIMODAL, EOS_TOKEN_IDS),
        Preset("qwen3-next-tiny", NEXT_TINY),
        Preset("qwen3.5-tiny", DENSE_TINY),
    ),
)
