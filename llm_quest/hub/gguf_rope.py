"""Rotary positions in a GGUF file: keys, and a tensor of divisors where there is one for each pair.

      none, NTK (a larger base)    rope.freq_base
      linear                       rope.scaling.type, factor
      YaRN                         rope.scaling.type, factor, original_context_length, yarn_beta_fast, yarn_beta_slow
      Llama 3                      no key; the tensor rope_freqs.weight: what each frequency is divided by
      LongRoPE                     two tensors, rope_factors_long and rope_factors_short

Commonly got wrong: llama.cpp multiplies cos and sin of YaRN by 0.1 ln(factor) + 1 itself, and `attn_factor` on top.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy
import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.gguf import GGUFFile, Value, float32, string, uint32
from llm_quest.hub.gguf_layouts import Layout
from llm_quest.hub.safetensors_io import StoredTensor
from llm_quest.layers.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    RotaryEmbedding,
    YaRNScaling,
    default_inv_freq,
    yarn_mscale,
)
from llm_quest.models.rope_config import publish_rotary, publish_scaling

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FREQS, LONG, SHORT)
OWN_SCALING = "llm_quest.rope_scaling"
"""Our own key, which others ignore: the parameters that the divisors were computed from."""
LATENT_LOG = 0.1
"""DeepSeek's files have this times mscale_all_dim."""
MAX_PAIRS = 4096


def rope_keys(config: Any, layout: Layout) -> dict[str, Value]:
    """The keys of a model's rotation, without the architecture."""
    if not layout.rope:
        return {}
    rotary = config.rotary
    keys = {
        "rope.dimension_count": uint32(rotary.dim),
        "rope.freq_base": float32(publish_rotary(rotary)["rope_theta"]),
    }
    local = getattr(config, "swa_rotary", None)
    if local is not None and layout.window_period:
        keys["rope.freq_base_swa"] = float32(publish_rotary(local)["rope_theta"])
    match rotary.scaling:
        case LinearScaling(factor=factor):
            keys |= {"rope.scaling.type": string("linear"), "rope.scaling.factor": float32(factor)}
        case YaRNScaling() as yarn:
            keys |= yarn_keys(yarn, layout)
        case LongRoPEScaling() as long:
            keys["rope.scaling.type"] = string("longrope")
            keys["rope.scaling.original_context_length"] = uint32(long.original_max_position_embeddings)
            keys["rope.scaling.attn_factor"] = float32(long.attention_factor)
    return keys


def yarn_keys(yarn: YaRNScaling, layout: Layout) -> dict[str, Value]:
    keys = {
        "rope.scaling.type": string("yarn"),
        "rope.scaling.factor": float32(yarn.factor),
        "rope.scaling.original_context_length": uint32(yarn.original_max_position_embeddings),
        "rope.scaling.yarn_beta_fast": float32(yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float32(yarn.beta_slow),
    }
    if layout.architecture == "deepseek2":
        return keys | {"rope.scaling.yarn_log_multiplier": float32(LATENT_LOG * (yarn.mscale_all_dim or 0.0))}
    if layout.architecture == "mistral3" and yarn.mscale == 1.0 and yarn.mscale_all_dim:
        return keys | {"rope.scaling.yarn_log_multiplier": float32(yarn.mscale_all_dim)}
    beyond = yarn.attention_factor / yarn_mscale(yarn.factor, 1.0)
    return keys if math.isclose(beyond, 1.0) else keys | {"rope.scaling.attn_factor": float32(beyond)}


def rope_problem(config: Any, layout: Layout) -> str:
    """A message if llama.cpp cannot express this rotation; empty if it can."""
    rotary = getattr(config, "rotary", None)
    if not layout.rope or rotary is None:
        return ""
    kind = type(rotary.scaling).__name__
    known = {Llama3Scaling: layout.rope_factors, LongRoPEScaling: layout.longrope}
    if not known.get(type(rotary.scaling), True):
        return f"the rotation is stretched by {kind}, which llama.cpp does not read for {layout.architecture}; "
    local = getattr(config, "swa_rotary", None)
    if layout.window_period and local is not None and local.scaling is not None:
        return "the rotation of windowed layers is stretched; "
    if layout.architecture == "deepseek2" and isinstance(rotary.scaling, YaRNScaling):
        same = rotary.scaling.mscale == rotary.scaling.mscale_all_dim and rotary.scaling.mscale
        return "" if same else "mscale and mscale_all_dim of YaRN are not one number; "
    return ""


def rope_notes(config: Any) -> list[str]:
    """Notes on what llama.cpp computes differently."""
    scaling = getattr(getattr(config, "rotary", None), "scaling", None)
    if not isinstance(scaling, YaRNScaling) or scaling.truncate:
        return []
    return ["llama.cpp rounds the ends of YaRN's ramp (truncate is false, as in the released gpt-oss)"]


def rope_tensors(config: Any, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Value]]:
    """The tensors of divisors, and our own key beside them."""
    rotary = getattr(config, "rotary", None)
    if not layout.rope or rotary is None:
        return {}, {}
    match rotary.scaling:
        case Llama3Scaling() as stretch:
            own = {OWN_SCALING: string(json.dumps(publish_scaling(stretch)))}
            return {FREQS: frequency_divisors(rotary)}, own
        case LongRoPEScaling() as long:
            return {LONG: torch.tensor(long.long_factor), SHORT: torch.tensor(long.short_factor)}, {}
    return {}, {}


def frequency_divisors(rotary: RotaryEmbedding) -> Tensor:
    return default_inv_freq(rotary.dim, rotary.rope_theta) / torch.tensor(rotary.inv_freq)


def read_rope(file: GGUFFile, layout: Layout, head_dim: Any) -> dict[str, Any]:
    """The fields of config.json for a file's rotation."""
    if not layout.rope:
        return {}

    def get(key: str, default: Any = None) -> Any:
        return file.get(f"{file.architecture}.rope.{key}", default)

    theta, width = float_of(file, get("freq_base", 10_000.0)), get("dimension_count", head_dim)
    rope = {"rope_theta": theta} | read_gguf_scaling(file, layout, get)
    if temperature := file.get(f"{file.architecture}.attention.temperature_scale"):
        rope["llama_4_scaling_beta"] = float_of(file, temperature)
    if type(width) is int and type(head_dim) is int and 0 < width < head_dim:
        exact = int(head_dim * (width / head_dim)) == width
        rope["partial_rotary_factor"] = width / head_dim if exact else (width + 0.5) / head_dim
    if layout.window_period and layout.model_type in ("gemma3_text", "olmo3"):
        local = {"rope_type": "default", "rope_theta": float_of(file, get("freq_base_swa", theta))}
        return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    original = (
        {"original_max_position_embeddings": rope.get("original_max_position_embeddings")} if layout.longrope else {}
    )
    return {"rope_parameters": rope} | {name: value for name, value in original.items() if value is not None}


def read_gguf_scaling(file: GGUFFile, layout: Layout, get: Any) -> dict[str, Any]:
    kind, original = get("scaling.type", "none"), get("scaling.original_context_length")
    if FREQS in file.tensors:
        return read_divisors(file)
    if LONG in file.tensors and SHORT in file.tensors:
        lists = {"short_factor": read_vector(file.tensors[SHORT]), "long_factor": read_vector(file.tensors[LONG])}
        attention = float_of(file, get("scaling.attn_factor", 1.0))
        return {"rope_type": "longrope", "attention_factor": attention, "factor": 1.0, **lists} | (
            {} if original is None else {"original_max_position_embeddings": original}
        )
    factor = float_of(file, get("scaling.factor", get("scale_linear", 1.0)))
    if kind == "yarn":
        return read_yarn_keys(file, layout, get) | {"factor": factor, "original_max_position_embeddings": original}
    if kind not in ("none", "linear"):
        raise DataError(
            f"{file.file.name}: the rotation's scaling type is {str(kind)[:40]!r}; none, linear, yarn are read"
        )
    return {"rope_type": "default"} if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}


def read_yarn_keys(file: GGUFFile, layout: Layout, get: Any) -> dict[str, Any]:
    factor = float_of(file, get("scaling.factor", 1.0))
    rope: dict[str, Any] = {"rope_type": "yarn"}
    rope["beta_fast"] = float_of(file, get("scaling.yarn_beta_fast", 32.0))
    rope["beta_slow"] = float_of(file, get("scaling.yarn_beta_slow", 1.0))
    log_multiplier = get("scaling.yarn_log_multiplier")
    if layout.architecture == "deepseek2" and log_multiplier:
        return rope | dict.fromkeys(("mscale", "mscale_all_dim"), round(float_of(file, log_multiplier) / LATENT_LOG, 6))
    if layout.architecture == "mistral3" and log_multiplier:
        return rope | {"mscale": 1.0, "mscale_all_dim": float_of(file, log_multiplier)}
    beyond = get("scaling.attn_factor")
    return rope if beyond is None else rope | {"attention_factor": float_of(file, beyond) * yarn_mscale(factor, 1.0)}


def read_divisors(file: GGUFFile) -> dict[str, Any]:
    """Llama 3's scaling, if our own key has its parameters; otherwise the divisors themselves, as LongRoPE with one
    list."""
    divisors = read_vector(file.tensors[FREQS])
    if published := read_own_scaling(file, divisors):
        return published
    lists = dict.fromkeys(("short_factor", "long_factor"), divisors)
    return {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0, **lists}


def read_own_scaling(file: GGUFFile, divisors: list[float]) -> dict[str, Any]:
    """The scaling of our own key, if the divisors are computed from it; empty otherwise."""
    try:
        published = json.loads(str(file.get(OWN_SCALING, "{}")))
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        stretch = Llama3Scaling(*(published[name] for name in names))
        theta = float_of(file, file.get(f"{file.architecture}.rope.freq_base", 10_000.0))
        computed = frequency_divisors(RotaryEmbedding(2 * len(divisors), theta, stretch))
    except (DataError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError):
        return {}
    return dict(published) if torch.allclose(computed, torch.tensor(divisors)) else {}


def read_vector(stored: StoredTensor) -> list[float]:
    """A small tensor of float32."""
    if stored.dtype != "F32" or len(stored.shape) != 1 or stored.shape[0] > MAX_PAIRS:
        raise DataError(
            f"{stored.file.name}: the rotation's divisors are {stored.dtype} {stored.shape}; a row of F32 is read"
        )
    with stored.file.open("rb") as handle:
        handle.seek(stored.start)
        data = bytearray(handle.read(stored.nbytes))
    values = torch.frombuffer(data, dtype=torch.float32).tolist() if data else []
    return [shortest_float32(value) for value in values]


def float_of(file: GGUFFile, value: Any) -> float:
    """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06. DataError for no
    number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError(f"{file.file.name}: {str(value)[:40]!r} stands where a number is expected")
    return shortest_float32(float(value))


def shortest_float32(value: float) -> float:
    return float(str(numpy.float32(value))) if abs(value) < 3e38 else value
