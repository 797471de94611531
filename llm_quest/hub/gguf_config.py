"""A model's config as GGUF keys (`export_keys`), and back (`read_hf_config`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from llm_quest.errors import DataError, UsageError
from llm_quest.hub.gguf import BOOL, FLOAT32, UINT32, GGUFFile, Value, array, uint32
from llm_quest.hub.gguf_families import BY_MODEL_TYPE, LAYOUTS
from llm_quest.hub.gguf_layouts import LISTED, MAX_HEAD, OPTIONAL, Key, Layout, size_of
from llm_quest.hub.gguf_rope import float_of, read_rope, rope_keys, rope_notes, rope_problem
from llm_quest.hub.gguf_tensors import mixer_of
from llm_quest.models.build import family_of
from llm_quest.models.windows import FULL, SLIDING, layer_pattern
from llm_quest.techniques.model_spec import all_exportable

PATTERN = "attention.sliding_window_pattern"
WINDOW = "attention.sliding_window"
HARMLESS = frozenset((
    *("vocab_size", "feed_forward_length", "tensor_data_layout", "pooling_type", PATTERN, WINDOW),
    *("expert_group_count", "expert_group_used_count", "expert_weights_norm", "expert_weights_scale"),
    *("expert_gating_func", "attention.temperature_scale"),
))  # fmt: skip
"""Keys of an architecture that other writers add, and whose values follow from the layout."""


def layout_for(model: nn.Module) -> Layout:
    """The layout of this model in llama.cpp. UsageError if llama.cpp has none."""
    config: Any = model.config
    family = family_of(config)
    model_type = str(family.publish(config)["model_type"])
    if model_type not in BY_MODEL_TYPE:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise UsageError(
            f"a GGUF file cannot hold a {model_type}: llama.cpp's architectures are known here for {known}"
        )
    return BY_MODEL_TYPE[model_type]


def refuse_inexpressible(model: Any, layout: Layout) -> None:
    """Raise UsageError that names everything that llama.cpp would compute differently."""
    config, techniques = model.config, model.spec.techniques
    if techniques and not all_exportable(techniques):
        names = ", ".join(type(technique).__name__ for technique in techniques)
        raise UsageError(
            f"the model was made with {names}, which no GGUF file expresses: merge adapters first (--merge)"
        )
    problems = [
        f"{name} is {value_at(config, name)!r}, llama.cpp computes {allowed!r} alone; "
        for name, allowed in layout.fixed.items()
        if value_at(config, name, allowed) != allowed
    ]
    if layout.square and config.num_attention_heads * config.head_dim != config.hidden_size:
        sizes = f"{config.num_attention_heads} heads of {config.head_dim} on {config.hidden_size}"
        problems.append(f"{sizes}, where the heads together must be as wide as the stream; ")
    problems += [layout.check(config), rope_problem(config, layout), window_problem(model, layout)]
    if text := "".join(problems).rstrip("; "):
        raise UsageError(f"llama.cpp's architecture {layout.architecture} is not this {layout.model_type}: {text}")


def value_at(config: Any, path: str, default: Any = None) -> Any:
    """A field of the Config, or of a part of it; the default where the family has none of that name."""
    return functools.reduce(lambda part, name: getattr(part, name, default), path.split("."), config)


def layer_windows(model: Any) -> list[int | None]:
    """The sliding window of each layer, in tokens; None: without a window."""
    return [getattr(mixer_of(block), "sliding_window", None) for block in model.blocks]


def window_problem(model: Any, layout: Layout) -> str:
    if layout.window_period > 0 and pattern_period(layer_windows(model)) is None:
        return "which layers have a window follows no period; "
    return ""


def pattern_period(windows: Sequence[int | None]) -> int | None:
    """The period p such that every p-th layer has no window and all others have one; None if there is no such p."""
    for period in range(1, len(windows) + 2):
        if all((window is None) == ((layer + 1) % period == 0) for layer, window in enumerate(windows)):
            return period
    return None


def export_keys(model: Any, layout: Layout) -> tuple[dict[str, Value], list[str]]:
    """All keys of the architecture, and notes on what is lost. UsageError for a model that llama.cpp does not
    compute."""
    refuse_inexpressible(model, layout)
    config, notes = model.config, [*layout.notes(model.config), *rope_notes(model.config)]
    keys = {
        name: key.make(value_at(config, key.field))
        for name, key in layout.keys.items()
        if value_at(config, key.field) is not None
    }
    keys |= rope_keys(config, layout) | dict(layout.more(config))
    windows = layer_windows(model)
    narrow = [window for window in windows if window is not None]
    if layout.window_period == LISTED:
        keys[PATTERN] = array(BOOL, [window is not None for window in windows])
    elif WINDOW in keys:
        keys[PATTERN] = uint32(pattern_period(windows) or 0)
    elif narrow and min(narrow) < config.max_position_embeddings:
        keys["context_length"] = uint32(min(narrow))
        notes.append(
            f"llama.cpp's {layout.architecture} has no window: context_length is {min(narrow)}, up to which one of "
            f"{min(narrow)} changes nothing"
        )
    return {f"{layout.architecture}.{name}": value for name, value in keys.items()}, notes


def read_layout(file: GGUFFile) -> Layout:
    """The layout of a file. DataError if no family of ours computes it."""
    layouts = [layout for layout in LAYOUTS if layout.architecture == file.architecture and layout.reads]
    if not layouts:
        known = ", ".join(sorted({layout.architecture for layout in LAYOUTS}))
        raise DataError(
            f"{file.file.name}: general.architecture is {file.architecture[:40]!r}, which is not computed here; known: "
            f"{known}"
        )
    return next((layout for layout in layouts if layout.matches(file)), layouts[0])


def read_hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of a file's model. DataError for a key that is missing, of another type, or unknown."""
    layout = read_layout(file)
    hf_config: dict[str, Any] = {"model_type": layout.model_type}
    for name, key in layout.keys.items():
        value = read_key(file, name, key)
        field = key.field.rpartition(".")[2]
        if value is not None and hf_config.get(field, value) != value:
            raise DataError(f"{file.file.name}: {name} is {value}, and another key says {hf_config[field]} of {field}")
        if value is not None or name == WINDOW:
            hf_config[field] = value
    check_sizes(file, hf_config)
    fill_defaults(file, layout, hf_config)
    hf_config |= {name.rpartition(".")[2]: list(v) if isinstance(v, tuple) else v for name, v in layout.fixed.items()}
    hf_config |= {name: tensor in file.tensors for name, tensor in layout.flags.items()}
    hf_config |= {"tie_word_embeddings": "output.weight" not in file.tensors}
    hf_config |= {**layout.back(file), **read_windows(file, layout, hf_config)}
    hf_config |= read_rope(
        file,
        layout,
        None if "attention.kv_lora_rank" in layout.keys else hf_config.get("head_dim") or equal_parts(hf_config),
    )
    refuse_unknown_gguf_keys(file, layout)
    return hf_config


def check_sizes(file: GGUFFile, hf_config: dict[str, Any]) -> None:
    """Raise DataError for sizes that would cost memory or time before other checks find them."""
    if hf_config["num_hidden_layers"] > len(file.tensors):
        layers = f"{hf_config['num_hidden_layers']:,} layers are announced"
        raise DataError(f"{file.file.name}: {layers}, and it has only {len(file.tensors)} tensors")
    width = size_of(file, "rope.dimension_count") or 0
    if max(width, hf_config.get("head_dim") or 0, equal_parts(hf_config) or 0) > MAX_HEAD:
        raise DataError(f"{file.file.name}: heads wider than {MAX_HEAD:,} numbers are announced")


def read_key(file: GGUFFile, name: str, key: Key) -> Any:
    """Read one value; None if it is optional and missing. A list of equal values (one a layer) is one value."""
    whole = f"{file.architecture}.{name}"
    if whole not in file.metadata:
        if name in OPTIONAL:
            return None
        raise DataError(f"{file.file.name}: the key {whole} is missing, without which nothing can be computed")
    value = file.get(whole)
    if isinstance(value, list) and value and all(one == value[0] for one in value):
        value = value[0]
    kind = key.make(0).kind
    if kind == FLOAT32:
        return float_of(file, value)
    if type(value) is not {UINT32: int, BOOL: bool}[kind]:
        raise DataError(
            f"{file.file.name}: {whole} is {str(value)[:40]}; one {'number' if kind == UINT32 else 'bool'} was expected"
        )
    return value


def equal_parts(hf_config: dict[str, Any]) -> Any:
    size, heads = hf_config.get("hidden_size"), hf_config.get("num_attention_heads")
    return size // heads if type(size) is int and type(heads) is int and heads > 0 else None


def fill_defaults(file: GGUFFile, layout: Layout, hf_config: dict[str, Any]) -> None:
    """Fill in llama.cpp's defaults for missing keys, and the vocabulary's size, which is that of the embedding."""
    if "attention.head_count_kv" in layout.keys:
        hf_config.setdefault("num_key_value_heads", hf_config["num_attention_heads"])
    if "attention.key_length" in layout.keys:
        hf_config.setdefault("head_dim", equal_parts(hf_config))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        hf_config["vocab_size"] = embedding.shape[0]


def read_windows(file: GGUFFile, layout: Layout, hf_config: dict[str, Any]) -> dict[str, Any]:
    """sliding_window and layer_types, of the architectures that have windows."""
    layers, window = hf_config["num_hidden_layers"], file.get(f"{file.architecture}.{WINDOW}")
    if not layout.window_period:
        if window:
            raise DataError(
                f"{file.file.name}: {WINDOW} is {str(window)[:20]}, but llama.cpp's {file.architecture} has none; "
                "delete the key, or convert the model again with a context_length within its window"
            )
        return {}
    period = file.get(f"{file.architecture}.{PATTERN}", layout.window_period)
    if not window:
        return {"layer_types": [FULL] * layers} if 0 < layers < 2**20 else {}
    if isinstance(period, list) and len(period) == layers:
        return {"layer_types": [SLIDING if windowed else FULL for windowed in period]}
    if type(period) is not int or not 0 < period < 2**20 or not 0 < layers < 2**20:
        raise DataError(
            f"{file.file.name}: {PATTERN} is {str(period)[:40]} for {layers} layers; a number or a list was expected"
        )
    return {"layer_types": list(layer_pattern(layers, period))}


def refuse_unknown_gguf_keys(file: GGUFFile, layout: Layout) -> None:
    """Raise DataError for keys of the architecture that are not read and may change what is computed."""
    prefix = f"{file.architecture}."
    known = {*layout.keys, *HARMLESS, *extra_keys(layout)}
    names = [key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)]
    unknown = [name for name in names if name not in known and not name.startswith("rope.")]
    unknown = [name for name in unknown if file.get(prefix + name) not in (0, 0.0, False, "", [])]
    if unknown:
        listed = ", ".join(f"{name[:60]} ({str(file.get(prefix + name))[:40]})" for name in sorted(unknown)[:8])
        raise DataError(
            f"{file.file.name}: {listed}: not known to {layout.architecture} here, and may change what is computed"
        )


@functools.cache
def extra_keys(layout: Layout) -> frozenset[str]:
    """The keys that `more` writes and `back` reads."""
    config = next(
        (preset.config for family in all_families() for preset in family.presets
         if family.publish(preset.config)["model_type"] == layout.model_type), None,
    )  # fmt: skip
    return frozenset() if config is None else frozenset((*layout.more(config), "attention.q_lora_rank"))


def all_families() -> Sequence[Any]:
    from llm_quest.models import FAMILIES

    return FAMILIES
