"""Adapter targets: which matrices an adapter edits, by the short names of published models: q, k, v, out, gate, up,
down.

Every matrix inside the blocks has an address, `blocks.0.mixer.layer.qkv.q`: the layer's path and, where a layer stacks
several, the part. A target is the end of an address (`q`, `experts.gate`), or `all`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from llm_quest.errors import UsageError
from llm_quest.layers.experts import Experts
from llm_quest.layers.linear import LMHead, PackedLinear, find_row_slice
from llm_quest.layers.low_rank import AdaptedExperts, AdaptedLinear, AdaptedPackedLinear, as_floats, expert_parts
from llm_quest.layers.quantized import QuantizedExperts, QuantizedLinear, QuantizedPackedLinear
from llm_quest.techniques.model_spec import replace_module


@dataclass(frozen=True, eq=False)
class TargetMatrix:
    """A matrix that can be edited. part: its name in a layer that stacks several, else empty. read: gives the matrix;
    a quantized one is dequantized at each call, so that no more than one is there as floats."""

    path: str
    part: str
    read: Callable[[], Tensor]

    @property
    def weight(self) -> Tensor:
        """(out,in), or (E,out,in) for all experts."""
        return self.read().detach()

    @property
    def address(self) -> str:
        return f"{self.path}.{self.part}" if self.part else self.path

    @property
    def short_name(self) -> str:
        return self.address.rsplit(".", 1)[-1]


def target_matrices(model: nn.Module) -> Iterator[TargetMatrix]:
    """Every matrix within the blocks of this model, except those with one output (a gate) and routers, which are no
    linear layers. Embeddings and heads are excluded: losses read their matrix directly, and a tied one has two uses."""
    for path, module in model.named_modules():
        if "blocks" not in path.split(".") or isinstance(module, LMHead):
            continue
        if isinstance(module, PackedLinear | QuantizedPackedLinear):
            for part in module.parts:
                yield TargetMatrix(path, part, partial(read_packed_rows, module, part))
        elif isinstance(module, nn.Linear | QuantizedLinear) and module.weight.shape[0] > 1:
            yield TargetMatrix(path, "", partial(getattr, module, "weight"))
        elif isinstance(module, Experts | QuantizedExperts):
            for part in expert_parts(module):
                yield TargetMatrix(path, part, partial(read_expert_rows, module, part))
            yield TargetMatrix(path, "down", partial(read_expert_down, module))


def read_packed_rows(layer: PackedLinear | QuantizedPackedLinear, part: str) -> Tensor:
    return layer.weight[layer.row_slice(part)]


def read_expert_rows(experts: Experts | QuantizedExperts, part: str) -> Tensor:
    return as_floats(experts.gate_up)[:, find_row_slice(expert_parts(experts), part)]


def read_expert_down(experts: Experts | QuantizedExperts) -> Tensor:
    return as_floats(experts.down)


def select_targets(model: nn.Module, targets: Sequence[str]) -> list[TargetMatrix]:
    """The matrices that the targets name. UsageError for a target that names none, with the possible names."""
    matrices = list(target_matrices(model))
    for target in targets:
        if target in ("head", "embed", "token", "position"):
            raise UsageError(
                f"{target!r} is not adapted: losses read that matrix directly, and a tied one serves twice; "
                f"choose among {short_names(matrices)}"
            )
        if not any(matches_target(site, target) for site in matrices):
            raise UsageError(f"no matrix of this model is called {target!r}; there are {short_names(matrices)}, or all")
    return [site for site in matrices if any(matches_target(site, target) for target in targets)]


def shortest_targets(model: nn.Module, addresses: set[str]) -> tuple[str, ...]:
    """Short names where they are unambiguous, else the addresses."""
    short = tuple(dict.fromkeys(address.rsplit(".", 1)[-1] for address in sorted(addresses)))
    return short if {site.address for site in select_targets(model, short)} == addresses else tuple(sorted(addresses))


def matches_target(matrix: TargetMatrix, target: str) -> bool:
    return target == "all" or matrix.address == target or matrix.address.endswith(f".{target}")


def short_names(matrices: Sequence[TargetMatrix]) -> str:
    return ", ".join(dict.fromkeys(site.short_name for site in matrices)) or "none that was not adapted before"


def describe_addresses(addresses: Sequence[str]) -> str:
    """'q, k, v in 12 layers': addresses for display."""
    shorts = dict.fromkeys(address.rsplit(".", 1)[-1] for address in addresses)
    layers = {re.sub(r"^(.*?blocks\.\d+)\..*$", r"\1", address) for address in addresses}
    return f"{', '.join(shorts)} in {len(layers)} layers"


def wrap_layers(model: nn.Module, edits: Mapping[TargetMatrix, nn.Module]) -> None:
    """Wrap the layers with their edits."""
    by_path: dict[str, dict[str, nn.Module]] = {}
    for site, edit in edits.items():
        by_path.setdefault(site.path, {})[site.part] = edit
    for path, parts in by_path.items():
        layer = model.get_submodule(path)
        replace_module(model, path, WRAPPERS[type_to_wrap(layer)](layer, parts))


def type_to_wrap(layer: nn.Module) -> type:
    return next(kind for kind in WRAPPERS if isinstance(layer, kind))


WRAPPERS: dict[type, Callable[[Any, dict[str, nn.Module]], nn.Module]] = {
    PackedLinear: AdaptedPackedLinear,
    QuantizedPackedLinear: AdaptedPackedLinear,
    Experts: AdaptedExperts,
    QuantizedExperts: AdaptedExperts,
    nn.Linear: lambda layer, parts: AdaptedLinear(layer, parts[""]),
    QuantizedLinear: lambda layer, parts: AdaptedLinear(layer, parts[""]),
}
