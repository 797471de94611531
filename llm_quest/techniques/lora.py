"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its variants: the model is frozen, and a product of two thin matrices
learns what to add to some of its matrices: W' = W + s B A.

- rsLoRA (arXiv:2312.03732): s = alpha / sqrt(r), so that a larger rank learns no slower.
- DoRA (arXiv:2402.09353): direction and magnitude separately (`layers.low_rank.DoRAUpdate`).
- LoRA-XS (arXiv:2405.17604): A and B are the matrix's own largest singular directions, frozen; r x r numbers learn.
- TinyLoRA (arXiv:2602.04118): of those r x r numbers only u directions, fixed at random, possibly one for all matrices.

Commonly got wrong: B is zero and A is not (if both are zero, neither learns); s belongs to the adapter and not to the
learning rate; dropout is of x alone; a merged adapter must not be applied a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llm_quest.contracts import Technique
from llm_quest.errors import UsageError
from llm_quest.layers.low_rank import (
    AdaptedLinear,
    DoRAUpdate,
    LoRAXSCore,
    LowRankUpdate,
    TinyLoRACore,
    adapter_layers,
    row_norms,
)
from llm_quest.techniques.adapter_targets import TargetMatrix, select_targets, wrap_layers
from llm_quest.techniques.model_spec import record_technique, strip_wrapper_names

Model = TypeVar("Model", bound=Any)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: W' = W + s B A. rank: r. alpha: s = alpha / r. targets: short names (q, k, v, out, gate, up,
    down, ...) or all. modules_to_save: modules or parameters that learn whole, by our names (embed.token, head), such
    as the embedding of new tokens."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    modules_to_save: tuple[str, ...] = ()
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return apply_adapter(model, self, lambda sites: init_lora_updates(sites, self, self.alpha / self.rank))


@dataclass(frozen=True)
class RsLoRA:
    """LoRA with s = alpha / sqrt(rank)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    modules_to_save: tuple[str, ...] = ()
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return apply_adapter(
            model, self, lambda sites: init_lora_updates(sites, self, self.alpha / math.sqrt(self.rank))
        )


@dataclass(frozen=True)
class DoRA:
    """LoRA of the direction, and a magnitude for each row."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    modules_to_save: tuple[str, ...] = ()
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return apply_adapter(model, self, self.build_edits)

    def build_edits(self, sites: Sequence[TargetMatrix]) -> Iterator[nn.Module]:
        for site, low in zip(sites, init_lora_updates(sites, self, self.alpha / self.rank), strict=True):
            yield DoRAUpdate(low, nn.Parameter(row_norms(site.weight)))


@dataclass(frozen=True)
class LoRAXS:
    """LoRA-XS: W' = W + scale U_r S_r R V_r^T; R starts at N(0, std^2), as published: near zero but not zero."""

    rank: int = 8
    scale: float = 1.0
    std: float = 1e-5
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    is_identity_at_init: ClassVar[bool] = False
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return apply_adapter(model, self, self.build_edits)

    def build_edits(self, sites: Sequence[TargetMatrix]) -> Iterator[nn.Module]:
        generator = torch.Generator().manual_seed(self.seed)
        for site in sites:
            U, S, Vh = top_singular_vectors(site, self.rank)
            shape = (*site.weight.shape[:-2], self.rank, self.rank)
            R = random_like(site.weight, shape, lambda t: t.normal_(std=self.std, generator=generator))
            yield LowRankUpdate(
                frozen_parameter(Vh),
                frozen_parameter(U * S[..., None, :]),
                scale=self.scale,
                core=LoRAXSCore(nn.Parameter(R)),
            )


@dataclass(frozen=True)
class TinyLoRA:
    """TinyLoRA: W' = W + U_r sqrt(S_r) (sum_u v_u P_u) sqrt(S_r) V_r^T. u: how many numbers a group of matrices learns.
    tying: 0, every matrix is a group; 1, the whole model is one.

    Differs: the paper writes U S (...) V^T; the square root on both sides and P ~ N(0, 1/r) are PEFT's, for balance."""

    rank: int = 2
    u: int = 64
    tying: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 42
    is_identity_at_init: ClassVar[bool] = True
    exportable: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        if self.u < 1 or not 0 <= self.tying <= 1:
            raise UsageError(f"u is {self.u} and tying {self.tying}; u must be at least 1, tying between 0 and 1")
        return apply_adapter(model, self, self.build_edits)

    def build_edits(self, sites: Sequence[TargetMatrix]) -> Iterator[nn.Module]:
        learned: dict[int, nn.Parameter] = {}
        for index, site in enumerate(sites):
            group = self.vector_index(index, len(sites))
            v = learned.setdefault(group, nn.Parameter(site.weight.new_zeros(self.u)))
            U, S, Vh = top_singular_vectors(site, self.rank)
            root = S.sqrt()
            P = self.projections(site.weight, index)
            yield LowRankUpdate(
                frozen_parameter(root[..., None] * Vh),
                frozen_parameter(U * root[..., None, :]),
                scale=1.0,
                core=TinyLoRACore(frozen_parameter(P), v),
            )

    def vector_index(self, index: int, count: int) -> int:
        """The vector of matrix number `index` of `count`."""
        groups = max(1, round(count * (1 - self.tying)))
        return min(index // max(1, count // groups), groups - 1)

    def projections(self, weight: Tensor, index: int) -> Tensor:
        """P of matrix number `index`, (u,r,r)."""
        generator = torch.Generator().manual_seed(self.seed + index)
        shape = (self.u, *weight.shape[:-2], self.rank, self.rank)
        return random_like(weight, shape, lambda t: t.normal_(std=self.rank**-0.5, generator=generator))


def init_lora_updates(
    sites: Sequence[TargetMatrix], technique: LoRA | RsLoRA | DoRA, scale: float
) -> Iterator[LowRankUpdate]:
    """A uniform in +-1/sqrt(in) (He et al. with a = sqrt 5), B zero."""
    generator = torch.Generator().manual_seed(technique.seed)
    if not 0 <= technique.dropout < 1:
        raise UsageError(f"dropout is {technique.dropout}: a number of at least 0 and below 1 was expected")
    for site in sites:
        *stack, rows, width = site.weight.shape
        if stack and technique.dropout:
            raise UsageError(
                f"dropout is of an adapter's input, and experts ({site.address}) are edited as matrices, without one: "
                "set dropout 0, or leave the experts out of the targets"
            )
        bound = width**-0.5
        A = random_like(
            site.weight, (*stack, technique.rank, width), lambda t, b=bound: t.uniform_(-b, b, generator=generator)
        )
        B = site.weight.new_zeros(*stack, rows, technique.rank)
        yield LowRankUpdate(nn.Parameter(A), nn.Parameter(B), scale=scale, dropout=technique.dropout)


def random_like(like: Tensor, shape: Sequence[int], fill: Any) -> Tensor:
    """Random numbers with the device and dtype of a tensor, drawn on the host in float32 so that a seed gives the same
    ones anywhere; on the meta device none."""
    if like.device.type == "meta":
        return like.new_empty(shape)
    return fill(torch.empty(*shape, dtype=torch.float32, device="cpu")).to(like)


def top_singular_vectors(site: TargetMatrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular directions of a matrix: U (out,r), S (r), V^T (r,in), in float32 or wider."""
    weight = site.weight
    if rank > min(weight.shape[-2:]):
        raise UsageError(
            f"rank {rank} is above that of {site.address}, {min(weight.shape[-2:])}: lower the rank, or leave out the "
            f"target {site.short_name!r}"
        )
    if weight.device.type == "meta":
        *stack, rows, width = weight.shape
        return (
            weight.new_empty(*stack, rows, rank),
            weight.new_empty(*stack, rank),
            weight.new_empty(*stack, rank, width),
        )
    float_weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(float_weight, full_matrices=False)
    return U[..., :rank].to(weight), S[..., :rank].to(weight), Vh[..., :rank, :].to(weight)


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def apply_adapter(model: Model, technique: Technique, edits: Any) -> Model:
    """Freeze the model and wrap the matrices that the targets name with their edits. One adapter per model."""
    settings: Any = technique
    if adapter_layers(model):
        raise UsageError(
            "this model has an adapter already: train that one on, or merge it first "
            "(techniques.adapter_merge.merge_adapter) and adapt the merged model"
        )
    if settings.rank < 1 or not settings.targets:
        raise UsageError(
            f"rank {settings.rank}, targets {settings.targets}: an adapter has a rank of 1 or more and targets"
        )
    sites = select_targets(model, settings.targets)
    edits_by_target = dict(zip(sites, edits(sites), strict=True))
    model.requires_grad_(False)
    wrap_layers(model, edits_by_target)
    for _, parameter in whole_parameters(model, whole_modules(technique)):
        parameter.requires_grad_()
    return record_technique(model, technique)


def whole_modules(technique: Technique) -> tuple[str, ...]:
    """The modules that learn whole beside an adapter."""
    return getattr(technique, "modules_to_save", ())


def whole_parameters(model: nn.Module, modules: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything in these modules. UsageError for a module that is not there."""
    inside: dict[str, list[tuple[str, nn.Parameter]]] = {module: [] for module in modules}
    for name, parameter in model.named_parameters():
        for module, parameters in inside.items():
            if f"{strip_wrapper_names(name)}.".startswith(f"{module}."):
                parameters.append((name, parameter))
    if absent := [module for module, parameters in inside.items() if not parameters]:
        raise UsageError(
            f"modules_to_save names {', '.join(absent)}, of which this model has no parameters; it may name "
            "embed.token, or head where that is not the embedding"
        )
    return [one for parameters in inside.values() for one in parameters]


def adapter_addresses(model: nn.Module) -> list[str]:
    """The addresses of the adapted matrices."""
    addresses: list[str] = []
    for path, wrapper in adapter_layers(model).items():
        addresses += [path] if isinstance(wrapper, AdaptedLinear) else [f"{path}.{part}" for part in wrapper.edits]
    return addresses


ADAPTERS = (LoRA, RsLoRA, DoRA, LoRAXS, TinyLoRA)


def is_adapter(technique: Technique) -> bool:
    return isinstance(technique, ADAPTERS)
