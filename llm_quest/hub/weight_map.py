"""A weight map as views: each published tensor is a view of one of our parameters.

    published  q_proj (4,6)   k_proj (2,6)   v_proj (2,6)            c_attn (6,18)
    ours       qkv[0:4]       qkv[4:6]       qkv[6:8]                qkv.T

Importing copies into the view, exporting copies out of it: one description for both directions. A new kind of table
entry is one more case in `entry_views`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

from torch import Tensor, nn

from llm_quest.errors import UsageError
from llm_quest.layers.experts import Experts
from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.norm import PerHeadLayerNorm
from llm_quest.layers.quantized import QuantizedPackedLinear
from llm_quest.models.weight_names import (
    AlternatingRows,
    ConcatRows,
    PublishedWeight,
    Reshaped,
    RowsByHead,
    StackTensors,
    Transposed,
    WeightMap,
)
from llm_quest.techniques.model_spec import strip_wrapper_names
from llm_quest.techniques.score_head import find_score_head

HEAD, SCORE = "head.weight", "score.weight"
"""The tensor of a score head, by our name and by transformers'."""

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WeightView:
    """The view of a stored tensor in our model: `view(parameter)` shares our memory and has the stored order of
    numbers. Its shape is the stored one, except that the file merges the dimensions `merged` (first to last) into
    one."""

    parameter: str
    view: View
    merged: tuple[int, int] | None = None

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape in the file."""
        dims = list(self.view(parameter).shape)
        if self.merged is None:
            return tuple(dims)
        first, last = (place % len(dims) for place in self.merged)
        return (*dims[:first], math.prod(dims[first : last + 1]), *dims[last + 1 :])

    def as_stored(self, parameter: Tensor) -> Tensor:
        """The stored tensor: a view, or a copy where no view has its shape."""
        return self.view(parameter).reshape(self.shape(parameter))


def weight_views(model: nn.Module, table: WeightMap) -> dict[str, WeightView]:
    """Published name -> its view of this model. A tied matrix appears once, under the name of its first user. Raises
    UsageError if model and table do not cover each other (a model edited without a technique)."""
    ours = dict(model.named_parameters())
    unmatched = [*(ours.keys() - table.keys()), *(table.keys() - ours.keys())]
    if unmatched:
        raise UsageError(
            f"this model's weights have no published form: {compact_names(unmatched)} not in its family's weight map; "
            "merge or remove what was added by hand; a technique would be in the model's spec"
        )
    row_sizes = packed_row_sizes(model)
    views = {
        name: WeightView(path, view, MERGED.get(type(table[path])))
        for path in ours
        for name, view in entry_views(table[path], row_sizes.get(path, ()))
    }
    assert len(views) >= len(ours), "a weight map names one published tensor twice"
    return views


def entry_views(published: PublishedWeight, sizes: tuple[int, ...]) -> Iterator[tuple[str, View]]:
    """The published tensors of one table entry. sizes: how many rows each part of a stacked parameter has."""
    match published:
        case str():
            yield published, lambda parameter: parameter
        case Transposed(name=name):
            yield name, lambda parameter: parameter.mT
        case Reshaped(name=name, shape=shape):
            yield name, lambda parameter: parameter.view(shape)
        case RowsByHead(name=name, heads=heads, parts=parts):
            yield name, lambda parameter: parameter.unflatten(0, (parts, heads, -1)).transpose(0, 1)
        case ConcatRows(names=names):
            starts = accumulate(sizes, initial=0)
            for name, start, size in zip(names, starts, sizes, strict=False):
                yield name, row_view(start, size)
        case AlternatingRows(name=name):
            yield name, alternating_view
        case StackTensors(entries=entries):
            for index, entry in enumerate(entries):
                for name, view in entry_views(entry, sizes):
                    yield name, index_view(index, view)


MERGED = {RowsByHead: (0, 2), AlternatingRows: (-2, -1)}
"""Dimensions of an entry's view that the file merges."""


def alternating_view(parameter: Tensor) -> Tensor:
    """(E,2F,D) as (E,D,F,2), (E,2F) as (E,F,2)."""
    halves = parameter.unflatten(1, (2, -1))
    return halves.movedim(1, -1) if halves.dim() == 3 else halves.permute(0, 3, 2, 1)


def row_view(start: int, size: int) -> View:
    return lambda parameter: parameter.narrow(0, start, size)


def index_view(index: int, view: View) -> View:
    return lambda parameter: view(parameter[index])


def packed_row_sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters that are several projections stacked by rows, with the rows of each."""
    packed = PackedLinear | QuantizedPackedLinear
    modules = ((path, module) for path, module in model.named_modules() if isinstance(module, packed))
    sizes = {f"{path}.{kind}": tuple(m.parts.values()) for path, m in modules for kind in ("weight", "bias")}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            sizes[f"{path}.gate_up"] = (module.down.shape[2],) * 2
        elif isinstance(module, PerHeadLayerNorm):
            sizes[f"{path}.weight"] = (module.head_dim,) * module.num_heads
    return sizes


def export_weight_map(model: nn.Module, table: WeightMap) -> WeightMap:
    """The family's weight map for a model with techniques: wrapped parameters keep their published names; added ones
    have none and keep ours."""
    if not model.spec.techniques:  # type: ignore[union-attr]
        return table
    entries = {name: table.get(strip_wrapper_names(name), name) for name, _ in model.named_parameters()}
    return entries | ({HEAD: SCORE} if find_score_head(model) is not None else {})


def technique_parameters(model: nn.Module, table: WeightMap) -> set[str]:
    """The parameters that only techniques know."""
    return {name for name, _ in model.named_parameters() if strip_wrapper_names(name) not in table}


def identity_weight_map(model: nn.Module) -> WeightMap:
    """The table of our own checkpoints: every parameter under its own name."""
    return {name: name for name, _ in model.named_parameters()}


MOST_NAMES = 12


def compact_names(names: Iterable[str]) -> str:
    """Compress names for a message, with layers merged: 'h.{0-11}.ln_1.bias, wte.weight'; at most MOST_NAMES of them,
    and the number of the rest."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        first = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = name if first is None else f"{name[: first.start()]}\0{name[first.end() :]}"
        numbers.setdefault(pattern, set()).update([] if first is None else [int(first.group())])
    lines = [pattern.replace("\0", format_ranges(layer_numbers)) for pattern, layer_numbers in sorted(numbers.items())]
    rest = f" and {len(lines) - MOST_NAMES} more kinds" if len(lines) > MOST_NAMES else ""
    return ", ".join(lines[:MOST_NAMES]) + rest


def format_ranges(numbers: set[int]) -> str:
    """{0,1,2,5} -> '{0-2,5}'; a single number as it is."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
