"""Parametrizations: how first values, learning rate, weight decay and Adam's epsilon of a tensor follow from its role
and from how much wider and deeper the model is than a base, so that a rate tuned on the base holds for the model.

    standard    what the family and the optimizer do: the best rate falls as the model grows
    mup         Yang et al. 2022 (arXiv:2203.03466), table 8: the rate holds over width
    completep   Dey et al. 2025 (arXiv:2505.01618): every branch is multiplied by 1/l too, and the rate holds over depth

Ratios to the base: i = fan-in of the tensor, m = hidden size, l = layers, s = the embedding's constant (Gemma's
sqrt(D)). The table for Adam, where `forward` multiplies what the tensor adds to the output:

    role            initial std     rate    forward     epsilon     what it is
    embedding       1               1       1/s         1/m         tokens and positions
    hidden          i^-1/2          1/i     1           1/(m l)     q, k, v, gate, up, latents, joins
    branch_output   i^-1/2          1/i     1/l         1/(m l)     out and down, which write into the stream
    branch_gain     1               1       1/l         1/(m l)     the norm behind a branch, where there is one
    readout         1/i             1/i     1           1/l         router, gates: few outputs of D
    head            1/i             1/i     1           1           the output matrix
    final_norm      1               1       s/m or 1    1/m         of tied heads: the 1/m of the output alone
    vector          1               1       1           1/(m l)     gains, biases, sinks, decays, convolutions

Where norms stand behind the branches alone (OLMo 2), a branch adds numbers of size 1/l whatever its weights are, and
the layers read the stream as it is. An embedding of 0.02 would vanish beside the first branch of a shallow model and
not of a deep one, and products of it lie below the norms' epsilon. So 1/s is divided by 0.02 there, at the base too:
the embedding begins with size 1.

No model computes a multiplier. A forward factor a of a weight is the same function with the weight a W, and Adam makes
the same steps where W's first values and rate are multiplied by a and its epsilon is divided by it; the decay is
divided by the rate's factor. So every saved folder is a plain model of its family. (The head is linear, so the factor
of a tied one stands in the gain of the final norm.)

Muon orthogonalizes: the step of a matrix has the spectral norm sqrt(fan-out / fan-in) of the base, times `forward`,
where ours alone has that of 0.2 sqrt(max), which grows with the width. The other tensors have Adam's rules.

Commonly got wrong: 1/m at the output twice; the depth-scaled first values of `out` and `down` (1/sqrt(2 L)) left in
beside 1/l; a head dimension that grows while logits are divided by its square root (refused here)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_quest.contracts import ParameterScale
from llm_quest.errors import UsageError
from llm_quest.layers.attention import GroupedQueryAttention
from llm_quest.layers.block import Sublayer
from llm_quest.layers.experts import Experts
from llm_quest.layers.linear import LMHead
from llm_quest.layers.moe import MixtureOfExperts
from llm_quest.layers.norm import ZeroCenteredRMSNorm
from llm_quest.layers.scaled_dot_product import ScaledDotProduct


class SizeRatios(NamedTuple):
    """A tensor's and its model's sizes over those of the base. tied: whether the head is the embedding."""

    fan_in: float
    width: float
    depth: float
    embedding_scale: float
    tied: bool


Factor = Callable[[SizeRatios], float]


def unchanged(ratios: SizeRatios) -> float:
    """1: as at the base."""
    return 1.0


def inverse_fan_in(r: SizeRatios) -> float:
    return 1 / r.fan_in


def inverse_depth(r: SizeRatios) -> float:
    return 1 / r.depth


def hidden_epsilon(r: SizeRatios) -> float:
    return 1 / (r.width * r.depth)


@dataclass(frozen=True)
class RoleRule:
    """A line of the table."""

    std: Factor = unchanged
    rate: Factor = unchanged
    forward: Factor = unchanged
    epsilon: Factor = hidden_epsilon


ROLES: Mapping[str, RoleRule] = {
    "embedding": RoleRule(forward=lambda r: 1 / r.embedding_scale, epsilon=lambda r: 1 / r.width),
    "hidden": RoleRule(std=lambda r: r.fan_in**-0.5, rate=inverse_fan_in),
    "branch_output": RoleRule(std=lambda r: r.fan_in**-0.5, rate=inverse_fan_in, forward=inverse_depth),
    "branch_gain": RoleRule(forward=inverse_depth),
    "readout": RoleRule(std=inverse_fan_in, rate=inverse_fan_in, epsilon=inverse_depth),
    "head": RoleRule(std=inverse_fan_in, rate=inverse_fan_in, epsilon=unchanged),
    "final_norm": RoleRule(
        forward=lambda r: r.embedding_scale / r.width if r.tied else 1.0, epsilon=lambda r: 1 / r.width
    ),
    "vector": RoleRule(),
}
"""Role of a tensor -> its line of the table."""
PARAMETRIZATIONS: Mapping[str, tuple[bool, bool]] = {
    "standard": (False, False), "mup": (True, False), "completep": (True, True),
}  # fmt: skip
"""Name -> whether it scales with the width, and with the depth."""
INITIAL_STD = 0.02
"""Of an embedding's first values, in every family."""


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter of a decoder, by name, tied ones once. AssertionError for one without a role."""
    modules = dict(model.named_modules())
    normed = tuple(path for path, one in modules.items() if isinstance(one, Sublayer) and has_gain(one.post_norm))
    gates = {id(one.shared_gate) for one in modules.values() if isinstance(one, MixtureOfExperts)}
    routers = {id(one.router) for one in modules.values() if isinstance(one, MixtureOfExperts)}
    roles = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        behind_norm = any(name.startswith(f"{one}.layer.") for one in normed)
        writes = path.rpartition(".")[2] in ("out", "down") or (isinstance(module, Experts) and "down" in leaf)
        is_bias = "bias" in leaf
        if isinstance(module, nn.Embedding):
            role = "embedding"
        elif isinstance(module, LMHead):
            role = "head"
        elif is_final_norm(name):
            role = "final_norm"
        elif path.endswith(".post_norm"):
            role = "branch_gain"
        elif writes and not behind_norm:
            role = "branch_output" if not is_bias else "branch_gain"
        elif parameter.ndim < 2 or is_bias or leaf == "conv":
            role = "vector"
        elif id(module) in routers or id(module) in gates:
            role = "readout"
        else:
            assert leaf in ("weight", "gate_up", "down"), f"{name} has no role: what is it?"
            role = "hidden"
        roles[name] = role
    return roles


def reads_raw_stream(model: nn.Module) -> bool:
    """Whether norms stand behind the branches and not before them."""
    branches = [module for module in model.modules() if isinstance(module, Sublayer)]
    return bool(branches) and all(has_gain(branch.post_norm) and not has_gain(branch.norm) for branch in branches)


def has_gain(norm: nn.Module) -> bool:
    """Whether a branch ends in a norm that sets its size."""
    return any(True for _ in norm.parameters())


def is_final_norm(name: str) -> bool:
    """The norm before the head: the model's, or that of a multi-token module."""
    parts = name.split(".")
    return parts[0] == "norm" or (parts[0] == "mtp_modules" and parts[2] == "norm")


def scale_parameters(model: Any, base: Any, kind: str) -> dict[str, ParameterScale]:
    """The scale of every parameter. base: the model of the base config, which may be on the meta device; it has the
    same parts, in other sizes and numbers. Empty for `standard`. UsageError where no rule is known."""
    by_width, by_depth = PARAMETRIZATIONS[kind]
    if not (by_width or by_depth):
        return {}
    require_equal_logits_scale(model, base)
    width = model.config.hidden_size / base.config.hidden_size
    depth = len(model.blocks) / len(base.blocks) if by_depth else 1.0
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    rows, base_rows = model.row_splits(), base.row_splits()
    twins = twin_names(model, base)
    scale = getattr(model.embed, "scale", 1.0) / getattr(base.embed, "scale", 1.0)
    scale *= INITIAL_STD if reads_raw_stream(model) else 1.0
    tied = model.head.weight is model.embed.token.weight
    scaled = {}
    for name, role in parameter_roles(model).items():
        parameter = model.get_parameter(name)
        twin = twins[name]
        fan_in = parameter.shape[-1] / shapes[twin][-1] if parameter.ndim >= 2 else 1.0
        positions = name == "embed.position.weight"
        in_block = name.startswith("blocks.")
        ratios = SizeRatios(fan_in, width, depth if in_block else 1.0, 1.0 if positions else scale, tied)
        own = matrix_shapes(tuple(parameter.shape), rows.get(name))
        theirs = matrix_shapes(shapes[twin], base_rows.get(twin))
        scaled[name] = parameter_scale(role, ratios, writes_depth_scaled(name), depth, own, theirs)
    return scaled


def parameter_scale(
    role: str, ratios: SizeRatios, depth_scaled: bool, depth: float, own: list[tuple[int, int]],
    theirs: list[tuple[int, int]],
) -> ParameterScale:  # fmt: skip
    """A line of the table with its forward factor moved into the weight. depth_scaled: whether the family divides the
    first values by sqrt(2 L), which is undone where depth is scaled. own, theirs: shapes of the stacked matrices."""
    rule = ROLES[role]
    forward, rate = rule.forward(ratios), rule.rate(ratios)
    start = rule.std(ratios) * forward * (math.sqrt(depth) if depth_scaled else 1.0)
    spectral = tuple(forward * spectral_ratio(mine, other) for mine, other in zip(own, theirs, strict=True))
    return ParameterScale(role, start, rate * forward, 1 / (rate * forward), rule.epsilon(ratios) / forward, spectral)


def spectral_ratio(shape: tuple[int, int], base: tuple[int, int]) -> float:
    """What takes our update, of spectral norm 0.2 sqrt(max(rows, columns)), to sqrt(rows / columns) of the base's."""
    wanted = math.sqrt(shape[0] / shape[1] * base[1] / base[0])
    return wanted * math.sqrt(max(base) / max(shape))


def matrix_shapes(shape: tuple[int, ...], rows: tuple[int, ...] | None) -> list[tuple[int, int]]:
    """Rows and columns of each of the matrices stacked in a parameter; a vector is one row."""
    columns = shape[-1] if len(shape) >= 2 else 1
    return [(count, columns) for count in rows or (shape[-2] if len(shape) >= 2 else shape[-1] if shape else 1,)]


def writes_depth_scaled(name: str) -> bool:
    """Whether `init_depth_scaled_` divides this weight by sqrt(2 layers)."""
    parts = name.split(".")
    return (parts[-2] in ("out", "down") and parts[-1] == "weight") or parts[-2:] == ["experts", "down"]


def twin_names(model: nn.Module, base: nn.Module) -> dict[str, str]:
    """Each parameter's name -> that of the base's which is this one: of the same block where its parts are the same,
    else of the first block with these parts."""
    mine, theirs = block_parts(model), block_parts(base)
    twins = {}
    for (kind, number), parts in mine.items():
        alike = [one for (other, one), named in theirs.items() if other == kind and named == parts]
        if not alike:
            where = f"{kind}.{number}" if number else kind
            raise UsageError(f"parametrization.base has nothing like {where}: give it the same kinds of layers")
        twin = number if number in alike else alike[0]
        for tail, _ in parts:
            twins[".".join(filter(None, (kind, number, tail)))] = ".".join(filter(None, (kind, twin, tail)))
    return twins


def block_parts(model: nn.Module) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """(`blocks`, number) -> the names and dimensions of its parameters; (`embed`, empty) for what is there once."""
    parts_of_block: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        number, tail = rest.split(".", 1) if first in ("blocks", "mtp_modules") else ("", rest)
        parts_of_block.setdefault((first, number), []).append((tail, parameter.ndim))
    return parts_of_block


def require_equal_logits_scale(model: nn.Module, base: nn.Module) -> None:
    """UsageError unless attention logits are scaled alike: muP needs 1/head_dim where heads become wider, and a model
    of its family has 1/sqrt(head_dim). With normalized queries and keys both agree."""
    normed = any(
        isinstance(module, GroupedQueryAttention) and has_gain(module.q_norm) and has_gain(module.k_norm)
        for module in model.modules()
    )
    scales = [
        {module.scale for module in side.modules() if isinstance(module, ScaledDotProduct)} for side in (model, base)
    ]
    if scales[0] != scales[1] and not normed:
        raise UsageError(
            "parametrization.base has heads of another width, whose logits muP scales otherwise than this family: keep "
            "head_dim, and let the number of heads grow with hidden_size"
        )


@torch.no_grad()
def scale_first_values_(model: nn.Module, scales: Mapping[str, ParameterScale]) -> None:
    """Multiply the first values of a new model, in place."""
    modules = dict(model.named_modules())
    for name, scale in scales.items():
        parameter: Tensor = model.get_parameter(name)
        if isinstance(modules[name.rpartition(".")[0]], ZeroCenteredRMSNorm) and scale.init != 1:
            parameter.add_(1).mul_(scale.init).sub_(1)
        elif scale.init != 1:
            parameter.mul_(scale.init)
