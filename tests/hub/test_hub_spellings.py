"""Fields that the hub's config.json files of a family carry and transformers' class does not read: they do not stop
loading."""

from __future__ import annotations

from typing import Any

import pytest

from llm_quest.hub.known_fields import unknown_fields
from llm_quest.models.build import family_of, preset

ON_THE_HUB: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}},
    "gemma-2b": {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu"},
    "phi4": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "embd_pdrop": 0.0},
    "starcoder2-3b": {
        "activation_function": "gelu", "attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-5,
        "mlp_type": "default", "norm_type": "layer_norm", "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True, "residual_dropout": 0.1,
    },
    "command-r7b": {
        "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
        "use_parallel_embedding": True, "sliding_window_pattern": 4, "cache_implementation": "hybrid",
    },
    "smollm3-3b": {"max_window_layers": 28, "no_rope_layer_interval": 4, "pretraining_tp": 2},
    "qwen2.5-7b": {"max_window_layers": 28, "sliding_window": 131_072, "use_sliding_window": False},
    "exaone4-32b": {"sliding_window_pattern": "LLLG"},
    "stablelm-3b": {"rotary_scaling_factor": 1.0, "hidden_dropout": 0.0},
    "pythia-1b": {"rotary_pct": 0.25, "rotary_emb_base": 10_000, "classifier_dropout": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_a_field_of_the_hub_that_changes_nothing_is_known(name: str):
    config = preset(name).config
    family = family_of(config)
    published = family.publish(config) | ON_THE_HUB[name]
    assert unknown_fields(family, published, config) == {}
    assert unknown_fields(family, published | {"novel_attention": 3}, config) == {"novel_attention": 3}
