"""Exercises of the book: `quest learn NAME` writes a stub into the reader's folder, `quest learn check NAME` runs what
the reader wrote and names the typical mistake that computes the same."""

from __future__ import annotations

from book.exercises import inference, layers, reading, training
from book.exercises.exercise import Exercise

EXERCISES: dict[str, Exercise] = {
    one.name: one for one in (*layers.EXERCISES, *training.EXERCISES, *inference.EXERCISES, *reading.EXERCISES)
}

PRACTICED = {
    "softmax": ("layer/scaled_dot_product",), "causal_mask": ("layer/scaled_dot_product",),
    "attention": ("layer/scaled_dot_product", "layer/attention"), "repeat_keys": ("layer/attention", "family/llama"),
    "cached_step": ("layer/kv_cache", "layer/slot_index"), "rms_norm": ("layer/norm", "family/llama"),
    "rotary": ("layer/rotary", "family/llama"), "yarn_frequencies": ("technique/length", "layer/rotary", "paper/yarn"),
    "swiglu": ("layer/feed_forward", "paper/swiglu"), "router": ("layer/moe", "family/mixtral", "paper/experts"),
    "balance_loss": ("objective/routing", "layer/moe", "paper/pooled_balance"),
    "delta_rule": ("layer/delta_rule", "layer/delta_net", "family/qwen3_next", "paper/gated_deltanet"),
    "absorbed_scores": ("layer/latent_attention", "family/deepseek_v2", "family/deepseek_v3", "paper/mla"),
    "lookahead_loss": ("layer/multi_token_prediction", "technique/multi_token", "paper/multi_token"),
    "cross_entropy": ("objective/cross_entropy",), "next_token_loss": ("objective/next_token", "recipe/pretrain"),
    "step_loss": ("recipe/pretrain", "recipe/sft"), "rows_of_step": ("recipe/pretrain",),
    "learning_rate": ("recipe/pretrain", "paper/wsd", "paper/to_zero"),
    "merge_lora": ("technique/lora", "layer/low_rank", "paper/lora"),
    "dpo_loss": ("objective/preference_losses", "objective/preference", "recipe/dpo"),
    "reward_loss": ("objective/reward_model", "recipe/reward"),
    "group_advantages": ("objective/policy_gradient", "recipe/grpo", "paper/dr_grpo"),
    "clipped_surrogate": ("objective/surrogates", "recipe/grpo", "paper/gspo"),
    "kl_estimate": ("objective/kl_penalty", "paper/kl_penalty"),
    "gae": ("objective/value_loss", "technique/value_head", "paper/ppo"),
    "top_p": ("generation/sampling",), "residual": ("generation/rejection_sampler", "generation/decoder"),
    "accepted": ("generation/rejection_sampler", "generation/target_model"),
    "capped_weights": ("family/gemma", "technique/softcap", "layer/scaled_dot_product"),
    "patches": ("layer/vision", "family/vit"), "clip_loss": ("family/clip_model", "family/clip"),
    "prefix_match": ("recipe/rpt", "paper/rpt"),
}  # fmt: skip
"""Exercise -> the pages that it is about, beside its chapter."""
