"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, whose tensors are named after the
published modules that they edit (`adapters.py` reads it).

LoRA-XS and TinyLoRA are written as the plain LoRA they amount to (their core goes into B). Where the published model
has one matrix and we edit its parts apart (GPT-2's c_attn), A's are stacked and B's lie on the diagonal:

      A = [A_q; A_k; A_v]     B = [B_q 0 0; 0 B_k 0; 0 0 B_v]     rank 3 r, and alpha so much larger that s is the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_quest.disk import write_json
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.names import folded
from llm_quest.hub.staging import staged
from llm_quest.hub.tensors import TORCH, read_header, read_into
from llm_quest.layers.low_rank import Adapted, AdaptedProjections, Directed, LowRank, row_norms
from llm_quest.layers.projections import Projections
from llm_quest.models import PAGES
from llm_quest.models.build import page_of, skeleton
from llm_quest.models.page import Rows, Transposed
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA, is_adapter, require_adapters
from llm_quest.techniques.targets import Site, sites
from llm_quest.tensor_files import write_tensors

CONFIG, WEIGHTS, ROOT = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


@dataclass(frozen=True)
class Place:
    """Where an address lies in the published model: rows of the matrix of a module, whose shape is (out, width)."""

    module: str
    rows: slice
    out: int
    width: int

    @property
    def whole(self) -> bool:
        return self.rows == slice(0, self.out)


@dataclass(frozen=True)
class Pair:
    """One published matrix's adapter. magnitude: DoRA's."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None


def places_of(config: Any) -> dict[str, Place]:
    """Address -> place, for every matrix of this page that is one in the published model too (experts are stacked
    there)."""
    page = page_of(config)
    if page not in PAGES:
        raise UsageError(f"adapters of {page.name} have no PEFT form here: merge, and save the whole model")
    bare, table, found = skeleton(config), page.names(config), {}
    for site in sites(bare):
        match table.get(f"{site.path}.weight"):
            case Rows(names=names):
                module: Any = bare.get_submodule(site.path)
                found[site.address] = place(names[list(module.parts).index(site.part)], site)
            case str(name) | Transposed(name=name):
                found[site.address] = place(name, site, bare.get_submodule(site.path))
    return found


def place(name: str, site: Site, stack: nn.Module | None = None) -> Place:
    """stack: the layer, where its whole matrix is published as one."""
    rows, width = site.weight.shape
    module = name.removesuffix(".weight")
    if isinstance(stack, Projections):
        return Place(module, stack.rows(site.part), stack.out_features, width)
    return Place(module, slice(0, rows), rows, width)


def read_tensors(file: Path, known: Callable[[str], bool]) -> dict[str, Tensor]:
    """Every tensor of an adapter's file, by name. DataError where there is none, for names that are not known and for
    numbers that are not finite."""
    if not file.exists():
        raise DataError(f"{file.parent} has no {file.name}; save the adapter with safe_serialization=True")
    header = read_header(file)
    unknown = [name for name, stored in header.items() if not known(name) or stored.dtype not in TORCH]
    found = {
        name: torch.empty(stored.shape, dtype=TORCH[stored.dtype])
        for name, stored in header.items()
        if name not in unknown
    }
    bad = [name for name, tensor in found.items() if read_into(header[name], tensor)]
    if unknown or bad or not found:
        what = f"not finite: {folded(bad)}" if bad else f"not read here: {folded(unknown) or 'it is empty'}"
        raise DataError(f"{file}: {what}; only adapters of linear layers are")
    return found


def save_adapter(model: Any, folder: str | Path, *, base: str | None = None, overwrite: bool = False) -> Path:
    """The adapter alone, as PEFT's `PeftModel.from_pretrained` reads it. base: where the model underneath is (a folder
    or hub id), for readers who want to find it.

    Raises UsageError without an adapter, or for one that PEFT has no form for: of experts, of models that see."""
    pairs = pairs_of(model)
    tensors = {name: tensor for module, pair in pairs.items() for name, tensor in named(module, pair)}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    ours = {CONFIG, WEIGHTS}.__contains__
    with staged(folder, overwrite=overwrite, ours=ours, needed=size + 2**20) as stage:
        write_json(stage / CONFIG, config_of(model, pairs, base))
        write_tensors(stage / WEIGHTS, tensors)
    return Path(folder)


@torch.no_grad()
def pairs_of(model: Any) -> dict[str, Pair]:
    """Published module -> its adapter."""
    where = places_of(model.config)
    grouped: dict[str, list[tuple[Place, nn.Module, Tensor]]] = {}
    for address, edit, weight in edits(model):
        if address not in where:
            raise UsageError(f"PEFT has no form for an adapter of {address}: merge, and save the whole model")
        grouped.setdefault(where[address].module, []).append((where[address], edit, weight))
    return {module: joined(parts) for module, parts in grouped.items()}


def edits(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Address, edit, and the layer's whole matrix."""
    for path, wrapper in require_adapters(model).items():
        if isinstance(wrapper, Adapted):
            yield path, wrapper.edit, wrapper.base.weight
        elif isinstance(wrapper, AdaptedProjections):
            yield from ((f"{path}.{part}", edit, wrapper.base.weight) for part, edit in wrapper.edits.items())
        else:
            yield from ((f"{path}.{part}", edit, wrapper.base.down) for part, edit in wrapper.edits.items())


def joined(parts: Sequence[tuple[Place, nn.Module, Tensor]]) -> Pair:
    """One published matrix's adapter, from those of its parts."""
    if parts[0][0].whole:
        return pair(parts[0][1])
    ours, (first, _, weight) = [pair(edit) for _, edit, _ in parts], parts[0]
    B = weight.new_zeros(first.out, sum(one.A.shape[0] for one in ours))
    magnitude, column = row_norms(weight), 0
    for (where, _, _), one in zip(parts, ours, strict=True):
        B[where.rows, column : column + one.A.shape[0]] = one.B
        column += one.A.shape[0]
        if one.magnitude is not None:
            magnitude[where.rows] = one.magnitude
    return Pair(torch.cat([one.A for one in ours]), B, magnitude if ours[0].magnitude is not None else None)


def pair(edit: nn.Module) -> Pair:
    """A plain A and B: what lies between them goes into B."""
    low: Any = edit.low if isinstance(edit, Directed) else edit
    assert isinstance(low, LowRank)
    core = low.core(torch.eye(low.A.shape[0], dtype=low.A.dtype, device=low.A.device)).mT
    return Pair(low.A, low.B @ core, edit.magnitude if isinstance(edit, Directed) else None)


def named(module: str, pair: Pair) -> Iterator[tuple[str, Tensor]]:
    yield f"{ROOT}{module}.lora_A.weight", pair.A.contiguous()
    yield f"{ROOT}{module}.lora_B.weight", pair.B.contiguous()
    if pair.magnitude is not None:
        yield f"{ROOT}{module}.lora_magnitude_vector", pair.magnitude.contiguous()


def config_of(model: Any, pairs: Mapping[str, Pair], base: str | None) -> dict[str, Any]:
    """adapter_config.json."""
    technique: Any = next(one for one in model.card.techniques if is_adapter(one))
    rank, stable = technique.rank, isinstance(technique, RsLoRA)
    wide = {module: one.A.shape[0] for module, one in pairs.items() if one.A.shape[0] != rank}
    alpha = ALPHA[type(technique)](technique)
    root = math.sqrt if stable else float
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": technique.dropout if isinstance(technique, LoRA | RsLoRA | DoRA) else 0.0,
        "target_modules": target_modules(model.config, pairs),
        "rank_pattern": wide,
        "alpha_pattern": {module: alpha * root(one / rank) for module, one in wide.items()},
        "bias": "none",
        "use_rslora": stable,
        "use_dora": isinstance(technique, DoRA),
        "fan_in_fan_out": any(
            isinstance(one, Transposed) for one in page_of(model.config).names(model.config).values()
        ),
        "inference_mode": True,
        "modules_to_save": None,
    }


ALPHA = {
    LoRA: lambda one: one.alpha,
    RsLoRA: lambda one: one.alpha,
    DoRA: lambda one: one.alpha,
    LoRAXS: lambda one: one.scale * one.rank,
    TinyLoRA: lambda one: float(one.rank),
}


def target_modules(config: Any, pairs: Mapping[str, Pair]) -> list[str]:
    """Short names where all modules of that name are adapted, as PEFT's users write them; else every module's own."""
    last = {module: module.rsplit(".", 1)[-1] for module in {one.module for one in places_of(config).values()}}
    short = sorted({last[module] for module in pairs})
    return short if {module for module in last if last[module] in short} == set(pairs) else sorted(pairs)
