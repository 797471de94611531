"""The record of a model's techniques: which were applied, in order, and how to save and repeat them.

A technique edits a model that may still be without memory (the meta device), so that loading is: assemble the family's
model, repeat the techniques, allocate memory, read the numbers. A module that wraps another one keeps it as its `base`;
`strip_wrapper_names` gives the name that a parameter had before it was wrapped, which the weight map knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from llm_quest.contracts import Technique
from llm_quest.errors import DataError, UsageError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.initialize import init_normal_, materialize
from llm_quest.layers.latent_attention import MultiHeadLatentAttention
from llm_quest.models.decoder import Decoder

Model = TypeVar("Model", bound=Any)
Attention = GroupedQueryAttention | MultiHeadLatentAttention


def record_technique(model: Model, technique: Technique) -> Model:
    """Append the technique to `model.spec` and return the model. The last line of every technique."""
    model.spec = replace(model.spec, techniques=(*model.spec.techniques, technique))
    return model


def require_not_applied(model: Any, technique: Technique) -> None:
    """Raise ValueError if one of this class was applied before: a second one would change the model silently."""
    if any(type(before) is type(technique) for before in model.spec.techniques):
        raise ValueError(
            f"{type(technique).__name__} was applied to this model already, and is applied once: leave this one out"
        )


def require_decoder(model: Any, technique: Any) -> None:
    """Raise UsageError for an image encoder or a vision-language model, whose stream and head are not a decoder's."""
    if not isinstance(model, Decoder):
        raise UsageError(
            f"{type(technique).__name__} edits language models; this is a {model.spec.family} model: leave it out"
        )


def attention_layers(model: nn.Module, technique: Technique) -> list[Any]:
    """Every attention layer, those of multi-token modules included. UsageError if there is none."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise UsageError(f"{type(technique).__name__} acts on attention, and this model has none: leave it out")
    return layers


def techniques_to_json(techniques: Iterable[Technique], table: Mapping[str, type]) -> list[dict[str, Any]]:
    """The techniques as JSON, each under its name in the table."""
    names = {kind: name for name, kind in table.items()}
    return [{"name": names[type(technique)], **asdict(technique)} for technique in techniques]  # type: ignore[call-overload]


def techniques_from_json(entries: Sequence[Mapping[str, Any]], table: Mapping[str, type]) -> list[Technique]:
    """The inverse of `techniques_to_json`. DataError for a technique or an option that this version does not know."""
    return [technique_from_json(entry, table) for entry in entries]


FORMER_NAMES: dict[str, dict[str, str]] = {"int8": {"name": "quantize", "format": "int8"}}
"""Techniques of earlier versions: their name -> what they are called now. Saved models with them still load."""


def technique_from_json(entry: Mapping[str, Any], table: Mapping[str, type]) -> Technique:
    entry = {**entry, **FORMER_NAMES.get(str(entry.get("name")), {})}
    name = str(entry.get("name"))
    if name not in table:
        raise DataError(f"the model was made with a technique called {name!r}; known: {', '.join(table)}")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key != "name"}
    unknown = set(options) - {field.name for field in fields(table[name])}
    if unknown:
        raise DataError(f"the technique {name!r} has no option {', '.join(sorted(unknown))}")
    try:
        technique: Technique = table[name](**options)
    except (TypeError, ValueError) as error:
        raise DataError(f"the technique {name!r} cannot be read: {error}") from None
    return technique


def replay_techniques(model: Model, techniques: Iterable[Technique]) -> Model:
    """Apply a spec's techniques to a new model of its family. One that the config describes already (`exportable`) is
    recorded and not applied again."""
    for technique in techniques:
        model = record_technique(model, technique) if technique.exportable else technique(model)
    return model


def all_exportable(techniques: Iterable[Technique]) -> bool:
    """Do the family's config and tensors describe this model completely?"""
    return all(technique.exportable for technique in techniques)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at this path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def first_floating_parameter(model: nn.Module) -> nn.Parameter:
    """A parameter whose device and dtype a new part takes. The first of a quantized model are codes in int8."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def materialize_part(part: nn.Module, model: Any, seed: int = 0) -> nn.Module:
    """Give a new part (made on the meta device) memory and dtype like the model's, and initial values from a seed;
    where the model has no memory either, it stays as it is."""
    like = first_floating_parameter(model)
    if like.device.type == "meta":
        return part
    materialize(part, "cpu", torch.promote_types(like.dtype, torch.float32))
    out_std = 0.02 / (2 * model.config.num_hidden_layers) ** 0.5
    init_normal_(part, std=0.02, out_std=out_std, generator=torch.Generator().manual_seed(seed))
    part.train(model.training)
    alike = all((own.device, own.dtype) == (like.device, like.dtype) for own in part.parameters())
    return part if alike else part.to(like)  # tensors that only pretend (`quest plan`) cannot be moved


def strip_wrapper_names(name: str) -> str:
    """A parameter's name as if nothing were wrapped."""
    return ".".join(part for part in name.split(".") if part != "base")
