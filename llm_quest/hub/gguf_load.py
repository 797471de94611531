"""Reads a GGUF file like a published folder: its keys as a config.json, its tensors as sources of weights.

`hub/validate.py` calls this for a .gguf file, and finds missing, unexpected and mis-shaped tensors as in any folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quest.errors import DataError
from llm_quest.hub.gguf import TOKENIZER, GGUFFile, read_gguf, tensor_nbytes
from llm_quest.hub.gguf_blocks import PLAIN, READ_TYPES, EncodedTensor
from llm_quest.hub.gguf_config import layout_for, read_hf_config
from llm_quest.hub.gguf_layouts import SAMPLING
from llm_quest.hub.gguf_rope import FACTOR_TENSORS
from llm_quest.hub.gguf_tensors import CHANGES, Place, gguf_places
from llm_quest.hub.safetensors_io import StoredTensor
from llm_quest.hub.weight_map import WeightView
from llm_quest.models.decoder import Decoder, GenerationConfig

Source = StoredTensor | EncodedTensor
Matched = tuple[dict[str, Source], dict[str, WeightView]]
"""Stored tensors, and of each its place in the model, under the same names."""


def open_model_file(file: Path) -> GGUFFile:
    """Read the header of a model's file. DataError for an adapter or another kind of file."""
    gguf_file = read_gguf(file)
    kind = gguf_file.get("general.type", "model")
    if kind != "model":
        raise DataError(
            f"{file.name} is no model: general.type is {str(kind)[:40]!r}; name the model that belongs to it"
        )
    return gguf_file


def file_config(file: GGUFFile) -> tuple[dict[str, Any], GenerationConfig]:
    """The config.json and the GenerationConfig of a file."""
    ids = {name: token_id(file, f"{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = tuple(number for name in ("eos", "eot", "eom") if (number := ids[name]) is not None)
    sampling = {ours: file.get(f"general.sampling.{theirs}") for ours, theirs in SAMPLING.items()}
    known = {name: value for name, value in sampling.items() if type(value) in (int, float)}
    return read_hf_config(file), GenerationConfig(ids["bos"], tuple(dict.fromkeys(ends)), ids["padding"], **known)


def token_id(file: GGUFFile, name: str) -> int | None:
    number = file.get(TOKENIZER + name)
    return number if type(number) is int else None


def tensor_sources(file: GGUFFile) -> dict[str, StoredTensor]:
    """The tensors that are weights. DataError for types that are not read."""
    weights = {name: tensor for name, tensor in file.tensors.items() if name not in FACTOR_TENSORS}
    odd = sorted({tensor.dtype for tensor in weights.values()} - set(READ_TYPES))
    if odd:
        raise DataError(
            f"{file.file.name}: tensors are stored as {', '.join(odd)}; {', '.join(READ_TYPES)} are read: take a file "
            "in one of these"
        )
    if not weights:
        raise DataError(f"{file.file.name} holds no weights")
    return weights


def match_tensors(model: Decoder, stored: Mapping[str, StoredTensor]) -> Matched:
    """Match every tensor with its view of the model; a tensor of several views is split by rows. One without a view
    keeps its name, and a missing one has a view alone."""
    parameters = dict(model.named_parameters())
    places = gguf_places(model, layout_for(model))
    sources: dict[str, Source] = {name: tensor for name, tensor in stored.items() if name not in places}
    views: dict[str, WeightView] = {}
    for name, parts in places.items():
        start = 0
        for number, place in enumerate(parts):
            part = name if len(parts) == 1 else f"{name}[{number}]"
            views[part] = place.view
            shape = place.view.shape(parameters[place.view.parameter])
            if name in stored:
                rows = stored[name] if len(parts) == 1 else slice_stored_rows(stored[name], start, shape)
                sources[part] = as_source(rows, shape, place)
                start += shape[0]
    return sources, views


def slice_stored_rows(stored: StoredTensor, start: int, shape: tuple[int, ...]) -> StoredTensor:
    """Some rows of a stored matrix; all of it if they are beyond its end."""
    if len(stored.shape) != len(shape) or start + shape[0] > stored.shape[0]:
        return stored
    row = tensor_nbytes(stored.dtype, stored.shape) // max(1, stored.shape[0])
    own = (shape[0], *stored.shape[1:])
    return dataclasses.replace(stored, shape=own, start=stored.start + start * row, nbytes=shape[0] * row)


def as_source(stored: StoredTensor, shape: tuple[int, ...], place: Place) -> Source:
    """Plain floats as they are; blocks, and numbers that are changed, decoded while they are read. Dimensions of 1 at
    the front, which other writers leave out or add, are no difference."""
    if without_ones(stored.shape) == without_ones(shape):
        stored = dataclasses.replace(stored, shape=shape)
    if stored.dtype in PLAIN and not place.change:
        return stored
    return EncodedTensor(stored, CHANGES[place.change][1] if place.change else None)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    first = next((at for at, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]
