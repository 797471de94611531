"""From a name or a config to a model with first values."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from llm_quest.contracts import Preset
from llm_quest.errors import UsageError
from llm_quest.layers.initialize import materialize
from llm_quest.models import PAGES
from llm_quest.models.decoder import Decoder
from llm_quest.models.page import Page


def presets() -> list[str]:
    """The names `build` knows."""
    return [preset.name for page in PAGES for preset in page.presets]


def preset(name: str) -> Preset:
    """One of them, with its config, exact parameter count and hub id."""
    for page in PAGES:
        for candidate in page.presets:
            if candidate.name == name:
                return candidate
    near = difflib.get_close_matches(name, presets(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(presets())}"
    raise UsageError(f"no preset is called {name!r}; {hint}")


def page_of(config: Any) -> Page:
    """The page a config belongs to."""
    for page in PAGES:
        if isinstance(config, page.Config):
            return page
    raise UsageError(f"{type(config).__name__} is no page's config; pages: {', '.join(page.name for page in PAGES)}")


def skeleton(config: Any) -> Decoder:
    """The model without memory (meta device): enough to count, to name and to load into."""
    with torch.device("meta"):
        return page_of(config).assemble(config)


def build(
    what: str | Any, *, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype | str = "float32"
) -> Decoder:
    """A model with random first values, in eval mode. what: a preset's name or a page's Config. The same seed gives the same
    weights on any machine: they are drawn in float32 on the host, then moved."""
    config = preset(what).config if isinstance(what, str) else what
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = materialize(skeleton(config), "cpu", torch.float32)
    page_of(config).initialize(model, torch.Generator().manual_seed(seed))
    return model.to(device=device, dtype=dtype).eval()


def count_parameters(model: torch.nn.Module) -> int:
    """How many numbers are learned; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
