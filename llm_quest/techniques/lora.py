"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its kin: the model is frozen, and beside some of its matrices a
product of two thin ones learns what to add: W' = W + s B A.

- rsLoRA (arXiv:2312.03732): s = alpha / sqrt(r), so that a larger rank learns no slower.
- DoRA (arXiv:2402.09353): direction and magnitude apart (`layers.low_rank.Directed`).
- LoRA-XS (arXiv:2405.17604): A and B are the matrix's own largest singular directions, frozen; r x r numbers learn.
- TinyLoRA (arXiv:2602.04118): of those r x r numbers only u directions, fixed at random, perhaps one for all matrices.

Commonly got wrong: B is zero and A is not (both zero learn nothing); s belongs to the adapter and not to the learning
rate; dropout is of x alone; a merged adapter must not act a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llm_quest.contracts import Card, Technique
from llm_quest.errors import UsageError
from llm_quest.layers.low_rank import (
    Adapted,
    AdaptedExperts,
    Directed,
    LowRank,
    Mixed,
    Square,
    Wrapper,
    row_norms,
    wrappers,
)
from llm_quest.models.build import skeleton
from llm_quest.techniques.card import applied, plain, put
from llm_quest.techniques.targets import Site, chosen, wrap

Model = TypeVar("Model", bound=Any)


@dataclass(frozen=True)
class LoRA:
    """rank: r. alpha: s = alpha / r. targets: short names (q, k, v, out, gate, up, down, ...) or all."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return adapted(model, self, lambda sites: thin(sites, self, self.alpha / self.rank))


@dataclass(frozen=True)
class RsLoRA:
    """LoRA with s = alpha / sqrt(rank)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return adapted(model, self, lambda sites: thin(sites, self, self.alpha / math.sqrt(self.rank)))


@dataclass(frozen=True)
class DoRA:
    """LoRA of the direction, and a magnitude for each row."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return adapted(model, self, self.edits)

    def edits(self, sites: Sequence[Site]) -> Iterator[nn.Module]:
        for site, low in zip(sites, thin(sites, self, self.alpha / self.rank), strict=True):
            yield Directed(low, nn.Parameter(row_norms(site.weight)))


@dataclass(frozen=True)
class LoRAXS:
    """W' = W + scale U_r S_r R V_r^T; R starts at N(0, std^2), as published, so near to nothing but not at it."""

    rank: int = 8
    scale: float = 1.0
    std: float = 1e-5
    targets: tuple[str, ...] = ("all",)
    seed: int = 0
    neutral_at_birth: ClassVar[bool] = False
    published: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        return adapted(model, self, self.edits)

    def edits(self, sites: Sequence[Site]) -> Iterator[nn.Module]:
        generator = torch.Generator().manual_seed(self.seed)
        for site in sites:
            U, S, Vh = directions(site, self.rank)
            shape = (*site.weight.shape[:-2], self.rank, self.rank)
            R = drawn(site.weight, shape, lambda t: t.normal_(std=self.std, generator=generator))
            yield LowRank(frozen(Vh), frozen(U * S[..., None, :]), scale=self.scale, core=Square(nn.Parameter(R)))


@dataclass(frozen=True)
class TinyLoRA:
    """W' = W + U_r sqrt(S_r) (sum_u v_u P_u) sqrt(S_r) V_r^T. u: how many numbers learn for a group of matrices.
    tying: 0, every matrix is a group; 1, the whole model is one.

    Differs: the paper writes U S (...) V^T; the square root on both sides and P ~ N(0, 1/r) are PEFT's, for balance."""

    rank: int = 2
    u: int = 64
    tying: float = 0.0
    targets: tuple[str, ...] = ("all",)
    seed: int = 42
    neutral_at_birth: ClassVar[bool] = True
    published: ClassVar[bool] = False

    def __call__(self, model: Model) -> Model:
        if self.u < 1 or not 0 <= self.tying <= 1:
            raise UsageError(f"u is {self.u} and tying {self.tying}; u must be at least 1, tying between 0 and 1")
        return adapted(model, self, self.edits)

    def edits(self, sites: Sequence[Site]) -> Iterator[nn.Module]:
        learned: dict[int, nn.Parameter] = {}
        for index, site in enumerate(sites):
            group = self.group(index, len(sites))
            v = learned.setdefault(group, nn.Parameter(site.weight.new_zeros(self.u)))
            U, S, Vh = directions(site, self.rank)
            root = S.sqrt()
            P = self.projections(site.weight, index)
            yield LowRank(
                frozen(root[..., None] * Vh), frozen(U * root[..., None, :]), scale=1.0, core=Mixed(frozen(P), v)
            )

    def group(self, index: int, count: int) -> int:
        """Whose vector matrix number `index` of `count` reads."""
        groups = max(1, round(count * (1 - self.tying)))
        return min(index // max(1, count // groups), groups - 1)

    def projections(self, weight: Tensor, index: int) -> Tensor:
        """P of matrix number `index`, (u,r,r)."""
        generator = torch.Generator().manual_seed(self.seed + index)
        shape = (self.u, *weight.shape[:-2], self.rank, self.rank)
        return drawn(weight, shape, lambda t: t.normal_(std=self.rank**-0.5, generator=generator))


def thin(sites: Sequence[Site], numbers: LoRA | RsLoRA | DoRA, scale: float) -> Iterator[LowRank]:
    """A uniform in +-1/sqrt(in) (He et al. with a = sqrt 5), B zero."""
    generator = torch.Generator().manual_seed(numbers.seed)
    if not 0 <= numbers.dropout < 1:
        raise UsageError(f"dropout is {numbers.dropout}: a share of at least 0 and below 1 was expected")
    for site in sites:
        *stack, rows, width = site.weight.shape
        if stack and numbers.dropout:
            raise UsageError(
                f"dropout is of an adapter's input, and experts ({site.address}) are edited as matrices, without one: "
                "set dropout 0, or leave the experts out of the targets"
            )
        bound = width**-0.5
        A = drawn(site.weight, (*stack, numbers.rank, width), lambda t, b=bound: t.uniform_(-b, b, generator=generator))
        B = site.weight.new_zeros(*stack, rows, numbers.rank)
        yield LowRank(nn.Parameter(A), nn.Parameter(B), scale=scale, dropout=numbers.dropout)


def drawn(beside: Tensor, shape: Sequence[int], fill: Any) -> Tensor:
    """Random numbers like their neighbour, drawn on the host in float32 so that a seed gives the same ones anywhere; on
    the meta device none."""
    if beside.device.type == "meta":
        return beside.new_empty(shape)
    return fill(torch.empty(*shape, dtype=torch.float32, device="cpu")).to(beside)


def directions(site: Site, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular directions of a matrix, U (out,r), S (r), V^T (r,in), worked out in float32 or
    wider."""
    weight = site.weight
    if rank > min(weight.shape[-2:]):
        raise UsageError(
            f"rank {rank} is above that of {site.address}, {min(weight.shape[-2:])}: lower the rank, or leave out the "
            f"target {site.short!r}"
        )
    if weight.device.type == "meta":
        *stack, rows, width = weight.shape
        return (
            weight.new_empty(*stack, rows, rank),
            weight.new_empty(*stack, rank),
            weight.new_empty(*stack, rank, width),
        )
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    return U[..., :rank].to(weight), S[..., :rank].to(weight), Vh[..., :rank, :].to(weight)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


def adapted(model: Model, technique: Technique, edits: Any) -> Model:
    """The model frozen, with the edits around the matrices that the technique's targets name. One adapter a model."""
    numbers: Any = technique
    if wrappers(model):
        raise UsageError(
            "this model has an adapter already: train that one on, or merge it first (techniques.lora.merge) and adapt "
            "the merged model"
        )
    if numbers.rank < 1 or not numbers.targets:
        raise UsageError(
            f"rank {numbers.rank}, targets {numbers.targets}: an adapter has a rank of 1 or more and targets"
        )
    sites = chosen(model, numbers.targets)
    made = dict(zip(sites, edits(sites), strict=True))
    model.requires_grad_(False)
    wrap(model, made)
    return applied(model, technique)


def matched(model: nn.Module) -> list[str]:
    """The addresses of the matrices that are adapted."""
    found: list[str] = []
    for path, wrapper in wrappers(model).items():
        found += [path] if isinstance(wrapper, Adapted) else [f"{path}.{part}" for part in wrapper.edits]
    return found


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside: the model as it was before it was adapted, in the same memory. The reference of preference learning."""
    found = require_adapters(model)
    before = [wrapper.on for wrapper in found.values()]
    try:
        for wrapper in found.values():
            wrapper.on = False
        yield
    finally:
        for wrapper, on in zip(found.values(), before, strict=True):
            wrapper.on = on


@dataclass(frozen=True)
class Merged:
    """What `unmerge` needs: the wrapped layers, the matrices as they were, the card, what was learned."""

    wrappers: dict[str, Wrapper]
    originals: dict[str, nn.Parameter] = field(repr=False)
    card: Card
    learned: frozenset[str]


@torch.no_grad()
def merge(model: Any) -> Merged:
    """Work the adapters into the matrices: the model is one of its page again, as trainable as a fresh one. `unmerge`
    with what this returns gives back the very bits; forget it to free the originals."""
    found = require_adapters(model)
    learned = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    originals = {}
    for path, wrapper in found.items():
        for name in matrices(wrapper):
            before = getattr(wrapper.base, name)
            originals[f"{path}.{name}"] = before
            setattr(wrapper.base, name, nn.Parameter(getattr(wrapper, name).to(before.dtype)))
        put(model, path, wrapper.base)
    record = Merged(found, originals, model.card, learned)
    model.card = replace(model.card, techniques=tuple(one for one in model.card.techniques if not is_adapter(one)))
    learn_all(model)
    return record


def unmerge(model: Any, record: Merged) -> None:
    """The adapted model again, as it was before `merge`, to the bit."""
    if any(model.get_submodule(path) is not wrapper.base for path, wrapper in record.wrappers.items()):
        raise UsageError("this record is of another merge: unmerge once, with what merge(model) of this model returned")
    for path, wrapper in record.wrappers.items():
        for name in matrices(wrapper):
            setattr(wrapper.base, name, record.originals[f"{path}.{name}"])
        put(model, path, wrapper)
    model.card = record.card
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.learned)


def matrices(wrapper: Wrapper) -> tuple[str, ...]:
    """The names of the matrices that a wrapper edits."""
    return ("gate_up", "down") if isinstance(wrapper, AdaptedExperts) else ("weight",)


def learn_all(model: Any) -> None:
    """As trainable as a fresh model of this page (a router's balancing bias is not)."""
    fresh = {name: parameter.requires_grad for name, parameter in skeleton(model.config).named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(fresh.get(plain(name), True))


def require_adapters(model: nn.Module) -> dict[str, Wrapper]:
    found = wrappers(model)
    if not found:
        raise UsageError("this model has no adapter: none was applied, or it was merged already")
    return found


def is_adapter(technique: Technique) -> bool:
    return isinstance(technique, LoRA | RsLoRA | DoRA | LoRAXS | TinyLoRA)
