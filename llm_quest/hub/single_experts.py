"""Adapters of single experts. Where experts are modules of their own (transformers 4: `mlp.experts.3.up_proj`,
Mixtral's `block_sparse_moe.experts.3.w1`), PEFT writes a pair for each; here one layer's experts are a stack, so their
pairs are stacked: padded to the largest rank, and rescaled to one scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llm_quest.errors import DataError
from llm_quest.hub.adapter_config import module_scale
from llm_quest.hub.published_matrices import LoRAPair, PublishedMatrix, check_rank
from llm_quest.models.build import build_meta_model, family_of
from llm_quest.models.weight_names import ConcatRows, StackTensors
from llm_quest.techniques.adapter_targets import target_matrices

Place = tuple[str, int, PublishedMatrix]
"""The address of a stack, an expert's number in it, and the matrix of the whole stack."""


def expert_places(config: Any) -> dict[str, Place]:
    """Module of one expert, as published -> its place here. Empty for a model without such modules."""
    table, places = family_of(config).weight_map(config), {}
    for site in target_matrices(build_meta_model(config)):
        entry = table.get(f"{site.path}.{'down' if site.part == 'down' else 'gate_up'}")
        if isinstance(entry, StackTensors) and site.weight.dim() == 3:
            num_experts, rows, width = site.weight.shape
            matrix = PublishedMatrix(site.address, slice(0, rows), rows, width, num_experts=num_experts)
            for number, names in enumerate(entry.entries):
                joined = names.names[0 if site.part == "gate" else -1] if isinstance(names, ConcatRows) else names
                places[joined.removesuffix(".weight")] = (site.address, number, matrix)
    return places


def stack_expert_pairs(
    folder: Path, config: Mapping[str, Any], pairs: Mapping[str, LoRAPair], places: Mapping[str, Place]
) -> dict[str, LoRAPair]:
    """Stack the pairs of single experts, by address. An expert without a pair has zeros. DataError for one that does
    not fit, and for what cannot be stacked."""
    stacks: dict[str, dict[int, tuple[LoRAPair, float]]] = {}
    matrices = {address: matrix for address, _, matrix in places.values()}
    for module in pairs.keys() & places.keys():
        pair, (address, number, matrix) = pairs[module], places[module]
        require_fit(folder, config, module, pair, matrix)
        stacks.setdefault(address, {})[number] = pair, module_scale(config, module, pair.rank)
    return {address: stack_pairs(single, matrices[address]) for address, single in sorted(stacks.items())}


def require_fit(folder: Path, config: Mapping[str, Any], module: str, pair: LoRAPair, matrix: PublishedMatrix) -> None:
    """Raise DataError for a pair of another base or rank, and for forms that are not supported for experts."""
    start = str(config.get("init_lora_weights")).lower()
    if pair.magnitude is not None or start in ("pissa", "olora"):
        kind = "DoRA" if pair.magnitude is not None else start
        raise DataError(
            f"{folder}: {module} is adapted by {kind}; of single experts only LoRA is read: merge it in PEFT"
        )
    if pair.A.shape[1:] != (matrix.in_features,) or pair.B.shape != (matrix.out_features, pair.rank):
        raise DataError(
            f"{folder} is an adapter of another base: at {module} it maps {pair.A.shape[-1]} to {pair.B.shape[0]} "
            f"numbers, this model {matrix.in_features} to {matrix.out_features}"
        )
    check_rank(folder, config, module, pair)


def stack_pairs(single: Mapping[int, tuple[LoRAPair, float]], matrix: PublishedMatrix) -> LoRAPair:
    """Stack the pairs of some experts to one pair (E,r,in), (E,out,r)."""
    (first, scale), rank = next(iter(single.values())), max(pair.rank for pair, _ in single.values())
    A = torch.zeros(matrix.num_experts, rank, matrix.in_features, dtype=first.A.dtype)
    B = torch.zeros(matrix.num_experts, matrix.out_features, rank, dtype=first.B.dtype)
    for number, (pair, own) in single.items():
        A[number, : pair.rank], B[number, :, : pair.rank] = pair.A, pair.B * (own / scale)
    return LoRAPair(A, B, scale=scale)
