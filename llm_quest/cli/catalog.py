"""What there is to build, and what it is made of: `quest models`, `quest show NAME` (`quest diff` is in
`lesson.py`).

Counts come from the model itself, assembled without memory: parameters by walking it, the rest as `costs.py` says.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llm_quest.cli.costs import cache_bytes, flops_per_token, image_flops
from llm_quest.cli.drawing import describe_rotary, picture
from llm_quest.contracts import Preset
from llm_quest.errors import DataError, UsageError
from llm_quest.layers.rotary import Rotary
from llm_quest.models import PAGES, VISION_PAGES
from llm_quest.models.build import DTYPES, count_parameters, page_of, preset, skeleton
from llm_quest.models.fusion import VisionLanguage
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.page import Page
from llm_quest.report.words import aligned, size

ALL_PAGES = (*PAGES, *VISION_PAGES)
READ_LENGTH = 4096
LOADED_AS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Catalogue:
    """Every preset of every page, one row each."""

    rows: tuple[dict[str, Any], ...]

    def as_json(self) -> list[dict[str, Any]]:
        return list(self.rows)

    def lines(self) -> list[str]:
        cells = [("name", "page", "parameters", "context", "hub id", "notes")]
        for row in self.rows:
            counts = (f"{row['parameters']:,}", f"{row['context']:,}")
            cells.append((row["name"], row["page"], *counts, row["hub"] or "-", row["notes"]))
        hint = "quest show NAME draws one, quest diff A B tells two apart, quest plan says what training takes"
        return [*aligned(cells, right=(2, 3)), "", hint]


def models() -> Catalogue:
    """All presets. Published sizes carry their published count; the tiny ones are counted on the meta device."""
    return Catalogue(tuple(row(page, one) for page in ALL_PAGES for one in page.presets))


def row(page: Page, one: Preset) -> dict[str, Any]:
    parameters = one.parameters if one.parameters is not None else count_parameters(skeleton(one.config))
    return {
        "name": one.name,
        "page": page.name,
        "parameters": parameters,
        "context": one.config.context,
        "hub": one.hub,
        "notes": one.notes or ("a small one for tests and tours" if one.name.endswith("-tiny") else ""),
    }


@dataclass(frozen=True)
class Portrait:
    """What a model is made of.

    parts: parameters by part, tied matrices once (with the embedding). cache_per_token: bytes (bf16) that one more
    token adds to the cache; cache_fixed: bytes that do not grow (full windows, states); cache_total: at `context`
    tokens. flops_linear, flops_scores: FLOPs per token of a forward pass over `context` tokens (two per multiply-add;
    attention counted over all pairs, as in Chowdhery et al. 2022, appendix B); training costs three times as much.
    load: bytes of weights by dtype. image_tokens: what one image takes of the context; 0: it reads none. flops_image:
    FLOPs before the decoder's of reading an image, forward. An image encoder has nothing else: no cache, and no tokens
    but an image's."""

    name: str
    page: str
    headline: str
    numbers: dict[str, Any]
    picture: tuple[str, ...]
    parameters: int
    parts: dict[str, int]
    context: int
    cache_per_token: int
    cache_fixed: int
    cache_total: int
    flops_linear: int
    flops_scores: int
    load: dict[str, int]
    image_tokens: int = 0
    flops_image: int = 0

    @property
    def flops(self) -> int:
        """FLOPs per token, forward."""
        return self.flops_linear + self.flops_scores

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "flops_forward": self.flops, "flops_training": 3 * self.flops}

    def lines(self) -> list[str]:
        parts = [(f"  {part}", f"{count:,}", f"{count / self.parameters:6.1%}") for part, count in self.parts.items()]
        parts.append(("  together", f"{self.parameters:,}", ""))
        facts = self.an_image() if self.image_tokens else []
        facts += self.a_token() if self.cache_per_token else []
        facts += [("to load", ", ".join(f"{size(held)} in {dtype}" for dtype, held in self.load.items()))]
        drawn = [f"{self.name}: {self.headline}", "", *self.picture, ""]
        return [*drawn, "parameters", *aligned(parts, right=(1, 2)), "", *aligned(facts)]

    def a_token(self) -> list[tuple[str, str]]:
        """What a decoder's token costs."""
        fixed = f" and {size(self.cache_fixed)} that do not grow" if self.cache_fixed else ""
        at, scores = f"at {self.context:,} tokens", f"{self.flops_scores / self.flops:.0%} of it attention"
        return [
            ("cache, bfloat16", f"{self.cache_per_token:,} bytes per token{fixed}; {size(self.cache_total)} {at}"),
            ("forward", f"{self.flops / 1e9:,.4g} GFLOPs per token {at} ({scores})"),
            ("training", f"{3 * self.flops / 1e9:,.4g} GFLOPs per token (backward costs twice the forward pass)"),
        ]

    def an_image(self) -> list[tuple[str, str]]:
        """What reading an image costs."""
        once, kept = self.flops_image / 1e9, self.image_tokens * self.cache_per_token
        held = f"and {size(kept)} of the cache" if kept else "everyone sees everyone, nothing is cached"
        return [
            ("an image", f"{self.image_tokens:,} tokens, {held}"),
            ("forward, an image", f"{once:,.4g} GFLOPs" + (" before the decoder reads its tokens" if kept else "")),
            ("training, an image", f"{3 * once:,.4g} GFLOPs"),
        ]


def show(name: str, *, context: int | None = None) -> Portrait:
    """A portrait of a preset, a page (its first preset), or a folder with a config.json. context: tokens at which
    cache and FLOPs are counted; by default what the model was made for, at most 4,096."""
    title, config = configured(name)
    page, model = page_of(config), skeleton(config)
    if context is not None and context < 1:
        raise UsageError(f"context is {context}; it counts tokens, so give at least 1")
    parameters = count_parameters(model)
    return Portrait(
        name=title,
        page=page.name,
        headline=headline(page),
        numbers=flat(config),
        picture=tuple(picture(model)),
        parameters=parameters,
        parts=parameters_by_part(model),
        load={name: parameters * DTYPES[name].itemsize for name in LOADED_AS},
        **costs(title, model, context),
    )


def costs(title: str, model: Any, context: int | None) -> dict[str, int]:
    """What tokens cost, at so many of them, and what an image does."""
    config = model.config
    if isinstance(model, ImageEncoder):
        weights, pairs = image_flops(config)
        held = dict.fromkeys(("cache_per_token", "cache_fixed", "cache_total"), 0)
        each = {"flops_linear": weights // config.context, "flops_scores": pairs // config.context}
        return {"context": config.context, **held, **each, **an_image(config.context, weights + pairs)}
    image: dict[str, int] = {}
    if isinstance(model, VisionLanguage):
        image, config = an_image(config.image_tokens, sum(image_flops(config))), config.text
    context = context or min(config.context, READ_LENGTH)
    try:
        linear, scores = flops_per_token(config, context)
    except ValueError as error:
        raise UsageError(f"{title} cannot be shown at {context:,} tokens: {error}") from None
    growing, fixed, total = cache_bytes(config, context)
    held = {"cache_per_token": growing, "cache_fixed": fixed, "cache_total": total}
    return {"context": context, **held, "flops_linear": linear, "flops_scores": scores, **image}


def an_image(tokens: int, flops: int) -> dict[str, int]:
    return {"image_tokens": tokens, "flops_image": flops}


def configured(name: str) -> tuple[str, Any]:
    """A title and a config, from a preset's name, a page's name, or a folder that holds a config.json."""
    for page in ALL_PAGES:
        if name in [one.name for one in page.presets]:
            return name, preset(name).config
    for page in ALL_PAGES:
        if page.name == name:
            return page.presets[0].name, page.presets[0].config
    file = Path(name) / "config.json"
    if file.is_file():
        return name, read_config(file)
    if Path(name).is_dir():
        raise DataError(f"{name} holds no config.json, so there is nothing to show")
    try:
        return name, preset(name).config
    except UsageError as error:
        pages = ", ".join(page.name for page in ALL_PAGES)
        raise UsageError(f"{error}; pages: {pages}; or a folder with a config.json") from None


def read_config(file: Path) -> Any:
    """The config of a Hugging Face folder, through its page."""
    try:
        published = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(published, dict):
        raise DataError(f"{file} holds {type(published).__name__}; a model's config is a JSON object")
    for page in ALL_PAGES:
        if page.reads(published):
            return page.read(published)
    known = ", ".join(name for page in ALL_PAGES for name in (page.model_type, *page.also))
    raise DataError(f"{file}: model_type {published.get('model_type')!r} has no page here; known: {known}")


def headline(page: Page) -> str:
    """The first sentence of the page's docstring."""
    return source_docstring(page).split("\n\n")[0].replace("\n", " ").split(". What is new")[0].rstrip(".:")


def source_docstring(page: Page) -> str:
    """The page's own words."""
    module = inspect.getmodule(page.assemble)
    assert module is not None, "a page's assemble lives in its file"
    return inspect.cleandoc(module.__doc__ or "")


def flat(config: Any) -> dict[str, Any]:
    """Field -> value; a rotary and its scaling are written as a few words."""
    return {field.name: plain(getattr(config, field.name)) for field in fields(config)}


def plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return describe_rotary(value) if isinstance(value, Rotary) else str(value)


def parameters_by_part(model: Any) -> dict[str, int]:
    """image encoder, adapter, embedding, mixers, feed-forward, norms, head: every parameter in exactly one part."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return {part: counts[part] for part in PARTS if counts[part]}


PARTS = ("image encoder", "adapter", "embedding", "attention", "feed-forward", "norms", "head", "other")


def part_of(name: str) -> str:
    words = name.removeprefix("decoder.").split(".")
    named = {"tower": "image encoder", "adapter": "adapter", "embed": "embedding", "head": "head"}
    if words[0] in named:
        return named[words[0]]
    if words[0] == "enter" or any("norm" in word for word in words):
        return "norms"
    return "attention" if "mixer" in words else "feed-forward" if "ffn" in words else "other"
