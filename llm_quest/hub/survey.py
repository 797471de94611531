"""Find out what a folder holds, and everything that is wrong with it, before a byte of weights is read.

Loading believes a folder only if this finds no problem; `inspect` prints what this found. Nothing is allocated here:
shapes come from the files' headers and from a model assembled on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.contracts import Technique
from llm_quest.errors import DataError
from llm_quest.hub.config import page_for, read_config, read_generation, read_json, uncarded
from llm_quest.hub.fetch import Found
from llm_quest.hub.names import Place, folded, own_names, places, published_names, resolve
from llm_quest.hub.pickled import read_pickled
from llm_quest.hub.tensors import TORCH, WHOLE, Stored, read_header
from llm_quest.layers.head import Unembed
from llm_quest.models.build import Unfilled, skeleton
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.page import Page
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.card import read, replayed

HEAD = "lm_head.weight"
ADDED = "techniques.safetensors"
Source = Stored | Tensor


@dataclass
class Survey:
    """What was found. sources: published name -> where its numbers are. model: on the meta device; None if the config
    is unusable. places: name in the files -> its place in the model. twins: tensors stored twice, (copy, original).
    techniques: what its card says was done to it. problems forbid loading; notes do not."""

    found: Found
    published: Mapping[str, Any] = field(default_factory=dict)
    page: Page | None = None
    model: Decoder | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    sources: dict[str, Source] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    twins: tuple[tuple[str, str], ...] = ()
    techniques: Sequence[Technique] = ()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def survey(found: Found, *, allow_pickle: bool = False) -> Survey:
    """Look at everything; problems are collected, never raised."""
    seen = Survey(found)
    steps = (read_settings, lambda s: read_sources(s, allow_pickle), assemble, match_names, check_shapes, check_tokens)
    for step in steps:
        try:
            step(seen)
        except DataError as error:
            seen.problems.append(str(error))
    return seen


def read_settings(seen: Survey) -> None:
    """config.json (or our model.json) and generation_config.json."""
    if seen.found.run is not None:
        ours = read_json(seen.found.run / "model.json")
        seen.published, advice = ours.get("config") or {}, ours.get("generation") or {}
        listed = ours.get("techniques") or []
    else:
        seen.published, listed = uncarded(read_json(seen.found.folder / "config.json"))
        advice_file = seen.found.folder / "generation_config.json"
        advice = read_json(advice_file) if advice_file.exists() else {}
    seen.generation = read_generation(seen.published, advice)
    seen.techniques = read(listed, TECHNIQUES)
    if listed:
        seen.notes.append(f"techniques, in order: {', '.join(str(one['name']) for one in listed)}")


def read_sources(seen: Survey, allow_pickle: bool) -> None:
    """Single file, or shards with their index; pickled ones only if allowed. What techniques added lies beside them."""
    folder = seen.found.folder
    if (folder / ADDED).exists():
        seen.sources.update(read_header(folder / ADDED))
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        seen.sources.update(read_header(single))
    elif index.exists():
        weight_map = read_index(index)
        for file in shards(seen, folder, weight_map):
            gather(seen, weight_map, file.name, read_header(file))
        seen.problems += lost(seen, weight_map)
    else:
        read_pickles(seen, allow_pickle)


def read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index, limit=64_000_000).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index.name}: has no 'weight_map' from tensors to files")
    return weight_map


def shards(seen: Survey, folder: Path, weight_map: Mapping[str, str]) -> Iterator[Path]:
    """The files an index names, which must lie beside it."""
    for name in sorted({str(file) for file in weight_map.values()}):
        if not re.fullmatch(r"[\w.\-]+", name) or name in (".", ".."):
            seen.problems.append(f"the index names {name!r}, which is no plain file name: shards must lie beside it")
        elif not (folder / name).exists():
            seen.problems.append(f"missing file: {name}")
        else:
            yield folder / name


def gather(seen: Survey, weight_map: Mapping[str, str], file: str, held: Mapping[str, Source]) -> None:
    """Add a shard's tensors; each must be where the index says and nowhere else."""
    for name, source in held.items():
        if weight_map.get(name) != file:
            seen.problems.append(f"{file}: holds {name}, which the index puts into {weight_map.get(name, 'no file')}")
        seen.sources.setdefault(name, source)


def lost(seen: Survey, weight_map: Mapping[str, str]) -> list[str]:
    absent = [name for name in weight_map if name not in seen.sources]
    return [f"promised by the index but in none of its files: {folded(absent)}"] if absent else []


def read_pickles(seen: Survey, allow_pickle: bool) -> None:
    """The old format, or the reason why nothing is read."""
    folder = seen.found.folder
    files = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth") and p.name != "training_args.bin")
    if files and not allow_pickle:
        names = ", ".join(p.name for p in files)
        raise DataError(f"only pickled weights here ({names}), which can run code: allow_pickle=True if you trust them")
    if not files:
        raise DataError("no model.safetensors and no model.safetensors.index.json here")
    for file in files:
        seen.sources.update(read_pickled(file))


def assemble(seen: Survey) -> None:
    """The page, its config, and the model on the meta device. Every layer has tensors of its own, so there are more
    tensors."""
    seen.page = page_for(seen.published)
    config, problems = read_config(seen.page, seen.published)
    seen.problems += problems
    if config is None or problems or not seen.sources:
        return
    if config.layers > len(seen.sources):
        raise DataError(f"config.json: {config.layers:,} layers, but the files hold only {len(seen.sources)} tensors")
    try:
        exact = seen.found.run is not None or seen.techniques  # our own words, which need no settling
        seen.model = skeleton(config if exact else seen.page.settle(config, seen.sources))
        seen.model = repeated(seen.model, seen.techniques)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        seen.model = None
        raise DataError(f"config.json: no model can be made of it: {str(error).splitlines()[0]}") from None


def repeated(model: Decoder, techniques: Sequence[Technique]) -> Decoder:
    """The card, done again on a model without memory."""
    with torch.device("meta"), Unfilled():
        return replayed(model, techniques)


def match_names(seen: Survey) -> None:
    """Every published tensor to its place: what is missing, what is too much."""
    if seen.model is None or seen.page is None:
        return
    ours = seen.found.run is not None
    names = own_names(seen.model) if ours else published_names(seen.model, seen.page.names(seen.model.config))
    table = places(seen.model, names)
    named = {resolve(name, seen.sources, seen.page.optional_prefix): place for name, place in table.items()}
    missing = [name for name in named if name not in seen.sources]
    seen.places = {name: place for name, place in named.items() if name in seen.sources}
    seen.twins = twins(seen)
    copies = {copy for copy, _ in seen.twins}
    extra = [n for n in seen.sources if n not in named and n not in copies and not ignored(n, seen.page)]
    scales = [name for name in extra if name.endswith(("_scale_inv", ".weight_scale"))]
    if missing:
        seen.problems.append(f"missing: {folded(missing)}")
    if scales:
        seen.problems.append(
            f"fp8 weights with scales ({folded(scales)}) are not read: use the bf16 version of the model"
        )
    if unexpected := [name for name in extra if name not in scales]:
        seen.problems.append(f"unexpected: {folded(unexpected)}")


def twins(seen: Survey) -> tuple[tuple[str, str], ...]:
    """A tied head may be stored a second time; it must then be equal, which is checked when its numbers are read."""
    assert seen.model is not None
    assert seen.page is not None
    copies = tuple(pair for pair in seen.page.copies(seen.model.config).items() if pair[0] in seen.sources)
    parameters = dict(seen.model.named_parameters())
    heads = {id(module.weight) for module in seen.model.modules() if isinstance(module, Unembed)}
    originals = [name for name, place in seen.places.items() if id(parameters[place.parameter]) in heads]
    stored = [name for name in seen.sources if name.endswith(HEAD) and name not in seen.places and originals]
    return (*((name, originals[0]) for name in stored), *copies)


def ignored(name: str, page: Page) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in page.ignore)


def check_shapes(seen: Survey) -> None:
    """Each stored tensor must have the shape and kind its place has."""
    if seen.model is None:
        return
    parameters = dict(seen.model.named_parameters())
    shapes = {name: tuple(place.view(parameters[place.parameter]).shape) for name, place in seen.places.items()}
    shapes |= {copy: shapes[original] for copy, original in seen.twins}
    for name, expected in shapes.items():
        source = seen.sources[name]
        if tuple(source.shape) != expected:
            seen.problems.append(f"mis-shaped: {name} is {tuple(source.shape)}, config.json makes it {expected}")
    numbers = {name for name, place in seen.places.items() if not parameters[place.parameter].is_floating_point()}
    seen.problems += wrong_kinds(seen.sources[name] for name in shapes if name not in numbers)
    if odd := [name for name in numbers if seen.sources[name].dtype not in WHOLE]:
        seen.problems.append(f"stored as floats, but whole numbers were expected: {folded(odd)}")


def wrong_kinds(sources: Iterable[Source]) -> list[str]:
    kinds = {source.dtype for source in sources}
    wrong = sorted(str(kind) for kind in kinds if kind not in TORCH and kind not in TORCH.values())
    return [f"stored as {', '.join(wrong)}: only plain float weights ({', '.join(TORCH)}) are read"] if wrong else []


def check_tokens(seen: Survey) -> None:
    """The embedding needs a row for every token id."""
    if seen.model is None or isinstance(seen.model, ImageEncoder):
        return
    rows, biggest = seen.model.config.vocab, largest_token(seen.found.folder / "tokenizer.json")
    if biggest >= rows:
        ids = f"{rows} rows (ids 0 to {rows - 1})"
        seen.problems.append(f"tokenizer.json has token id {biggest}, but the embedding has only {ids}")
    if beyond := [token for token in seen.generation.eos if not 0 <= token < rows]:
        seen.notes.append(f"end-of-text ids {beyond} are outside the vocabulary of {rows}: they will never end a text")


def largest_token(file: Path) -> int:
    """The largest id a tokenizer.json can give, -1 without one."""
    if not file.exists():
        return -1
    content = read_json(file, limit=128_000_000)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [token.get("id") for token in content.get("added_tokens") or [] if isinstance(token, dict)]
    return max((i for i in [*ids, *added] if type(i) is int), default=-1)


def common_dtype(sources: Mapping[str, Source]) -> torch.dtype:
    """The dtype of the largest tensor of plain floats."""
    floats = [source for source in sources.values() if isinstance(source, Tensor) or source.dtype in TORCH]
    largest = max(floats, key=lambda source: source.nbytes)
    return largest.dtype if isinstance(largest, Tensor) else TORCH[largest.dtype]
