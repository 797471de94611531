"""Reads adapter_config.json: which of PEFT's settings are supported, which are harmless; all others are refused.

A setting changes the function, or it concerns training, files or other libraries. The known ones are in the tables
below; an unknown one stops loading unless its value says that it is off."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quest.errors import DataError, UsageError
from llm_quest.hub.config import read_json

CONFIG = "adapter_config.json"
TINY_LORA_TYPE = "TINYLORA"
COMPUTED = frozenset((
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "bias", "trainable_token_indices", "init_lora_weights", "base_model_name_or_path"),
    *("u", "weight_tying", "projection_seed", "save_projection", "init_weights", "tinylora_dropout"),
    *("ensure_weight_tying", "target_parameters"),
))  # fmt: skip
"""Settings that are read. Which modules are adapted follows from the tensors."""
HARMLESS = frozenset((
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config"),
    *("megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("init_v_bound", "qalora_group_size", "velora_config", "unsloth_version"),
))  # fmt: skip
"""Settings without effect once the tensors exist. (What an initialization did to the base is in init_lora_weights.)"""
OFF: tuple[Any, ...] = (None, False, [], {}, "none")
"""Values under which a setting that is not computed here changes nothing."""
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initializations of A and B alone. The others change the base too."""
RESIDUAL_STARTS = ("pissa", "olora")
"""Initializations that subtract the initial B A from each matrix, which can be computed again from the base."""


def read_adapter_config(file: Path) -> dict[str, Any]:
    """Read adapter_config.json. DataError for a missing file and for a setting that is not supported."""
    if not file.parent.is_dir():
        raise DataError(f"{file.parent}: there is no such folder; give one with an adapter")
    if not file.exists():
        hint = adapter_names_hint(file.parent) or "; quest export RUN FOLDER --adapter writes one"
        raise DataError(f"{file.parent} holds no adapter: it has no {file.name}{hint}")
    config = read_json(file)
    kind = config.get("peft_type")
    if kind not in ("LORA", TINY_LORA_TYPE):
        raise DataError(
            f"{file}: peft_type is {kind!r}; LORA (with use_rslora or use_dora) and {TINY_LORA_TYPE} are read here, "
            "merge others"
        )
    if type(config.get("r")) is not int or config["r"] < 1:
        raise DataError(f"{file}: r is {config.get('r')!r}; a positive whole number was expected")
    check_numbers(file, config)
    unsupported = {
        name: value for name, value in config.items() if name not in COMPUTED | HARMLESS and value not in OFF
    }
    if unsupported:
        listed = ", ".join(f"{name} ({str(value)[:40]})" for name, value in unsupported.items())
        raise DataError(f"{file}: {listed} is not computed here: merge the adapter in PEFT and load the result")
    check_start(file, config.get("init_lora_weights", True))
    return config


def check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    """Raise DataError for an alpha that is no number, and for patterns that are no table of regular expressions."""
    numbers = {"lora_alpha": config.get("lora_alpha", 8)}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, Mapping):
            raise DataError(f"{file}: {name} is {patterns!r}; a table of module patterns was expected")
        for pattern, value in patterns.items():
            numbers[f"{name}[{pattern!r}]"] = value
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(f"{file}: {name} has {pattern!r}, which is no regular expression: {error}") from None
    for name, value in numbers.items():
        least = 1 if name.startswith("rank") else -math.inf
        if type(value) not in (int, float) or not math.isfinite(value) or value < least:
            raise DataError(f"{file}: {name} is {value!r}; a {'rank' if least == 1 else 'number'} was expected")


def check_start(file: Path, start: Any) -> None:
    """Raise DataError for an initialization that changed the base in a way that cannot be computed again (LoftQ's
    quantization, CorDA's and LoRA-GA's data, the random numbers of a fast SVD)."""
    if start not in PLAIN_STARTS and str(start).lower() not in RESIDUAL_STARTS:
        raise DataError(
            f"{file}: init_lora_weights is {start!r}, which changed the base model too, in a way that cannot be "
            "computed again: save the adapter with PEFT's path_initial_model_for_weight_conversion, or merge it there"
        )


def adapter_names(folder: Path) -> list[str]:
    """The names of the adapters in a folder that holds several, each in a folder of its name."""
    return sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))


def adapter_names_hint(folder: Path) -> str:
    names = adapter_names(folder)
    return f"; it holds several by name, {', '.join(names)}: give one, such as {folder / names[0]}" if names else ""


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """The rank of one module: r, or that of rank_pattern."""
    return int(pattern_value(config.get("rank_pattern"), module, config["r"]))


def module_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale of one module of this rank: alpha / r, or alpha / sqrt(r) with use_rslora, with alpha by
    alpha_pattern."""
    alpha = float(pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name matches, as in PEFT."""
    matches = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(matches, default)


def adapter_base(name_or_path: str | Path) -> str | None:
    """The base model that an adapter's folder names; None for any other folder."""
    folder = Path(name_or_path).expanduser()
    if (folder / "config.json").exists() or not (folder / CONFIG).is_file():
        if folder.is_dir() and adapter_names(folder) and not (folder / "config.json").exists():
            raise UsageError(f"{folder} has no {CONFIG}{adapter_names_hint(folder)}")
        return None
    base = read_adapter_config(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise UsageError(
            f"{folder} is an adapter that does not say of which model: quest.load the base, then "
            "quest.load_adapter(model, folder)"
        )
    return str(base)
