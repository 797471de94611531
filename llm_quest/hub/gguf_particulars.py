"""Special cases of llama.cpp's architectures: further keys, and checks of what they cannot express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_quest.hub.gguf import INT32, UINT32, GGUFFile, Value, array, boolean, float32, uint32
from llm_quest.hub.gguf_layouts import COUNTS, RMS, WIDTH, Key, size_of
from llm_quest.models.windows import FULL, SLIDING


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
    """The number by whose root llama.cpp divides the scores: D / H for the largest model, else the head dimension."""
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
    """A message if the model has windows that llama.cpp computes in the 64-layer model alone."""
    if config.sliding_window is None or config.num_hidden_layers == EXAONE_LAYERS:
        return ""
    return f"sliding_window is {config.sliding_window}, which llama.cpp computes in models of {EXAONE_LAYERS} layers; "


def softmax_group_check(config: Any) -> str:
    return "" if config.topk_method == "greedy" or config.n_group == 1 else (
        "topk_method is 'group_limited_greedy', a group's worth its best expert; llama.cpp adds up the best two; "
    )  # fmt: skip


def latent_check(config: Any) -> str:
    """A message if a DeepSeek model is not what llama.cpp computes; empty if it is."""
    if config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        return "q_lora_rank is None, which llama.cpp reads in models of 26 or 27 layers alone; "
    if not config.rotary.interleaved:
        return "rope_interleave is false; "
    return softmax_group_check(config) if config.scoring_func == "softmax" else ""


SOFTMAX, SIGMOID = 1, 2


def latent_more(config: Any) -> Mapping[str, Value]:
    width, rope = config.kv_lora_rank, config.qk_rope_head_dim
    keys = {
        "attention.head_count_kv": uint32(1),
        "attention.key_length": uint32(width + rope),
        "attention.value_length": uint32(width),
        "attention.key_length_mla": uint32(config.qk_nope_head_dim + rope),
        "expert_gating_func": uint32(SOFTMAX if config.scoring_func == "softmax" else SIGMOID),
    }
    return keys | ({} if config.q_lora_rank is None else {"attention.q_lora_rank": uint32(config.q_lora_rank)})


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
    """The keys of Qwen3-Next's DeltaNet."""
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
    """The period p such that every p-th layer is attention and no other; 0 if there is no such p."""
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
    by_kind = dict(zip(map(bool, windowed), (count if type(count) is int else None for count in counts), strict=True))
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
