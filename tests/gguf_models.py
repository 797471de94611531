"""A small model of every family that a GGUF file can hold: the `-tiny` presets, changed where llama.cpp computes one
value alone, and with forms of rotation and windows that they lack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from llm_quest.layers.rotary import LinearScaling, LongRoPEScaling, NTKScaling, RotaryEmbedding, YaRNScaling
from llm_quest.models.build import preset
from llm_quest.models.windows import FULL, layer_pattern

replace: Callable[..., Any] = dataclasses.replace
VOCAB = 320


def tiny(name: str, **changes: Any) -> Any:
    return replace(preset(f"{name}-tiny").config, **{"vocab_size": VOCAB, **changes})


def tiny_with_windows(name: str, layers: int, period: int, **changes: Any) -> Any:
    return tiny(name, num_hidden_layers=layers, layer_types=layer_pattern(layers, period), **changes)


def tiny_with_experts(name: str, **changes: Any) -> Any:
    moe = replace(tiny(name).moe, mlp_only_layers=(), **changes)
    return tiny(name, moe=moe)


def delta(name: str) -> Any:
    config = tiny(name)
    net = replace(config.delta_net, linear_key_head_dim=16, linear_value_head_dim=16)
    return replace(config, delta_net=net)


def delta_moe() -> Any:
    """Qwen3.5 with experts."""
    return replace(delta("qwen3.5"), moe=tiny("qwen3-next").moe, tie_word_embeddings=False)


def tiny_with_rope(scaling: Any, name: str = "llama3.2") -> Any:
    return tiny(name, rotary=RotaryEmbedding(16, 10_000.0, scaling))


def glm() -> Any:
    """The first GLM-4, without norms behind the layers."""
    return tiny("glm4", use_post_norms=False, hidden_size=64)


def gpt_oss() -> Any:
    """llama.cpp rounds the ends of YaRN's ramp and limits the gate at 7."""
    rotary = tiny("gpt-oss").rotary
    rotary = replace(rotary, scaling=replace(rotary.scaling, truncate=True))
    return tiny_with_windows("gpt-oss", 4, 2, swiglu_limit=7.0, rotary=rotary)


def exaone_windowed() -> Any:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_with_windows("exaone4", 64, 4, **sizes)


def phi3(original: int) -> Any:
    long = replace(tiny("phi3").rotary.scaling, original_max_position_embeddings=original)
    rotary = replace(tiny("phi3").rotary, scaling=long)
    return tiny("phi3", sliding_window=None, rotary=rotary, original_max_position_embeddings=original)


LONG = LongRoPEScaling(4.0, 512, tuple(1 + n / 9 for n in range(8)), tuple(1 + n for n in range(8)))
GGUF_MODELS: dict[str, Callable[[], Any]] = {
    "llama, llama3": lambda: tiny("llama3.2"),
    "llama, linear": lambda: tiny_with_rope(LinearScaling(4.0)),
    "llama, yarn": lambda: tiny_with_rope(YaRNScaling(4.0, 16)),
    "llama, ntk": lambda: tiny_with_rope(NTKScaling(4.0)),
    "llama, longrope": lambda: tiny_with_rope(LONG),
    "llama, biases": lambda: tiny("llama3.2", attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mistral": lambda: tiny("mistral", sliding_window=None),
    "ministral3": lambda: tiny("ministral"),
    "helium": lambda: tiny("helium"),
    "mixtral": lambda: tiny("mixtral"),
    "gpt2": lambda: tiny("gpt2"),
    "gpt2, untied": lambda: tiny("gpt2", tie_word_embeddings=False),
    "gpt_neox": lambda: tiny("pythia"),
    "gpt_neox, in sequence": lambda: tiny("pythia", use_parallel_residual=False),
    "qwen2": lambda: tiny("qwen2", use_sliding_window=False, sliding_window=None, layer_types=(FULL, FULL)),
    "qwen2_moe": lambda: replace(tiny_with_experts("qwen2-moe"), sliding_window=None, layer_types=(FULL,) * 3),
    "qwen3": lambda: tiny("qwen3"),
    "qwen3_moe": lambda: tiny_with_experts("qwen3-moe"),
    "phi3": lambda: phi3(512),
    "stablelm": lambda: tiny("stablelm"),
    "stablelm2": lambda: tiny("stablelm2"),
    "starcoder2": lambda: tiny("starcoder2", sliding_window=None),
    "smollm3": lambda: tiny(
        "smollm3", num_hidden_layers=8, no_rope_layers=(1, 1, 1, 0) * 2, layer_types=(FULL,) * 8, sliding_window=None,
        use_sliding_window=False,
    ),
    "granite": lambda: tiny("granite"),
    "cohere2": lambda: tiny_with_windows("cohere2", 5, 4),
    "glm4": lambda: tiny("glm4"),
    "glm": glm,
    "seed_oss": lambda: tiny("seed-oss"),
    "olmo2": lambda: tiny("olmo2"),
    "olmo3": lambda: tiny_with_windows("olmo3", 5, 4),
    "olmoe": lambda: tiny("olmoe", clip_qkv=None, num_key_value_heads=4),
    "exaone4": lambda: tiny("exaone4", sliding_window=None, layer_types=(FULL,) * 3),
    "exaone4, windows": exaone_windowed,
    "gemma": lambda: tiny("gemma1"),
    "gemma2": lambda: tiny_with_windows("gemma2", 4, 2, query_pre_attn_scalar=16),
    "gemma3": lambda: tiny_with_windows("gemma3", 4, 3, query_pre_attn_scalar=16),
    "gpt_oss": gpt_oss,
    "deepseek_v2": lambda: tiny("deepseek-v2", topk_method="greedy", n_group=1, topk_group=1),
    "deepseek_v2, lite": lambda: tiny(
        "deepseek-v2", topk_method="greedy", n_group=1, topk_group=1, q_lora_rank=None, num_hidden_layers=27,
        n_routed_experts=4, num_experts_per_tok=2,
    ),
    "deepseek_v3": lambda: tiny("deepseek-v3"),
    "mimo": lambda: tiny("mimo"),
    "qwen3_next": lambda: delta("qwen3-next"),
    "qwen3_5": lambda: delta("qwen3.5"),
    "qwen3_5_moe": delta_moe,
}  # fmt: skip
