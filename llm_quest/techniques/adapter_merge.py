"""Turns adapters off for a while, merges them into the matrices they edit, and takes a merge back to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from llm_quest.contracts import ModelSpec
from llm_quest.errors import UsageError
from llm_quest.layers.low_rank import AdaptedExperts, AdapterLayer, adapter_layers
from llm_quest.layers.quantized import QuantizedMatrix
from llm_quest.models.build import build_meta_model
from llm_quest.techniques.lora import is_adapter, whole_modules
from llm_quest.techniques.model_spec import replace_module, strip_wrapper_names


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within this context the model is as it was before it was adapted, in the same memory: the reference of preference
    learning."""
    adapters = require_adapters(model)
    if whole := [name for technique in model.spec.techniques for name in whole_modules(technique)]:  # type: ignore[union-attr]
        raise UsageError(
            f"without its adapter this model is not what it was before: {', '.join(whole[:3])} learned whole; load the "
            "base once more as the reference"
        )
    before = [wrapper.enabled for wrapper in adapters.values()]
    try:
        for wrapper in adapters.values():
            wrapper.enabled = False
        yield
    finally:
        for wrapper, on in zip(adapters.values(), before, strict=True):
            wrapper.enabled = on


@dataclass(frozen=True)
class MergeRecord:
    """What `unmerge_adapter` needs: the wrapped layers, the matrices as they were, the spec, the names of what was
    trained."""

    wrappers: dict[str, AdapterLayer]
    originals: dict[str, nn.Parameter] = field(repr=False)
    spec: ModelSpec
    trainable: frozenset[str]


@torch.no_grad()
def merge_adapter(model: Any) -> MergeRecord:
    """Merge the adapters into the matrices: the model is then one of its family again, as trainable as a new one.
    `unmerge_adapter` with the returned record restores every bit; drop the record to free the original matrices."""
    adapters = require_adapters(model)
    if any(isinstance(module, QuantizedMatrix) for module in model.modules()):
        raise UsageError(
            "this adapter's base is quantized, and merging would round its weights once more: save the adapter "
            "(save_adapter, or quest export --adapter), load it onto the float model (load_adapter), and merge there"
        )
    trainable = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    originals = {}
    for path, wrapper in adapters.items():
        for name in matrix_names(wrapper):
            before = getattr(wrapper.base, name)
            originals[f"{path}.{name}"] = before
            setattr(wrapper.base, name, nn.Parameter(getattr(wrapper, name).to(before.dtype)))
        replace_module(model, path, wrapper.base)
    record = MergeRecord(adapters, originals, model.spec, trainable)
    model.spec = replace(
        model.spec, techniques=tuple(technique for technique in model.spec.techniques if not is_adapter(technique))
    )
    restore_trainable(model)
    return record


def unmerge_adapter(model: Any, record: MergeRecord) -> None:
    """Restore the adapted model as it was before `merge_adapter`, to the bit."""
    if any(model.get_submodule(path) is not wrapper.base for path, wrapper in record.wrappers.items()):
        raise UsageError(
            "this record is of another merge: call unmerge_adapter once, with what merge_adapter of this model returned"
        )
    for path, wrapper in record.wrappers.items():
        for name in matrix_names(wrapper):
            setattr(wrapper.base, name, record.originals[f"{path}.{name}"])
        replace_module(model, path, wrapper)
    model.spec = record.spec
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.trainable)


def matrix_names(wrapper: AdapterLayer) -> tuple[str, ...]:
    """The names of the matrices that a wrapper edits."""
    return ("gate_up", "down") if isinstance(wrapper, AdaptedExperts) else ("weight",)


def restore_trainable(model: Any) -> None:
    """Make the same parameters trainable as in a new model of this family (a router's balancing bias is not)."""
    fresh = {name: parameter.requires_grad for name, parameter in build_meta_model(model.config).named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(fresh.get(strip_wrapper_names(name), True))


def require_adapters(model: nn.Module) -> dict[str, AdapterLayer]:
    adapters = adapter_layers(model)
    if not adapters:
        raise UsageError("this model has no adapter: none was applied, or it was merged already")
    return adapters
