"""Builds models with random weights, from a preset's name or a Config."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llm_quest.contracts import Preset
from llm_quest.errors import UsageError
from llm_quest.layers.initialize import ModuleGenerator, materialize
from llm_quest.models import FAMILIES, VISION_FAMILIES
from llm_quest.models.decoder import Decoder
from llm_quest.models.family import Family
from llm_quest.tensor_files import HugePageSlabs


def presets() -> list[str]:
    """The names `build` knows."""
    return [preset.name for family in (*FAMILIES, *VISION_FAMILIES) for preset in family.presets]


def preset(name: str) -> Preset:
    """One of them, with its config, exact parameter count and hub id."""
    for family in (*FAMILIES, *VISION_FAMILIES):
        for candidate in family.presets:
            if candidate.name == name:
                return candidate
    close_matches = difflib.get_close_matches(name, presets(), n=1)
    hint = f"did you mean {close_matches[0]!r}?" if close_matches else f"known: {', '.join(presets())}"
    raise UsageError(f"no preset is called {name!r}; {hint}")


def family_of(config: Any) -> Family:
    """The family a config belongs to."""
    for family in (*FAMILIES, *VISION_FAMILIES):
        if type(config) is family.Config:
            return family
    raise UsageError(
        f"{type(config).__name__} is no family's Config; "
        f"families: {', '.join(family.name for family in (*FAMILIES, *VISION_FAMILIES))}"
    )


def build_meta_model(config: Any) -> Decoder:
    """The model without memory (meta device): enough to count, to name and to load into."""
    with torch.device("meta"), SkipInit():
        return family_of(config).assemble(config)


class SkipInit(TorchFunctionMode):
    """Leaves out the initialization that torch's own layers do. On the meta device it has no effect, yet drawing
    them there imports half of torch's compiler, which takes 3 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def build(
    preset_or_config: str | Any,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "float32",
    seed_per_module: bool = False,
) -> Decoder:
    """A model with random weights, in eval mode. preset_or_config: a preset's name or a family's Config. The same
    seed gives the same weights on any machine: they are drawn in float32 on the host, then moved. seed_per_module:
    each module's values follow from the seed and its name alone, whatever other modules the model has."""
    config = preset(preset_or_config).config if isinstance(preset_or_config, str) else preset_or_config
    dtype = dtype_from_name(dtype) if isinstance(dtype, str) else dtype
    model = materialize(build_meta_model(config), "cpu", torch.float32, HugePageSlabs())
    family_of(config).initialize(model, (ModuleGenerator() if seed_per_module else torch.Generator()).manual_seed(seed))
    return model.to(device=device, dtype=dtype).eval()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype of that name."""
    if name not in DTYPES:
        raise UsageError(f"no dtype is called {name!r}; known: {', '.join(DTYPES)}")
    return DTYPES[name]


def count_parameters(model: torch.nn.Module) -> int:
    """How many numbers are learned; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
