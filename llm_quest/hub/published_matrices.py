"""The published matrices that an adapter may edit, and the place of each of our parts in them.

Experts are one parameter a layer in transformers. PEFT stores the low-rank matrices of all of them as one linear layer
each, with the expert as the slowest index of A's rows and the fastest of B's columns:

      A (E r,in) = [A_0; A_1; ...]      B (out,r E): column k E + e is column k of B_e
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.errors import DataError, UsageError
from llm_quest.hub.adapter_config import module_rank
from llm_quest.hub.layouts import fused_experts
from llm_quest.layers.linear import PackedLinear, find_row_slice
from llm_quest.layers.low_rank import expert_parts
from llm_quest.models import FAMILIES
from llm_quest.models.build import build_meta_model, family_of
from llm_quest.models.weight_names import AlternatingRows, ConcatRows, RowsByHead, Transposed, WeightMap
from llm_quest.techniques.adapter_targets import TargetMatrix, target_matrices

GATE_UP, DOWN, BASE_LAYER = "gate_up_proj", "down_proj", ".base_layer"


@dataclass(frozen=True)
class PublishedMatrix:
    """The place of an address in the published model: rows of the matrix of a module, whose shape is (out, width). Of
    a matrix that is stored head by head the rows of a part are a list, and `order` has the stored row of each of ours.
    num_experts: of a stack, whose `module` is the parameter; 0 for a matrix of its own."""

    module: str
    rows: slice | list[int]
    out_features: int
    in_features: int
    order: list[int] | None = None
    num_experts: int = 0

    @property
    def is_whole(self) -> bool:
        return self.rows == slice(0, self.out_features)


@dataclass(frozen=True)
class LoRAPair:
    """One published matrix's adapter, A (r,in) and B (out,r); of a stack of experts (E,r,in) and (E,out,r). magnitude:
    DoRA's. scale: of the product, where it does not follow from the rank that the config names."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None
    scale: float | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def base_matrices(config: Any) -> dict[str, PublishedMatrix]:
    """Address -> place in the published model, for every matrix that an adapter may edit."""
    family = family_of(config)
    if family not in FAMILIES:
        raise UsageError(f"adapters of {family.name} have no PEFT form here: merge, and save the whole model")
    meta_model, table, matrices = build_meta_model(config), family.weight_map(config), {}
    for site in target_matrices(meta_model):
        match table.get(f"{site.path}.weight"):
            case ConcatRows(names=names):
                module: Any = meta_model.get_submodule(site.path)
                matrices[site.address] = locate_matrix(names[list(module.parts).index(site.part)], site)
            case RowsByHead(name=name, heads=heads):
                matrices[site.address] = locate_rows_by_head(name, site, meta_model.get_submodule(site.path), heads)
            case str(name) | Transposed(name=name):
                matrices[site.address] = locate_matrix(name, site, meta_model.get_submodule(site.path))
            case None if f"{site.path}.down" in table:
                matrices[site.address] = locate_experts(site, meta_model.get_submodule(site.path), table)
    return matrices


def locate_matrix(name: str, site: TargetMatrix, packed: nn.Module | None = None) -> PublishedMatrix:
    """The place of a matrix in the published model. packed: the layer, where its whole matrix is published as one."""
    rows, width = site.weight.shape
    module = name.removesuffix(".weight")
    if isinstance(packed, PackedLinear):
        return PublishedMatrix(module, packed.row_slice(site.part), packed.out_features, width)
    return PublishedMatrix(module, slice(0, rows), rows, width)


def locate_rows_by_head(name: str, site: TargetMatrix, packed: Any, heads: int) -> PublishedMatrix:
    """The rows of one part of a matrix that is stored head by head."""
    stored = torch.arange(packed.out_features).view(heads, len(packed.parts), -1)
    order: list[int] = stored.transpose(0, 1).flatten().tolist()
    module, own = name.removesuffix(".weight"), order[packed.row_slice(site.part)]
    return PublishedMatrix(module, own, packed.out_features, site.weight.shape[1], order)


def locate_experts(site: TargetMatrix, experts: Any, table: WeightMap) -> PublishedMatrix:
    """The rows of gate, up or down in the parameter that transformers stacks the experts in."""
    num_experts, rows, width = site.weight.shape
    ours = f"{site.path}.{'down' if site.part == 'down' else 'gate_up'}"
    entry: Any = table[ours]
    name = fused_experts({ours: entry}).get(ours) or entry.name
    module = name.replace(".block_sparse_moe.", ".mlp.")  # Mixtral's files have an older name than its class
    if site.part == "down":
        return PublishedMatrix(module, slice(0, rows), rows, width, num_experts=num_experts)
    parts = expert_parts(experts)
    out, own = sum(parts.values()), find_row_slice(parts, site.part)
    alternating = list(range(own.start // rows, out, len(parts)))
    place = alternating if isinstance(entry, AlternatingRows) else own
    return PublishedMatrix(module, place, out, width, num_experts=num_experts)


def stack_experts_pair(pair: LoRAPair, num_experts: int) -> LoRAPair:
    """Unflatten PEFT's matrices of all experts into stacks; unchanged if the sizes do not divide (an adapter of another
    base)."""
    if pair.A.shape[0] % num_experts or pair.B.shape[1] % num_experts:
        return pair
    return LoRAPair(
        pair.A.unflatten(0, (num_experts, -1)), pair.B.unflatten(1, (-1, num_experts)).permute(2, 0, 1), pair.magnitude
    )


def flatten_experts(pair: LoRAPair) -> LoRAPair:
    """The inverse of `stack_experts_pair`."""
    return LoRAPair(pair.A.flatten(0, 1), pair.B.permute(1, 2, 0).flatten(1))


def experts_module(parameter: str, adapted: Container[str]) -> str:
    """The module under whose name PEFT stores the adapter of an experts' parameter. adapted: all parameters."""
    parent, _, name = parameter.rpartition(".")
    return parent + BASE_LAYER if name == GATE_UP and f"{parent}.{DOWN}" in adapted else parent


def experts_parameters(modules: Sequence[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Module as stored (`mlp.experts.base_layer`) -> parameter, for the experts among these modules, as
    target_parameters names them. DataError where it names others than the file holds."""
    published: dict[str, str] = {}
    targets = config.get("target_parameters") or ()
    for parent in {bare for name in modules if (bare := name.replace(BASE_LAYER, "")).endswith(".experts")}:
        stored = sorted({name for name in modules if name.replace(BASE_LAYER, "") == parent}, reverse=True)
        full = [f"{parent}.{name}" for name in (GATE_UP, DOWN)]
        named = [name for name in full if any(f".{name}".endswith(f".{target}") for target in targets)]
        if len(named) != len(stored):
            raise DataError(
                f"adapter_config.json: target_parameters {list(targets)} names {len(named)} parameters of {parent}, "
                f"the file adapts {len(stored)}; only {GATE_UP} and {DOWN} are read"
            )
        published |= dict(zip(stored, named, strict=True))
    return published


def check_rank(folder: Path, config: Mapping[str, Any], module: str, pair: LoRAPair) -> None:
    """Raise DataError if the file's rank is not the config's, from which the scale is computed."""
    expected_rank, rank = module_rank(config, module), pair.rank
    if expected_rank != rank:
        raise DataError(
            f"{folder}: {module} has rank {rank}, r and rank_pattern make it {expected_rank}: the files do not fit"
        )
