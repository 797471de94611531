"""Tiny random transformers models of the families beyond GPT-2 and Llama: name -> how to build it. Every tensor is
randomized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.oracles import randomize_, transformers

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "rope_parameters": YARN,
}
DEEPSEEK_V2 = DEEPSEEK | {
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 2.5,
    "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
GPT_OSS = {
    "num_hidden_layers": 3,
    "head_dim": 24,
    "sliding_window": 5,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "intermediate_size": 48,
    "swiglu_limit": 1.0,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False}
    | {"original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0},
}
DELTA = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LONGROPE = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0]}
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.15,
    "logits_scaling": 2.0,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]}


def oracle_builder(model: str, config: str, **numbers: Any) -> Callable[[], Any]:
    """A builder; experts run as a plain loop, which is the definition. Its `architecture` is the class that it builds,
    its `family` the class of that one's config."""

    def build() -> Any:
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**(SMALL | numbers))
        oracle = randomize_(getattr(transformers, model)(settings))
        remember_longer_(oracle)
        if "experts" in str(oracle):
            oracle.set_experts_implementation("eager")
        return oracle

    build.architecture = model  # type: ignore[attr-defined]
    build.family = config  # type: ignore[attr-defined]
    return build


def remember_longer_(oracle: torch.nn.Module) -> None:
    """DeltaNet heads that forget at once (A_log up to ln 16) give outputs near 0, whose norm magnifies rounding a
    thousandfold: decays of ordinary size instead, still random."""
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.5 - 1)


ORACLES: dict[str, Callable[[], Any]] = {
    "gemma2": oracle_builder(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=5,
        num_hidden_layers=3,
    ),
    "gemma2, low caps": oracle_builder(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
    ),
    "gemma3": oracle_builder(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        num_hidden_layers=3,
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "gemma3, linear": oracle_builder(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        num_hidden_layers=3,
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mistral": oracle_builder("MistralForCausalLM", "MistralConfig", sliding_window=5),
    "mistral, no window": oracle_builder("MistralForCausalLM", "MistralConfig", sliding_window=None, head_dim=24),
    "qwen2": oracle_builder("Qwen2ForCausalLM", "Qwen2Config", tie_word_embeddings=True),
    "qwen2, windows": oracle_builder(
        "Qwen2ForCausalLM", "Qwen2Config", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "smollm3": oracle_builder("SmolLM3ForCausalLM", "SmolLM3Config", num_hidden_layers=4),
    "smollm3, windows": oracle_builder(
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        num_hidden_layers=4,
        no_rope_layers=[0, 1, 1, 0],
        use_sliding_window=True,
        sliding_window=5,
    ),
    "phi3": oracle_builder("Phi3ForCausalLM", "Phi3Config", sliding_window=5),
    "phi3, longrope, part of a head": oracle_builder(
        "Phi3ForCausalLM",
        "Phi3Config",
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75} | LONGROPE,
    ),
    "granite": oracle_builder("GraniteForCausalLM", "GraniteConfig", tie_word_embeddings=True, **MULTIPLIERS),
    "granite, biases": oracle_builder(
        "GraniteForCausalLM", "GraniteConfig", attention_bias=True, mlp_bias=True, **MULTIPLIERS
    ),
    "gpt_neox": oracle_builder("GPTNeoXForCausalLM", "GPTNeoXConfig", num_attention_heads=2),
    "gpt_neox, in sequence, no biases": oracle_builder(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        num_attention_heads=2,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
    ),
    "stablelm": oracle_builder("StableLmForCausalLM", "StableLmConfig", use_qkv_bias=True, num_attention_heads=2),
    "stablelm, parallel": oracle_builder(
        "StableLmForCausalLM",
        "StableLmConfig",
        use_parallel_residual=True,
        qk_layernorm=True,
        partial_rotary_factor=0.5,
    ),
    "starcoder2": oracle_builder("Starcoder2ForCausalLM", "Starcoder2Config", sliding_window=5),
    "starcoder2, no biases": oracle_builder(
        "Starcoder2ForCausalLM", "Starcoder2Config", use_bias=False, tie_word_embeddings=False, num_key_value_heads=1
    ),
    "cohere2": oracle_builder(
        "Cohere2ForCausalLM",
        "Cohere2Config",
        num_hidden_layers=3,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        logit_scale=1.0,
    ),
    "cohere2, biases, pattern": oracle_builder(
        "Cohere2ForCausalLM", "Cohere2Config", num_hidden_layers=4, attention_bias=True, logit_scale=2.0
    ),
    "glm4": oracle_builder("Glm4ForCausalLM", "Glm4Config", head_dim=24, attention_bias=False),
    "glm": oracle_builder("GlmForCausalLM", "GlmConfig", head_dim=24),
    "seed_oss": oracle_builder("SeedOssForCausalLM", "SeedOssConfig", head_dim=24, mlp_bias=True),
    "seed_oss, biases on the output alone": oracle_builder(
        "SeedOssForCausalLM", "SeedOssConfig", head_dim=24, attention_bias=False, attention_out_bias=True
    ),
    "helium": oracle_builder(
        "HeliumForCausalLM", "HeliumConfig", head_dim=16, attention_bias=True, num_key_value_heads=4
    ),
    "exaone4": oracle_builder(
        "Exaone4ForCausalLM",
        "Exaone4Config",
        num_hidden_layers=3,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "exaone4, no window": oracle_builder(
        "Exaone4ForCausalLM", "Exaone4Config", sliding_window=None, layer_types=["full_attention"] * 2
    ),
    "ministral": oracle_builder(
        "MinistralForCausalLM",
        "MinistralConfig",
        sliding_window=5,
        head_dim=24,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "ministral3": oracle_builder(
        "Ministral3ForCausalLM",
        "Ministral3Config",
        head_dim=24,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4, "factor": 16.0},
    ),
    "ministral3, window": oracle_builder(
        "Ministral3ForCausalLM",
        "Ministral3Config",
        head_dim=24,
        sliding_window=5,
        rope_parameters=YARN | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8},
    ),
    "olmo3": oracle_builder("Olmo3ForCausalLM", "Olmo3Config", num_hidden_layers=4, sliding_window=5),
    "olmo3, the full layers stretched": oracle_builder(
        "Olmo3ForCausalLM",
        "Olmo3Config",
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": YARN | {"attention_factor": 1.2},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "olmo2": oracle_builder("Olmo2ForCausalLM", "Olmo2Config"),
    "olmo2, biases": oracle_builder("Olmo2ForCausalLM", "Olmo2Config", attention_bias=True, num_key_value_heads=4),
    "gemma": oracle_builder("GemmaForCausalLM", "GemmaConfig", head_dim=24, hidden_act="gelu"),
    "gemma, one key/value head": oracle_builder("GemmaForCausalLM", "GemmaConfig", head_dim=24, num_key_value_heads=1),
    "mixtral": oracle_builder(
        "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=24
    ),
    "mixtral, window": oracle_builder("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, sliding_window=5),
    "olmoe": oracle_builder("OlmoeForCausalLM", "OlmoeConfig", num_experts=8, num_experts_per_tok=3),
    "olmoe, clipped, renormalized": oracle_builder(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        num_experts=8,
        num_experts_per_tok=3,
        num_key_value_heads=4,
        clip_qkv=0.5,
        norm_topk_prob=True,
        attention_bias=True,
    ),
    "qwen2_moe": oracle_builder(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_hidden_layers=3,
        mlp_only_layers=[1],
    ),
    "qwen2_moe, windows, no biases, every second layer sparse": oracle_builder(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    ),
    "gpt_oss": oracle_builder("GptOssForCausalLM", "GptOssConfig", **GPT_OSS),
    "gpt_oss, wide experts": oracle_builder(
        "GptOssForCausalLM", "GptOssConfig", **(GPT_OSS | {"intermediate_size": 32})
    ),
    "gpt_oss, no biases, all full": oracle_builder(
        "GptOssForCausalLM",
        "GptOssConfig",
        **(GPT_OSS | {"attention_bias": False, "layer_types": ["full_attention"] * 3, "swiglu_alpha": 1.1}),
    ),
    "qwen3": oracle_builder("Qwen3ForCausalLM", "Qwen3Config", head_dim=24, tie_word_embeddings=True),
    "qwen3, biases": oracle_builder("Qwen3ForCausalLM", "Qwen3Config", head_dim=24, attention_bias=True),
    "qwen3_moe": oracle_builder(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        head_dim=24,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        num_hidden_layers=3,
        mlp_only_layers=[1],
    ),
    "qwen3_moe, not renormalized": oracle_builder(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        head_dim=24,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=False,
    ),
    "deepseek_v2": oracle_builder("DeepseekV2ForCausalLM", "DeepseekV2Config", **DEEPSEEK_V2),
    "deepseek_v2, greedy, direct queries": oracle_builder(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        **(DEEPSEEK_V2 | {"q_lora_rank": None, "n_group": None, "topk_group": None, "topk_method": "greedy"}),
    ),
    "deepseek_v2, biases, cos and sin scaled": oracle_builder(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        **(DEEPSEEK_V2 | {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 1.5}, "attention_bias": True}),
    ),
    "deepseek_v3": oracle_builder("DeepseekV3ForCausalLM", "DeepseekV3Config", **DEEPSEEK),
    "deepseek_v3, one group, direct queries": oracle_builder(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **(
            DEEPSEEK
            | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": None, "n_shared_experts": 2}
        ),
    ),
    "deepseek_v3, biases": oracle_builder("DeepseekV3ForCausalLM", "DeepseekV3Config", **DEEPSEEK, attention_bias=True),
    "qwen3_next": oracle_builder("Qwen3NextForCausalLM", "Qwen3NextConfig", **DELTA, head_dim=32),
    "qwen3_5_text": oracle_builder(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        **{k: v for k, v in DELTA.items() if "expert" not in k and "moe" not in k},
        head_dim=64,
        rope_parameters=PARTIAL,
    ),
    "qwen3_5_moe_text": oracle_builder(
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", **DELTA, head_dim=64, rope_parameters=PARTIAL
    ),
    "mimo_v2_flash": oracle_builder(
        "MiMoV2FlashForCausalLM",
        "MiMoV2FlashConfig",
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=24,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        sliding_window=5,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
}
