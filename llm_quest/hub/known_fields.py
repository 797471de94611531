"""The allow-list of fields of config.json.

A field is known if the family reads it, now or in the absence of another one, or if a table below says that it changes
nothing of what is computed. Any other field may change the computation, and stops loading by its name: transformers'
`use_bidirectional_attention`, unread, would give a wrong model without a word."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from typing import Any

from llm_quest.errors import DataError
from llm_quest.models.config_fields import MAX_PLAUSIBLE_INT
from llm_quest.models.family import Family
from llm_quest.models.rope_config import ROPE_KEYS

BOOKKEEPING = frozenset((
    *("architectures", "auto_map", "dtype", "id2label", "label2id", "model_type", "num_labels", "problem_type"),
    *("quantization_config", "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version"),
    *("finetuning_task", "initializer_range", "initializer_factor", "use_cache", "use_return_dict", "is_decoder"),
    *("return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores"),
    *("output_router_logits", "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward"),
    *("pretraining_tp", "attn_implementation", "cache_implementation", "llm_quest", "prefix", "ignore_index"),
    *("keys_to_ignore_at_inference", "model_max_length", "is_llama_config", "transformers.js_config"),
    *("is_matryoshka", "matryoshka_dimensions"),
))  # fmt: skip
"""What concerns files, memory, training code and returned values."""
GENERATION = frozenset((
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
    *("length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
    *("num_return_sequences", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
))  # fmt: skip
"""Settings of sampling that older transformers wrote into config.json."""
TRAINING = frozenset((
    *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "dropout"),
    *("dropout_rate", "embd_pdrop", "embedding_dropout", "hidden_dropout", "hidden_dropout_prob", "residual_dropout"),
    *("resid_pdrop", "resid_dropout", "summary_first_dropout", "router_jitter_noise", "aux_loss_alpha", "seq_aux"),
    *("router_aux_loss_coef", "router_z_loss_coef", "ep_size", "gradient_checkpointing", "layerdrop"),
))  # fmt: skip
"""What acts in training alone: dropouts, losses of routers. Those that a family computes it reads."""
OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "layer_replication": (None,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "rotary_scaling_factor": (1.0,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
    "mimo.topk_method": ("noaux_tc",),
    "phi3.full_attn_mod": (1,),
    "phi3.interpolate_factor": (1,),
    "phi3.lm_head_bias": (False,),
    "starcoder2.mlp_type": ("default",),
    "starcoder2.norm_type": ("layer_norm",),
}
"""Fields that are known under these values, with which they change nothing; some of one family."""
OF_FAMILY: dict[str, frozenset[str]] = {
    "gpt2": frozenset((
        *("summary_activation", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
        *("reorder_and_upcast_attn", "n_ctx", "gradient_checkpointing"),
    )),
    "gemma": frozenset(("sliding_window_size", "sliding_window_pattern", "_sliding_window_pattern", "hidden_act")),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), frozenset(("head_dim", "qk_head_dim", "num_key_value_heads"))),
    "qwen3_next": frozenset((
        *("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "full_attention_interval"),
    )),
    "mimo": frozenset(("attention_chunk_size", "sliding_window")),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "smollm3"), frozenset(("max_window_layers", "sliding_window"))),
    "gpt_neox": frozenset(("num_key_value_heads",)),
    "gpt_oss": frozenset(("experts_per_token", "initial_context_length")),
    "gemma1": frozenset(("hidden_activation",)),
    "phi3": frozenset(("full_attn_mod", "interpolate_factor", "lm_head_bias")),
    "starcoder2": frozenset((
        *("activation_function", "attention_softmax_in_fp32", "layer_norm_epsilon", "mlp_type", "norm_type"),
        *("scale_attention_softmax_in_fp32", "scale_attn_weights"),
    )),
    "cohere2": frozenset((
        *("head_dim", "layer_switch", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct"),
        *("use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding"),
        "use_qk_norm",
    )),
    "ministral": frozenset(("llama_4_scaling_beta", "max_position_embeddings")),
    "vit": frozenset(("encoder_stride", "pooler_output_size", "pooler_act")),
    "clip": frozenset(("projection_dim", "vocab_size", "text_config", "vision_config")),
    "clip_text": frozenset(("projection_dim",)),
    "clip_model": frozenset(("logit_scale_init_value",)),
    "vision_language": frozenset(("image_seq_length", "vocab_size")),
}  # fmt: skip
"""Fields of one family that follow from others, or belong to parts that are not computed here."""
HARMLESS_NAMES = re.compile(
    r".*_token_(id|ids|index)|.*seed|(n|num|total)_(params|parameters|tokens|examples|epochs|steps).*|tokens_seen"
    r"|.*(version|date|commit|author|license|licence|description|comment|url|path|name|hash)|_attn_implementation.*"
    r"|(unsloth|wandb|train|training|trainer|optimizer|dataset|eval|learning_rate|warmup)_.*|learning_rate|epochs?"
)
"""Names of ids, of training settings and of files."""
KNOWN_ROPE_KEYS = frozenset((
    *ROPE_KEYS, "type", "mrope_section", "mrope_interleaved", "finetuned", "full_attention", "sliding_attention",
))  # fmt: skip
"""Keys of rope_parameters and rope_scaling. (For text the sections of mrope hold one position.)"""
PARTIAL = "partial_rotary_factor"
ROPE_FIELDS = ("rope_parameters", "rope_scaling")


class FieldTracker(dict[str, Any]):
    """config.json that remembers which fields were read, and which last, so that every missing field can be found, not
    only the first (`model_type` is only read by the error message itself)."""

    def __init__(self, hf_config: Mapping[str, Any]):
        super().__init__(hf_config)
        self.last, self.seen = "", set[str]()

    def get(self, field: str, default: Any = None) -> Any:
        self.last = self.last if field == "model_type" else field
        self.seen.add(field)
        return super().get(field, default)

    def __getitem__(self, field: str) -> Any:
        self.seen.add(field)
        return super().__getitem__(field)

    def __contains__(self, field: object) -> bool:
        self.seen.add(str(field))
        return super().__contains__(field)


def fields_read(family: Family, hf_config: Mapping[str, Any]) -> set[str]:
    """The fields that reading this config.json looks at."""
    tracker = FieldTracker(hf_config)
    with suppress(DataError, ValueError, TypeError, AttributeError, ArithmeticError):
        family.read(tracker)  # problems are reported where it is read
    return tracker.seen


def known_fields(family: Family, hf_config: Mapping[str, Any], wanted: Set[str] | None = None) -> set[str]:
    """The fields that the family reads, now or in the absence of another one. Each absence is another reading: there
    are no more of them than it takes to find all of `wanted`."""
    known = fields_read(family, hf_config)
    known |= {"rope_theta"} if known & {*ROPE_FIELDS} else set()  # which yields to rope_parameters
    for absent in sorted(known & hf_config.keys()):
        if wanted is not None and wanted <= known:
            break
        known |= fields_read(family, {name: value for name, value in hf_config.items() if name != absent})
    return known


def is_harmless(family: Family, name: str, value: Any) -> bool:
    """Whether a field that is not read changes nothing of what is computed. A number larger than any size is a count,
    such as of parameters."""
    return (
        value in (None, "", [], {})
        or name in BOOKKEEPING | GENERATION | TRAINING | OF_FAMILY.get(family.name, frozenset())
        or value in (*OFF.get(name, ()), *OFF.get(f"{family.name}.{name}", ()))
        or HARMLESS_NAMES.fullmatch(name) is not None
        or (type(value) is int and abs(value) > MAX_PLAUSIBLE_INT)
        or (name == "layer_types" and set(value) == {"full_attention"})
    )


def unknown_fields(family: Family, hf_config: Mapping[str, Any], config: Any = None) -> dict[str, Any]:
    """The unknown fields with their values; those of rotary positions by their path. config: the parsed one; a field
    that agrees with it (the bias that a family always has) is known."""
    unread = {name: value for name, value in hf_config.items() if not is_harmless(family, name, value)}
    unread = {name: value for name, value in unread.items() if name not in ROPE_FIELDS}
    unread = {name: value for name, value in unread.items() if not matches_config(config, name, value)}
    rope = {path: (key, value) for path, key, value in rope_parameter_items(hf_config) if value is not None}
    asks = any(key == PARTIAL and value != 1 for key, value in rope.values())
    known = known_fields(family, hf_config, {*unread, *([PARTIAL] if asks else [])}) if unread or asks else set()
    unknown = {name: value for name, value in unread.items() if name not in known}
    keys = KNOWN_ROPE_KEYS | OF_FAMILY.get(family.name, frozenset())
    keys -= {PARTIAL} if asks and not known & {PARTIAL, "rotary_pct"} else set()
    return unknown | {path: value for path, (key, value) in rope.items() if key not in keys}


def matches_config(config: Any, name: str, value: Any) -> bool:
    has = getattr(config, name, None)
    return has is not None and type(has) is type(value) and has == value


def rope_parameter_items(hf_config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything in rope_parameters and rope_scaling, of each kind of layer."""
    for field in ROPE_FIELDS:
        rope = hf_config.get(field)
        parts = {field: rope} if isinstance(rope, Mapping) else {}
        parts |= {f"{field}.{kind}": part for kind, part in (rope or {}).items() if isinstance(part, Mapping)}
        for path, part in parts.items():
            yield from ((f"{path}.{key}", key, value) for key, value in part.items())


def refuse_unknown_fields(family: Family, hf_config: Mapping[str, Any], config: Any = None) -> list[str]:
    """A problem that lists the unknown fields, in a list; empty without any."""
    unknown = unknown_fields(family, hf_config, config)
    if not unknown:
        return []
    listed = ", ".join(f"{name} ({str(value)[:40]})" for name, value in sorted(unknown.items()))
    return [
        f"config.json: {listed}: not known to {family.name} here, and may change what is computed; where it does not, "
        "delete it there"
    ]
