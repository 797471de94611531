"""Tiny random Hugging Face models: perfect oracles, but only after every tensor has been randomized. With the default
first values (norms 1, biases 0) a missing bias, a swapped norm or a `1 + weight` is invisible.

`tiny_llama`, `tiny_gpt2` build one (all tensors already random), `save_published` writes its folder in either
spelling."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from tests.later import Later

transformers = Later("transformers")

ATOL, RTOL = 2e-5, 1e-4  # architectures.md 0.2: tight yet never flaky for attention models in float32

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 32,
    },
}


def randomize_(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every tensor: vectors (norms, biases, sinks, router corrections) get noise of std 0.3 added, matrices become
    N(0, 1/fan_in). In place; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    inward = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}  # stored (in, out)
    corrections = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for tensor in [*model.parameters(), *corrections]:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
            if max(tensor.shape, default=1) == tensor.numel():
                tensor.add_(noise, alpha=0.3)
            else:
                fan_in = tensor.shape[0] if id(tensor) in inward else tensor.shape[-1]
                tensor.copy_(noise * fan_in**-0.5)
    return model.eval()


def tiny_llama(seed: int = 0, *, rope: str = "llama3", **overrides: Any) -> Any:
    """LlamaForCausalLM of 2 layers and 97 tokens; 4 heads of width 24 on a stream of 64, so H d != D. rope: a key of
    ROPES."""
    numbers = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": dict(ROPES[rope]),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    config = transformers.LlamaConfig(**(numbers | overrides))
    return randomize_(transformers.LlamaForCausalLM(config), seed)


def tiny_gpt2(seed: int = 0, **overrides: Any) -> Any:
    """GPT2LMHeadModel of 2 layers, 4 heads, width 64 and 97 tokens, 128 positions, without dropout."""
    numbers = {
        "vocab_size": 97,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    config = transformers.GPT2Config(**(numbers | overrides))
    return randomize_(transformers.GPT2LMHeadModel(config), seed)


def save_published(model: Any, folder: str | Path, *, old_spelling: bool = False, max_shard_size: str = "5GB") -> Path:
    """What `save_pretrained` writes. old_spelling: config.json as transformers 4 wrote it (torch_dtype, rope_theta,
    rope_scaling)."""
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if old_spelling:
        edit_config(folder, spell_old)
    return folder


def edit_config(folder: Path, edit: Any) -> None:
    """Read config.json, let `edit(dict)` change it in place, write it back."""
    file = Path(folder) / "config.json"
    published = json.loads(file.read_text())
    edit(published)
    file.write_text(json.dumps(published, indent=2))


def spell_old(published: dict[str, Any]) -> None:
    if "dtype" in published:
        published["torch_dtype"] = published.pop("dtype")
    rope = published.pop("rope_parameters", None)
    if rope is not None:
        published["rope_theta"] = rope.pop("rope_theta")
        published["rope_scaling"] = None if rope["rope_type"] == "default" else rope


def logits_of(model: Any, tokens: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """(B,T,V), without a cache."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **inputs).logits
