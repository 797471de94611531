"""The families that llama.cpp knows: a `Layout` for each model_type, with what is particular to it."""

from __future__ import annotations

from typing import Any

from llm_quest.hub.gguf import boolean, float32
from llm_quest.hub.gguf_layouts import (
    ALL_SPARSE,
    COUNTS,
    EXPERT_WIDTH,
    HEADS,
    LAYER_NORM,
    LISTED,
    NORM,
    PLAIN,
    RMS,
    SHARED_WIDTH,
    WIDTH,
    Key,
    Layout,
    moe_keys,
)
from llm_quest.hub.gguf_particulars import (
    CAPS,
    FINAL_CAP,
    GROUPS,
    LATENT,
    MIMO,
    SIGMOID,
    SOFTMAX,
    delta_back,
    delta_check,
    equal_heads_check,
    every_fourth_unrotated,
    exact_gelu_note,
    exaone_check,
    gemma_back,
    gemma_check,
    has_window,
    is_dense,
    is_sparse,
    latent_back,
    latent_check,
    latent_more,
    latent_notes,
    mimo_back,
    mimo_more,
    mtp_notes,
    value_heads,
    window_check,
)

QKV_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
LLAMA_BIASES = QKV_BIAS | {"mlp_bias": "blk.0.ffn_gate.bias"}
FUSED_MLP = {"feed_forward.layer.gate_up": "ffn_up"}
FUSED = {"mixer.layer.qkv": "attn_qkv"} | FUSED_MLP
POST_ATTENTION = {"feed_forward.norm": "post_attention_norm"}
TIED, UNTIED = ({"tie_word_embeddings": tied} for tied in (True, False))
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
WINDOW = {"attention.sliding_window": Key("sliding_window")}
PARALLEL = {"use_parallel_residual": Key("use_parallel_residual", boolean)}

DELTA: dict[str, Any] = {"more": value_heads, "back": delta_back, "check": delta_check, "names": POST_ATTENTION}
DELTA_MOE = COUNTS | HEADS | RMS | moe_keys() | EXPERT_WIDTH | SHARED_WIDTH


LAYOUTS: tuple[Layout, ...] = (
    Layout("llama", "llama", flags=LLAMA_BIASES, rope=NORM, rope_factors=True, longrope=True, matches=is_dense),
    Layout("llama", "mistral", rope=NORM, rope_factors=True, fixed=NO_BIAS, reads=False),
    Layout("llama", "ministral", flags=LLAMA_BIASES, rope=NORM, rope_factors=True, reads=False),
    Layout(
        "mistral3", "ministral3", flags=LLAMA_BIASES, rope=NORM,
        more=lambda config: {"attention.temperature_scale": float32(config.llama_4_scaling_beta or 0.0)},
    ),
    Layout("llama", "helium", rope=NORM, rope_factors=True, flags=LLAMA_BIASES, reads=False),
    Layout(
        "llama", "mixtral", PLAIN | moe_keys("num_local_experts", "num_experts_per_tok"), rope=NORM, rope_factors=True,
        matches=is_sparse,
    ),
    Layout("qwen2", "qwen2", square=True, fixed={"attention_bias": True, "mlp_bias": False}),
    Layout("qwen3", "qwen3", fixed={"attention_bias": False}),
    Layout(
        "qwen3moe", "qwen3_moe", PLAIN | moe_keys() | EXPERT_WIDTH,
        fixed=ALL_SPARSE | {"moe.norm_topk_prob": True, "attention_bias": False},
    ),
    Layout(
        "qwen2moe", "qwen2_moe", PLAIN | moe_keys() | EXPERT_WIDTH | SHARED_WIDTH, square=True,
        fixed=ALL_SPARSE | {"moe.norm_topk_prob": False, "attention_bias": True, "mlp_bias": False},
    ),
    Layout("gemma", "gemma", fixed=TIED | NO_BIAS),
    Layout(
        "gemma2", "gemma2", PLAIN | CAPS | WINDOW, fixed=TIED,
        window_period=2, check=gemma_check(46), back=gemma_back(46),
    ),
    Layout(
        "gemma3", "gemma3_text", PLAIN | WINDOW | FINAL_CAP,
        fixed=TIED | {"attn_logit_softcapping": None}, window_period=6, check=gemma_check(62), back=gemma_back(62),
    ),
    Layout(
        "gpt2", "gpt2", COUNTS | WIDTH | {"attention.layer_norm_epsilon": Key("layer_norm_eps", float32)}, rope="",
        names={"mixer.layer.qkv": "attn_qkv"},
        back=lambda file: dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    Layout(
        "gptneox", "gpt_neox",
        COUNTS | WIDTH | LAYER_NORM | PARALLEL,
        fixed=UNTIED | {"attention_bias": True}, names={"mixer.layer.qkv": "attn_qkv"},
        notes=exact_gelu_note,
    ),
    Layout("phi3", "phi3", square=True, names=FUSED, longrope=True),
    Layout(
        "stablelm", "stablelm",
        COUNTS | HEADS | WIDTH | LAYER_NORM | PARALLEL,
        flags=QKV_BIAS | {"qk_layernorm": "blk.0.attn_q_norm.weight"}, fixed=UNTIED | {"mlp_bias": False},
    ),
    Layout(
        "starcoder2", "starcoder2", COUNTS | HEADS | WIDTH | LAYER_NORM, fixed={"attention_bias": True}, square=True
    ),
    Layout(
        "smollm3", "smollm3", rope=NORM, flags=LLAMA_BIASES, check=every_fourth_unrotated,
        back=lambda file: {"no_rope_layer_interval": 4},
    ),
    Layout(
        "granite", "granite",
        PLAIN | {
            "embedding_scale": Key("embedding_multiplier", float32),
            "residual_scale": Key("residual_multiplier", float32),
            "attention.scale": Key("attention_multiplier", float32),
            "logit_scale": Key("logits_scaling", float32),
        },
        rope=NORM, rope_factors=True, flags=LLAMA_BIASES,
    ),
    Layout(
        "cohere2", "cohere2",
        COUNTS | HEADS | WIDTH | LAYER_NORM | WINDOW | {"logit_scale": Key("logit_scale", float32)},
        fixed=TIED | {"attention_bias": False}, rope=NORM, square=True, window_period=4, check=window_check,
    ),
    Layout("glm4", "glm4", flags=QKV_BIAS, rope=NORM, names=FUSED_MLP, fixed={"mlp_bias": False}),
    Layout("chatglm", "glm", square=True, flags=QKV_BIAS, rope=NORM, names=FUSED_MLP, fixed={"mlp_bias": False}),
    Layout(
        "seed_oss", "seed_oss", flags=QKV_BIAS, names=POST_ATTENTION,
        fixed={"attention_out_bias": False, "mlp_bias": False},
    ),
    Layout("olmo2", "olmo2", square=True, fixed={"attention_bias": False}, matches=lambda file: not has_window(file)),
    Layout(
        "olmo2", "olmo3", PLAIN | WINDOW, fixed={"attention_bias": False},
        square=True, window_period=4, matches=has_window,
    ),
    Layout(
        "exaone4", "exaone4", PLAIN | WINDOW, rope_factors=True,
        square=True, window_period=4, check=exaone_check,
    ),
    Layout(
        "olmoe", "olmoe", PLAIN | moe_keys("num_experts", "num_experts_per_tok"), square=True,
        fixed={"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False}, check=equal_heads_check,
    ),
    Layout(
        "gpt-oss", "gpt_oss",
        PLAIN | moe_keys("num_local_experts", "num_experts_per_tok") | WINDOW | {
            "expert_feed_forward_length": Key("intermediate_size"),
        },
        fixed=UNTIED | {"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        names=POST_ATTENTION, window_period=2,
    ),
    Layout(
        "deepseek2", "deepseek_v3", LATENT | GROUPS, rope=NORM, fixed=UNTIED | {"attention_bias": False},
        check=latent_check, more=latent_more, back=latent_back, notes=latent_notes,
        matches=lambda file: file.get("deepseek2.expert_gating_func", SOFTMAX) == SIGMOID,
    ),
    Layout(
        "deepseek2", "deepseek_v2", LATENT, rope=NORM, fixed=UNTIED | {"attention_bias": False},
        check=latent_check, more=latent_more, back=latent_back, notes=latent_notes,
        matches=lambda file: file.get("deepseek2.expert_gating_func", SOFTMAX) == SOFTMAX,
    ),
    Layout(
        "mimo2", "mimo_v2_flash", MIMO, fixed={"norm_topk_prob": True, "tie_word_embeddings": False},
        window_period=LISTED, more=mimo_more, back=mimo_back, notes=mtp_notes,
    ),
    Layout("qwen3next", "qwen3_next", DELTA_MOE, fixed={"moe.norm_topk_prob": True}, **DELTA),
    Layout("qwen35", "qwen3_5_text", PLAIN, **DELTA),
    Layout("qwen35moe", "qwen3_5_moe_text", DELTA_MOE, fixed={"moe.norm_topk_prob": True}, **DELTA),
)  # fmt: skip
"""Of architectures that several layouts write, the one whose `matches` is true reads a file."""
BY_MODEL_TYPE = {layout.model_type: layout for layout in LAYOUTS}
