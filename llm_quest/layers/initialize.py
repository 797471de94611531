"""Initialization. A model is assembled without memory (meta device), gets memory, and is then filled from one
generator, so that a seed gives the same weights on any machine, whatever else has drawn random numbers.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from llm_quest.layers.experts import Experts
from llm_quest.layers.norm import LayerNorm, RMSNorm, ZeroCenteredRMSNorm

Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class HasInitWeights(Protocol):
    """A layer with an initialization of its own."""

    def init_weights(self, generator: torch.Generator | None) -> None: ...


def materialize(
    model: Model,
    device: torch.device | str,
    dtype: torch.dtype,
    allocate: Callable[..., Tensor] = torch.empty,
    preallocated: Mapping[str, Tensor] | None = None,
) -> Model:
    """Give every parameter (uninitialized) memory, as `empty` does; tied parameters stay one, integers stay integers,
    and what a layer keeps in float32 is at least that. preallocated: those (by name) that have memory already."""
    named, wide = dict(model.named_parameters()), float32_parameters(model)
    preallocated_by_id = {id(named[path]): tensor for path, tensor in (preallocated or {}).items()}
    parameters_by_id: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in parameters_by_id:
                kind = parameter_dtype(parameter, dtype, wide)
                memory = preallocated_by_id.get(id(parameter))
                memory = allocate(parameter.shape, device=device, dtype=kind) if memory is None else memory
                parameters_by_id[id(parameter)] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
            setattr(module, name, parameters_by_id[id(parameter)])
    return model


def copy_module(module: Model) -> Model:
    """A copy with parameters and buffers of its own.

    Commonly got wrong: `copy.deepcopy` on a fake tensor copies its FakeTensorMode as well, whose weak references are
    then freed twice (PyTorch 2.13): memory is overwritten, and the process crashes later, anywhere.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    return copy.deepcopy(module, memo | empty_containers(module))


def empty_containers(module: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: copies of the empty dictionaries and sets of all modules. A module has ten of them
    for hooks alone, whose copying takes most of the time of copying a small model."""
    values = (value for part in module.modules() for value in vars(part).values())
    return {id(value): type(value)() for value in values if type(value) in (dict, OrderedDict, set) and not value}


def float32_parameters(model: nn.Module) -> frozenset[int]:
    """The ids of the parameters that layers keep in float32 whatever the model's dtype is: those that their
    `keep_in_fp32` names (a router's bias, whose steps of 0.001 bfloat16 would round away)."""
    named = ((module, name) for module in model.modules() for name in getattr(module, "keep_in_fp32", ()))
    return frozenset(id(getattr(module, name)) for module, name in named)


def parameter_dtype(parameter: nn.Parameter, dtype: torch.dtype, wide: frozenset[int]) -> torch.dtype:
    """The dtype of this parameter in a model of `dtype`. wide: `float32_parameters` of the model."""
    if not parameter.is_floating_point():
        return parameter.dtype
    return torch.promote_types(dtype, torch.float32) if id(parameter) in wide else dtype


def init_depth_scaled_(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """GPT-2's rule: N(0, 0.02^2); matrices that write into the residual stream, the experts' too, divided by sqrt(2
    layers), so that the sum of all branches keeps its size. Differs: transformers initializes Llama, Gemma, Mixtral,
    Qwen3 and DeepSeek with one std for all matrices; here every family has GPT-2's."""
    layers: Any = model.config.num_hidden_layers  # type: ignore[union-attr]
    init_normal_(model, std=0.02, out_std=0.02 / (2 * layers) ** 0.5, generator=generator)


class ModuleGenerator(torch.Generator):
    """A generator that `init_normal_` seeds anew for every module, from its own seed and the module's name: models that
    differ in one part begin with the same values of all others. (From one stream, a part of another shape moves the
    values of all that follow.)"""


def seed_modules(model: nn.Module, generator: torch.Generator | None) -> Iterator[tuple[str, nn.Module]]:
    """The modules with their names; a `ModuleGenerator` is seeded before each of them."""
    seed = generator.initial_seed() if isinstance(generator, ModuleGenerator) else None
    for path, module in model.named_modules():
        if seed is not None and generator is not None:
            digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield path, module


def init_normal_(model: nn.Module, *, std: float, out_std: float, generator: torch.Generator | None = None) -> None:
    """Matrices N(0, std^2), those that write into the residual stream (named `out` or `down`) N(0, out_std^2), biases
    0, norms 1 (or the weight 0 of a norm that scales by 1 + weight)."""
    for path, module in seed_modules(model, generator):
        if isinstance(module, Experts):
            nn.init.normal_(module.gate_up, std=std, generator=generator)
            nn.init.normal_(module.down, std=out_std, generator=generator)
            for bias in module.biases or ():
                nn.init.zeros_(bias)
        elif isinstance(module, HasInitWeights):
            module.init_weights(generator)
        elif isinstance(module, nn.Linear | nn.Embedding):
            writes = path.rsplit(".", 1)[-1] in ("out", "down")
            nn.init.normal_(module.weight, std=out_std if writes else std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | LayerNorm):
            nn.init.ones_(module.weight)
            if isinstance(module, LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ZeroCenteredRMSNorm):
            nn.init.zeros_(module.weight)
        else:
            assert not list(module.parameters(recurse=False)), (
                f"{path}: no initialization known for {type(module).__name__}"
            )
