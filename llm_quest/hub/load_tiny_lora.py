"""TinyLoRA as PEFT saves it (peft_type TINYLORA): of each matrix the frozen A and B and the fixed P; and the trained
vectors, numbered by group.

      base_model.model.model.layers.0.mlp.down_proj.tinylora_A, _B, _P          base_model.tinylora_v.0

Which matrix reads which vector is not in the file: it follows from the order of the modules in the published model. P
shows whether that order is ours, for matrix number i draws it with the seed plus i. (What we save is the plain LoRA
that it amounts to, `save_adapter.py`: that form has a place for the parts of a matrix too.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quest.errors import DataError
from llm_quest.hub.published_matrices import base_matrices
from llm_quest.hub.save_adapter import WEIGHTS, adapter_edits, read_adapter_tensors
from llm_quest.hub.weight_map import compact_names
from llm_quest.techniques.adapter_targets import TargetMatrix, select_targets, shortest_targets
from llm_quest.techniques.lora import TinyLoRA

VECTOR = "base_model.tinylora_v."
PART = re.compile(r"base_model\.model\.(.+)\.tinylora_([ABP])")
PROJECTION_TOLERANCE = 0.02
"""Projections of unit size that agree so far are the same ones, rounded."""


@torch.no_grad()
def load_tiny_lora(model: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """Load a TinyLoRA adapter onto a model; DataError if its vectors cannot be assigned with certainty."""
    tensors = read_adapter_tensors(
        folder / WEIGHTS, lambda name: name.startswith(VECTOR) or PART.fullmatch(name) is not None
    )
    parts = tensors_by_address(model, folder, tensors)
    technique = tiny_lora_from_peft(folder, config, shortest_targets(model, set(parts)))
    sites = select_targets(model, technique.targets)
    check_projections(folder, technique, sites, parts)
    vectors = {name.removeprefix(VECTOR): tensor for name, tensor in tensors.items() if name.startswith(VECTOR)}
    vector_indices = [technique.vector_index(index, len(sites)) for index in range(len(sites))]
    if {*vectors} != {*map(str, vector_indices)} or any(v.shape != (technique.u,) for v in vectors.values()):
        raise DataError(
            f"{folder} holds {len(vectors)} vectors; {len({*vector_indices})} of u {technique.u} were expected"
        )
    technique(model)
    for (address, edit, _), number in zip(adapter_edits(model), vector_indices, strict=True):
        low: Any = edit
        theirs = parts[address] | {"v": vectors[str(number)]}
        for parameter, name in ((low.A, "A"), (low.B, "B"), (low.core.P, "P"), (low.core.v, "v")):
            parameter.copy_(theirs[name])
    return model


def tensors_by_address(model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the tensors: our address -> A, B and P."""
    addresses = {place.module: address for address, place in base_matrices(model.config).items() if place.is_whole}
    by_address: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (part := PART.fullmatch(name)) is not None:
            by_address.setdefault(part[1], {})[part[2]] = tensor
    if unmatched := [module for module in by_address if module not in addresses]:
        raise DataError(
            f"{folder}: {compact_names(unmatched)} is no matrix of this model, or one that is edited here in parts, "
            "for which one vector has no place: load it on its own base, or merge it in PEFT"
        )
    if incomplete := [module for module, one in by_address.items() if set(one) != set("ABP")]:
        raise DataError(
            f"{folder}: tinylora_A, _B or _P is missing of {compact_names(incomplete)}; save the adapter with "
            "save_projection=True, for P tells which vector a matrix reads"
        )
    return {addresses[module]: one for module, one in by_address.items()}


def tiny_lora_from_peft(folder: Path, config: Mapping[str, Any], targets: Sequence[str]) -> TinyLoRA:
    u, tying, seed = (config.get(name) for name in ("u", "weight_tying", "projection_seed"))
    if (
        type(u) is not int
        or type(seed) is not int
        or not isinstance(tying, int | float)
        or not 0 <= tying <= 1
        or u < 1
    ):
        raise DataError(
            f"{folder}: u {u!r}, weight_tying {tying!r}, projection_seed {seed!r} are no TinyLoRA's numbers"
        )
    if config.get("tinylora_dropout"):
        raise DataError(f"{folder}: tinylora_dropout is not computed here; set it to 0, or merge the adapter in PEFT")
    return TinyLoRA(config["r"], u, float(tying), tuple(targets), seed)


def check_projections(
    folder: Path, technique: TinyLoRA, sites: Sequence[TargetMatrix], parts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Raise DataError unless the file's matrices are this model's, in our order."""
    for index, site in enumerate(sites):
        one, (rows, width), r = parts[site.address], site.weight.shape, technique.rank
        shapes = {"A": (r, width), "B": (rows, r), "P": (technique.u, r, r)}
        if odd := [name for name, shape in shapes.items() if one[name].shape != shape]:
            raise DataError(
                f"{folder} is an adapter of another base, or of another size: tinylora_{odd[0]} of {site.address} is "
                f"{tuple(one[odd[0]].shape)}, {shapes[odd[0]]} was expected"
            )
        drawn = technique.projections(site.weight.new_empty(rows, width, device="cpu"), index)
        if (drawn.float() - one["P"].float()).abs().max() > PROJECTION_TOLERANCE:
            raise DataError(
                f"{folder}: the projections of {site.address} are not those of seed {technique.seed} at place {index}, "
                "so which vector it reads is not known here: merge the adapter in PEFT"
            )
