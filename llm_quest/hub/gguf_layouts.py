"""`Layout`: names and fixed properties of a model family in llama.cpp (`gguf_families.py` lists them).

A layout is read in both directions, for writing a file and for reading one. A model that llama.cpp would compute
otherwise is refused by the field's name (`gguf_config.py`).

Commonly got wrong: a window on the architecture `llama` loads without an error and is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_quest.hub.gguf import GGUFFile, Value, float32, uint32

NORM, NEOX = "norm", "neox"
"""Which numbers of a head are rotated together: neighbors (2i, 2i+1), or halves (i, i + w/2)."""


LISTED = -1
"""As a window_period: the file lists for every layer whether it has a window."""


class Key(NamedTuple):
    """A field of the Config (a dotted path) and its type in the file."""

    field: str
    make: Callable[[Any], Value] = uint32


COUNTS = {
    "context_length": Key("max_position_embeddings"),
    "embedding_length": Key("hidden_size"),
    "block_count": Key("num_hidden_layers"),
    "attention.head_count": Key("num_attention_heads"),
    "vocab_size": Key("vocab_size"),
}
HEADS = {
    "attention.head_count_kv": Key("num_key_value_heads"),
    "attention.key_length": Key("head_dim"),
    "attention.value_length": Key("head_dim"),
}
WIDTH = {"feed_forward_length": Key("intermediate_size")}
RMS = {"attention.layer_norm_rms_epsilon": Key("rms_norm_eps", float32)}
LAYER_NORM = {"attention.layer_norm_epsilon": Key("rms_norm_eps", float32)}
PLAIN = COUNTS | HEADS | WIDTH | RMS


def moe_keys(experts: str = "moe.num_experts", per_token: str = "moe.num_experts_per_tok") -> dict[str, Key]:
    return {"expert_count": Key(experts), "expert_used_count": Key(per_token)}


EXPERT_WIDTH = {"expert_feed_forward_length": Key("moe.moe_intermediate_size")}
SHARED_WIDTH = {"expert_shared_feed_forward_length": Key("moe.shared_expert_intermediate_size")}
ALL_SPARSE = {"moe.mlp_only_layers": (), "moe.decoder_sparse_step": 1}
OPTIONAL = frozenset((
    "vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.freq_base", "attention.sliding_window", "final_logit_softcapping", "use_parallel_residual",
))  # fmt: skip
"""Keys that other writers leave out."""


SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""GenerationConfig's fields -> keys of `general.sampling`."""
MAX_SIZE = 2**24
MAX_HEAD = 2**13


def size_of(file: GGUFFile, key: str) -> int | None:
    """A key of the architecture that counts something; None where it is missing or no plausible size."""
    value = file.get(f"{file.architecture}.{key}")
    return value if type(value) is int and 0 < value < MAX_SIZE else None


@dataclass(frozen=True, eq=False)
class Layout:
    """How llama.cpp stores a model family. architecture: llama.cpp's name. model_type: config.json's. keys: GGUF key ->
    field of our Config, both ways. fixed: fields without a key, with the only value that llama.cpp computes. flags:
    fields that a file shows by a tensor that is there. rope: the order of the rotated pairs; empty: no rotation.
    rope_factors: Llama 3's stretch is known (a divisor for each pair). longrope: two lists of divisors are known.
    window_period: every so many layers have no window, where a file does not say; 0: windows are not computed. square:
    the heads together are as wide as the stream. names: modules with another name than usual. reads: False where
    another layout of the same architecture reads its files; matches(file): which of several does. check(config): why a
    model cannot be expressed, or nothing. more(config): further keys; back(file): the fields that they stand for.
    notes(config): what llama.cpp computes otherwise."""

    architecture: str
    model_type: str
    keys: Mapping[str, Key] = field(default_factory=lambda: PLAIN)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    rope: str = NEOX
    rope_factors: bool = False
    longrope: bool = False
    window_period: int = 0
    square: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    reads: bool = True
    matches: Callable[[GGUFFile], bool] = lambda file: True
    check: Callable[[Any], str] = lambda config: ""
    more: Callable[[Any], Mapping[str, Value]] = lambda config: {}
    back: Callable[[GGUFFile], Mapping[str, Any]] = lambda file: {}
    notes: Callable[[Any], Sequence[str]] = lambda config: ()
