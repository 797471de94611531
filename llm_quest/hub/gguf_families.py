"""The families that llama.cpp knows: a `Layout` for each model_type, with what is particular to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_quest.hub.gguf import INT32, UINT32, GGUFFile, Value, array, boolean, float32, uint32
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
    size_of,
)
from llm_quest.models.windows import FULL, SLIDING

QKV_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
LLAMA_BIASES = QKV_BIAS | {"mlp_bias": "blk.0.ffn_gate.bias"}
FUSED_MLP = {"feed_forward.layer.gate_up": "ffn_up"}
FUSED = {"mixer.layer.qkv": "attn_qkv"} | FUSED_MLP
POST_ATTENTION = {"feed_forward.norm": "post_attention_norm"}
TIED, UNTIED = ({"tie_word_embeddings": tied} for tied in (True, False))
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
WINDOW = {"attention.sliding_window": Key("sliding_window")}
PARALLEL = {"use_parallel_residual": Key("use_parallel_residual", boolean)}


def is_sparse(file: GGUFFile) -> bool:
    return bool(file.get(f"{file.architecture}.expert_count"))


def has_window(file: GGUFFile) -> bool:
    return bool(file.get(f"{file.architecture}.attention.sliding_window"))


def is_dense(file: GGUFFile) -> bool:
    return not is_sparse(file)


def every_fourth_unrotated(config: Any) -> str:
    pattern = tuple(int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers))
    return "" if tuple(config.no_rope_layers) == pattern else f"no_rope_layers is {list(config.no_rope_layers)}; "


def gemma_query_width(layers: int, largest: int, hidden_size: int, heads: int, head_dim: int) -> float:
    """The number whose root divides the scores: of the largest size D / H, of all others the head's width."""
    return hidden_size / heads if layers == largest else head_dim


def gemma_check(largest: int) -> Callable[[Any], str]:
    def check(c: Any) -> str:
        width = gemma_query_width(c.num_hidden_layers, largest, c.hidden_size, c.num_attention_heads, c.head_dim)
        differs = f"query_pre_attn_scalar is {c.query_pre_attn_scalar:g}, llama.cpp divides by {width:g}; "
        return "" if c.query_pre_attn_scalar == width else differs

    return check


def gemma_back(largest: int) -> Callable[[GGUFFile], Mapping[str, Any]]:
    def back(file: GGUFFile) -> Mapping[str, Any]:
        layers, hidden_size, heads, head_dim = (size_of(file, key) or 1 for key in GEMMA_SIZES)
        return {"query_pre_attn_scalar": gemma_query_width(layers, largest, hidden_size, heads, head_dim)}

    return back


GEMMA_SIZES = ("block_count", "embedding_length", "attention.head_count", "attention.key_length")
FINAL_CAP = {"final_logit_softcapping": Key("final_logit_softcapping", float32)}
CAPS = FINAL_CAP | {"attn_logit_softcapping": Key("attn_logit_softcapping", float32)}


def exact_gelu_note(config: Any) -> Sequence[str]:
    return ["llama.cpp computes the exact GELU by its tanh approximation: log-probabilities differ in the third digit"]


def window_check(config: Any) -> str:
    return "" if config.sliding_window else "sliding_window is null; "


def equal_heads_check(config: Any) -> str:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return "" if heads == kv_heads else f"num_key_value_heads is {kv_heads} for {heads} heads, which must be equal; "


EXAONE_LAYERS = 64


def exaone_check(config: Any) -> str:
    """A model with windows has no rotation in the other layers."""
    if config.sliding_window is None or config.num_hidden_layers == EXAONE_LAYERS:
        return ""
    return f"sliding_window is {config.sliding_window}, which llama.cpp computes in models of {EXAONE_LAYERS} layers; "


def softmax_group_check(config: Any) -> str:
    return "" if config.topk_method == "greedy" or config.n_group == 1 else (
        "topk_method is 'group_limited_greedy', a group's worth its best expert; llama.cpp adds up the best two; "
    )  # fmt: skip


def latent_check(config: Any) -> str:
    """What DeepSeek's models need beyond the keys."""
    if config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        return "q_lora_rank is None, which llama.cpp reads in models of 26 or 27 layers alone; "
    if not config.rotary.interleaved:
        return "rope_interleave is false; "
    return softmax_group_check(config) if config.scoring_func == "softmax" else ""


SOFTMAX, SIGMOID = 1, 2


def latent_more(config: Any) -> Mapping[str, Value]:
    width, rope = config.kv_lora_rank, config.qk_rope_head_dim
    found = {
        "attention.head_count_kv": uint32(1),
        "attention.key_length": uint32(width + rope),
        "attention.value_length": uint32(width),
        "attention.key_length_mla": uint32(config.qk_nope_head_dim + rope),
        "expert_gating_func": uint32(SOFTMAX if config.scoring_func == "softmax" else SIGMOID),
    }
    return found | ({} if config.q_lora_rank is None else {"attention.q_lora_rank": uint32(config.q_lora_rank)})


def latent_back(file: GGUFFile) -> Mapping[str, Any]:
    head, rope, rank = (size_of(file, key) for key in LATENT_SIZES)
    sizes = {"qk_rope_head_dim": rope, "qk_nope_head_dim": head and rope and head - rope, "q_lora_rank": rank}
    kind = {"topk_method": "greedy"} if file.get("deepseek2.expert_gating_func", SOFTMAX) == SOFTMAX else {}
    groups = {"n_group": size_of(file, "expert_group_count"), "topk_group": size_of(file, "expert_group_used_count")}
    return sizes | kind | {name: size or 1 for name, size in groups.items()}


LATENT_SIZES = ("attention.key_length_mla", "rope.dimension_count", "attention.q_lora_rank")
LATENT = COUNTS | WIDTH | RMS | {
    "leading_dense_block_count": Key("first_k_dense_replace"),
    "attention.kv_lora_rank": Key("kv_lora_rank"),
    "attention.value_length_mla": Key("v_head_dim"),
    "expert_count": Key("n_routed_experts"),
    "expert_used_count": Key("num_experts_per_tok"),
    "expert_shared_count": Key("n_shared_experts"),
    "expert_feed_forward_length": Key("moe_intermediate_size"),
    "expert_weights_scale": Key("routed_scaling_factor", float32),
    "expert_weights_norm": Key("norm_topk_prob", boolean),
}  # fmt: skip
GROUPS = {"expert_group_count": Key("n_group"), "expert_group_used_count": Key("topk_group")}


def latent_notes(config: Any) -> Sequence[str]:
    notes = list(mtp_notes(config))
    if config.rms_norm_eps != 1e-6:
        notes.append(f"llama.cpp gives the latents' norms the eps {config.rms_norm_eps:g}; they have 1e-06")
    return notes


def value_heads(config: Any) -> Mapping[str, Value]:
    """Qwen3-Next's DeltaNet."""
    net = config.delta_net
    sizes = {
        "ssm.conv_kernel": net.linear_conv_kernel_dim,
        "ssm.state_size": net.linear_key_head_dim,
        "ssm.group_count": net.linear_num_key_heads,
        "ssm.time_step_rank": net.linear_num_value_heads,
        "ssm.inner_size": net.linear_num_value_heads * net.linear_value_head_dim,
        "full_attention_interval": attention_interval(config.layer_types),
    }
    sections = {} if net.interleaved else {"rope.dimension_sections": array(INT32, (*config.mrope_section, 0, 0)[:4])}
    return {key: uint32(size) for key, size in sizes.items()} | sections


def attention_interval(layer_types: Sequence[str]) -> int:
    """Every so many layers attend; 0 where the layers follow no such rule."""
    count = len(layer_types)
    for interval in range(1, count + 2):
        if all((kind == FULL) == ((layer + 1) % interval == 0) for layer, kind in enumerate(layer_types)):
            return interval
    return 0


def delta_check(config: Any) -> str:
    net = config.delta_net
    if not attention_interval(config.layer_types):
        return f"layer_types is {list(config.layer_types)}: not every n-th layer attends; "
    same = net.linear_key_head_dim == net.linear_value_head_dim
    return "" if same else "keys and values of the DeltaNet have heads of unlike width; "


def delta_back(file: GGUFFile) -> Mapping[str, Any]:
    layers, interval = size_of(file, "block_count") or 0, size_of(file, "full_attention_interval") or 4
    heads, inner = size_of(file, "ssm.time_step_rank"), size_of(file, "ssm.inner_size")
    return {
        "linear_conv_kernel_dim": size_of(file, "ssm.conv_kernel"),
        "linear_key_head_dim": size_of(file, "ssm.state_size"),
        "linear_num_key_heads": size_of(file, "ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": heads and inner and inner // heads,
        "layer_types": [FULL if (layer + 1) % interval == 0 else "linear_attention" for layer in range(layers)],
    }


def mimo_more(config: Any) -> Mapping[str, Value]:
    counts = {FULL: config.num_key_value_heads, SLIDING: config.swa_num_key_value_heads}
    return {"attention.head_count_kv": array(UINT32, [counts[kind] for kind in config.layer_types])}


def mimo_back(file: GGUFFile) -> Mapping[str, Any]:
    layers, counts, windowed = (file.get(f"mimo2.{key}") for key in MIMO_LISTS)
    if not all(isinstance(one, list) and len(one) == layers for one in (counts, windowed)):
        return {}
    by_kind = dict(zip(map(bool, windowed), (one if type(one) is int else None for one in counts), strict=True))
    kinds = ("sparse" if f"blk.{layer}.ffn_gate_inp.weight" in file.tensors else "dense" for layer in range(layers))
    return {
        "num_key_value_heads": by_kind.get(False),
        "swa_num_key_value_heads": by_kind.get(True),
        "mlp_layer_types": list(kinds),
    }


MIMO_LISTS = ("block_count", "attention.head_count_kv", "attention.sliding_window_pattern")
MIMO = COUNTS | WIDTH | RMS | {
    "attention.key_length": Key("head_dim"),
    "attention.value_length": Key("v_head_dim"),
    "attention.value_scale": Key("attention_value_scale", float32),
    "attention.sliding_window": Key("sliding_window"),
    "expert_count": Key("n_routed_experts"),
    "expert_used_count": Key("num_experts_per_tok"),
    "expert_feed_forward_length": Key("moe_intermediate_size"),
    "expert_weights_scale": Key("routed_scaling_factor", float32),
}  # fmt: skip
MTP_LEFT_OUT = "the multi-token prediction modules are left out"


def mtp_notes(config: Any) -> Sequence[str]:
    return [MTP_LEFT_OUT] if config.num_nextn_predict_layers else []


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
