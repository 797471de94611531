"""Rotary positions in config.json, in both generations: `rope_parameters` (transformers 5), or `rope_theta` and
`rope_scaling` at the top level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from llm_quest.errors import DataError
from llm_quest.layers.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    RopeScaling,
    RotaryEmbedding,
    YaRNScaling,
)

ROPE_KEYS = (
    "rope_theta", "rope_type", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "short_factor", "long_factor",
    "partial_rotary_factor",
)  # fmt: skip
"""What is read of rope_parameters and rope_scaling; the part of a head that is rotated is read by the families."""


def require_field(hf_config: Mapping[str, Any], field: str) -> Any:
    """A field that has no default."""
    if hf_config.get(field) is None:
        raise DataError(f"config.json has no {field!r}, which a {hf_config.get('model_type', 'model')} needs")
    return hf_config[field]


def read_rotary(
    hf_config: Mapping[str, Any], dim: int, default_theta: float = 10000.0, max_position_embeddings: int | None = None
) -> RotaryEmbedding:
    """Both generations: `rope_scaling` with a top-level `rope_theta`, else `rope_parameters` (transformers 5)."""
    require_rope_objects(hf_config)
    rope = dict(hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {})
    default_theta = rope.get("rope_theta") or hf_config.get("rope_theta") or default_theta
    if original := hf_config.get("original_max_position_embeddings"):  # Phi-3's place for it
        rope["original_max_position_embeddings"] = original
    return RotaryEmbedding(
        dim,
        float(default_theta),
        read_rope_scaling(rope, hf_config.get("max_position_embeddings") or max_position_embeddings),
    )


def require_rope_objects(hf_config: Mapping[str, Any]) -> None:
    """DataError for rotary positions that are no JSON object, and for a base that turns nothing."""
    for name in ("rope_scaling", "rope_parameters"):
        value = hf_config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise DataError(f"config.json: {name} is {value!r:.60}; an object with rope_type was expected")
        require_positive_base((value or {}).get("rope_theta"))
    require_positive_base(hf_config.get("rope_theta"))


def require_positive_base(theta: Any) -> None:
    if theta is not None and not (type(theta) in (int, float) and 0 < theta < math.inf):
        raise DataError(f"config.json: rope_theta is {theta!r}; a number above 0 was expected")


def read_rope_scaling(rope: Mapping[str, Any], max_position_embeddings: int | None) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "yarn" and rope.get("short_factor"):
        kind = "longrope"  # the word of some early Phi-3 files
    original = rope.get("original_max_position_embeddings") or max_position_embeddings
    if kind not in ROPE_SCALINGS:
        raise DataError(f"config.json: rope type {kind!r} is unknown here; known: {', '.join(ROPE_SCALINGS)}")
    return ROPE_SCALINGS[kind](rope, original, max_position_embeddings)


def read_yarn(rope: Mapping[str, Any], original: int | None, max_position_embeddings: int | None) -> YaRNScaling:
    original = require_original_length(original)
    factor = rope.get("factor") or (max_position_embeddings or original) / original
    return YaRNScaling(
        float(factor),
        original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        explicit_attention_factor=rope.get("attention_factor"),
        truncate=rope.get("truncate", True),
    )


def read_llama3(rope: Mapping[str, Any], original: int | None, max_position_embeddings: int | None) -> Llama3Scaling:
    low, high = require_field(rope, "low_freq_factor"), require_field(rope, "high_freq_factor")
    return Llama3Scaling(
        float(require_field(rope, "factor")), float(low), float(high), require_original_length(original)
    )


def read_longrope(
    rope: Mapping[str, Any], original: int | None, max_position_embeddings: int | None
) -> LongRoPEScaling:
    original = require_original_length(original)
    factor = rope.get("factor") or (max_position_embeddings or original) / original
    short, long = (tuple(map(float, require_field(rope, name))) for name in ("short_factor", "long_factor"))
    return LongRoPEScaling(float(factor), original, short, long, rope.get("attention_factor"))


def require_original_length(original: int | None) -> int:
    """What a stretch that depends on it is measured by."""
    if not original:
        raise DataError(
            "config.json has no 'original_max_position_embeddings' to stretch from, nor 'max_position_embeddings'"
        )
    return int(original)


ROPE_SCALINGS: dict[str, Callable[[Mapping[str, Any], int | None, int | None], RopeScaling | None]] = {
    "default": lambda rope, original, context: None,
    "linear": lambda rope, original, context: LinearScaling(float(require_field(rope, "factor"))),
    "ntk": lambda rope, original, context: NTKScaling(float(require_field(rope, "factor"))),
    "llama3": read_llama3,
    "yarn": read_yarn,
    "longrope": read_longrope,
    "su": read_longrope,
}
"""The published names; "su" is what the first files with longrope call it."""


def publish_rotary(rotary: RotaryEmbedding) -> dict[str, Any]:
    """Both spellings: a folder with only the new one is read with theta 10000 by transformers 4, in silence.

    NTK-aware scaling is a larger base, and is published as one: no reader has another name for it."""
    theta, scaling = rotary.rope_theta, publish_scaling(rotary.scaling)
    if isinstance(rotary.scaling, NTKScaling):
        theta = rotary.rope_theta * rotary.scaling.factor ** (rotary.dim / (rotary.dim - 2))
    rope = {"rope_type": "default"} | (scaling or {})
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": {"rope_theta": theta} | rope}


def publish_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    match scaling:
        case None | NTKScaling():
            return None
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(
            factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original
        ):
            fields = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **fields, "original_max_position_embeddings": original}
        case LongRoPEScaling() as long:
            lists = {"short_factor": list(long.short_factor), "long_factor": list(long.long_factor)}
            original, explicit = long.original_max_position_embeddings, long.explicit_attention_factor
            fields = {"factor": long.factor, "original_max_position_embeddings": original}
            fields |= {} if explicit is None else {"attention_factor": explicit}
            return {"rope_type": "longrope", **fields, **lists}
        case YaRNScaling() as yarn:
            fields = {"factor": yarn.factor, "original_max_position_embeddings": yarn.original_max_position_embeddings}
            fields |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "truncate": yarn.truncate}
            optional = {
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
                "attention_factor": yarn.explicit_attention_factor,
            }
            return {
                "rope_type": "yarn",
                **fields,
                **{name: value for name, value in optional.items() if value is not None},
            }
    raise ValueError(f"no published spelling for {type(scaling).__name__}")
