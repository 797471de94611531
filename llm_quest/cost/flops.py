"""FLOPs of a model's passes, counted with PyTorch's counter on tensors that have shapes and no memory.

      a pass over T tokens             counted at T
      training on T tokens             three passes: backward costs twice the forward pass
      one cached token at position t   counted behind a cache of t tokens

Nothing is extrapolated from other lengths: a window costs T x 2W, latent attention decodes in its absorbed form, a
recurrence costs the same at every position, an expert costs its own tokens. Two operations per multiply-add; attention
counts every pair that the kernel is given, those that a mask hides too (Chowdhery et al. 2022, arXiv:2204.02311,
appendix B).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llm_quest.layers.experts import Experts, run_experts_grouped_mm
from llm_quest.layers.initialize import empty_containers, materialize
from llm_quest.models.build import build_meta_model
from llm_quest.scope import Scope

Shape = Sequence[int]
T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)

LINEAR_OPS = ("aten.mm", "aten.addmm", "aten._grouped_mm", "llm_quest.grouped_product")
"""Products of tokens with weights; all others are products of tokens with tokens."""
LARGE_CAPACITY = 2**18


def grouped_mm_flops(x: Shape, weights: Shape, *rest: Any, **options: Any) -> int:
    """x (N,K), each row times one of the matrices (E,K,M): 2 N K M."""
    return 2 * math.prod(x) * weights[-1]


def grouped_outer_flops(x: Shape, y: Shape, *rest: Any, **options: Any) -> int:
    """The gradient of the matrices, x (N,K) and y (N,M) -> (E,K,M): 2 N K M."""
    return 2 * math.prod(x) * y[-1]


def inplace_product_flops(out: Shape, x: Shape, y: Shape, *rest: Any, **options: Any) -> int:
    """out += x (...,N,K) y (...,K,M): 2 N K M for each pair of matrices."""
    return 2 * math.prod(x) * y[-1]


def attention_flops(q: Shape, k: Shape, v: Shape, *rest: Any, **options: Any) -> int:
    """q (B,H,T,d), k (B,G,S,d), v (B,G,S,dv): 2 B H T S (d + dv)."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def attention_backward_flops(gradient: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **options: Any) -> int:
    """Twice the forward pass, as for every product. (The kernel also computes the scores again, which is not work.)"""
    return 2 * attention_flops(q, k, v)


def flop_formulas() -> dict[Any, Any]:
    """Operators that PyTorch's counter does not know: the CPU's attention kernel, products in place, experts."""
    aten, ours = torch.ops.aten, torch.ops.llm_quest
    formulas: dict[Any, Any] = {
        aten._grouped_mm: grouped_mm_flops,
        aten.addmm_: inplace_product_flops,
        aten.baddbmm_: inplace_product_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    for name, formula in (("grouped_product", grouped_mm_flops), ("grouped_outer", grouped_outer_flops)):
        operator = getattr(ours, name, None)  # they exist once layers/grouped_mm.py is imported
        if operator is not None:
            formulas[operator] = formula
    return formulas


def make_flop_counter() -> FlopCounterMode:
    """PyTorch's counter, with our formulas."""
    return FlopCounterMode(display=False, custom_mapping=flop_formulas())


class OperatorFlops(TorchDispatchMode):
    """A dispatch mode that knows the FLOPs of operators. (FlopCounterMode tells every module apart, keeps the graph of
    each alive and tries to decompose every operator, which takes most of its time.)"""

    def __init__(self) -> None:
        super().__init__()
        self.formulas = make_flop_counter().flop_registry

    def count(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        """FLOPs of one call; 0 for an operator without products."""
        formula = self.formulas.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=out) if formula else 0


class PassCounter(OperatorFlops):
    """FLOPs of the operators inside, by the number of the block that they run in (None: outside of all) and the
    operator."""

    def __init__(self, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.blocks, self.block = list(blocks), None
        self.flops: Counter[tuple[int | None, str]] = Counter()

    def __enter__(self) -> Self:
        self.hooks = [block.register_forward_pre_hook(partial(self.move, n)) for n, block in enumerate(self.blocks)]
        self.hooks += [block.register_forward_hook(partial(self.move, None)) for block in self.blocks]
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def move(self, block: Any, *_: Any) -> None:
        """The next operators run in this block."""
        self.block = block

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs := kwargs or {}))
        if flops := self.count(func, args, kwargs, out):
            self.flops[self.block, str(func._overloadpacket)] += flops
        return out

    def split(self, block_counts: Sequence[int] = ()) -> tuple[int, int]:
        """(products with weights, products of tokens with tokens). block_counts: how many each block stands for."""
        flops = {True: 0, False: 0}
        for (block, operator), count in self.flops.items():
            flops[operator in LINEAR_OPS] += count if block is None else count * block_counts[block]
        return flops[True], flops[False]


def fake_copy(module: T, mode: FakeTensorMode) -> T:
    """The same module or batch on tensors without memory, of the same shapes, types and devices."""
    with FakeCopyMode(mode):
        return copy.deepcopy(module, empty_containers(module) if isinstance(module, nn.Module) else None)


class ShapeCopyMode(TorchFunctionMode):
    """Inside, `copy.deepcopy` copies a tensor's shape and type, and no values, to a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.copy_shape(tensor)
        return memo[id(tensor)]

    def copy_shape(self, tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)


def shape_copy(module: Module, device: str = "meta", blocks: nn.ModuleList | None = None) -> Module:
    """The same module with tensors of the same shapes and types and any values, on a device. On the meta device
    operators cost a third of what they cost on PyTorch's fake tensors; it has no autocast. blocks: those of its blocks
    that the copy has, the others are not copied."""
    with ShapeCopyMode(device) as mode:  # a parameter copies its data by other functions
        memo: dict[int, Any] = {id(p): nn.Parameter(mode.copy_shape(p), p.requires_grad) for p in module.parameters()}
        memo |= empty_containers(module)
        if blocks is not None:
            memo[id(module.blocks)] = copy.deepcopy(blocks, memo)
        return copy.deepcopy(module, memo)


def use_grouped_experts(model: nn.Module) -> None:
    """Run experts in one grouped product: its shapes do not depend on which experts are chosen, and it has the loop's
    FLOPs. Tensors without memory may have any width."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.run_experts = run_experts_grouped_mm


class PassCost(Protocol):
    """FLOPs of passes over one row, by its length."""

    def forward(self, length: int) -> int: ...
    def training(self, length: int) -> int: ...
    def decoding(self, context_length: int, num_tokens: int) -> int: ...


class ModelCost:
    """What passes over a decoder cost, with whatever techniques it carries: FLOPs of a forward pass, of training, of
    cached decoding, and bytes of the cache. The model is copied without memory, with one block of each kind. dtype: in
    place of the model's own."""

    def __init__(self, model: Any, dtype: torch.dtype | None = None):
        kinds: dict[Any, list[nn.Module]] = {}
        for block in model.blocks:
            kinds.setdefault(block_signature(block), []).append(block)
        self.model: Any = shape_copy(model, blocks=nn.ModuleList(alike[0] for alike in kinds.values())).eval()
        if dtype is not None:
            materialize(self.model, "meta", dtype)
        use_grouped_experts(self.model)
        self.block_counts = tuple(len(alike) for alike in kinds.values())
        longest = model.config.max_position_embeddings
        self._forward = PiecewisePolynomial(lambda length: sum(self.count_pass(length)), longest, degree=2)
        self._step = PiecewisePolynomial(lambda place: sum(self.count_pass(1, start=place)), longest - 1, degree=1)

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype = torch.bfloat16) -> ModelCost:
        """The cost of the model that a config describes, however large."""
        return cls(build_meta_model(config), dtype)

    def forward(self, length: int) -> int:
        """One row of `length` tokens, forward."""
        return self._forward(length)

    def training(self, length: int) -> int:
        """One row of `length` tokens, forward and backward, where every parameter is trained."""
        return 3 * self.forward(length)

    def decoding(self, context_length: int, num_tokens: int) -> int:
        """`num_tokens` tokens one after another behind `context_length` cached ones. The first comes out of the
        prompt's pass, and the last is never fed."""
        return sum(self._step(context_length + i) for i in range(num_tokens - 1))

    def count_pass(self, length: int, start: int = 0) -> tuple[int, int]:
        """FLOPs of one pass over `length` tokens behind `start` cached ones: products with weights, products of tokens
        with tokens."""
        with torch.device("meta"), torch.no_grad():
            tokens = torch.zeros(1, start + length, dtype=torch.int64)
            cache = None
            if start:
                cache = self.model.new_cache(1, start + length)
                self.model(tokens[:, :start], Scope.unpadded(tokens[:, :start], cache=cache))
            with PassCounter(self.model.blocks) as counter:
                self.model(tokens[:, start:], Scope.unpadded(tokens[:, start:], cache=cache, start=start))
        return counter.split(self.block_counts)

    def cache_bytes(self, context: int) -> tuple[int, int, int]:
        """(bytes that one more token adds, bytes that do not grow, bytes at `context` tokens), for one row."""
        at_context, once, twice = map(self.count_cache_bytes, (context, LARGE_CAPACITY, 2 * LARGE_CAPACITY))
        growing = (twice - once) // LARGE_CAPACITY
        return growing, once - growing * (LARGE_CAPACITY + 1), at_context

    def count_cache_bytes(self, capacity: int, *, bf16: bool = False) -> int:
        """Bytes of a cache for one row, after filing a token. (A slot cache has one spare slot, for padding.) bf16:
        under autocast, which the meta device does not have."""
        mode = FakeTensorMode() if bf16 else torch.device("meta")
        with mode, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model = shape_copy(self.model, "cpu") if bf16 else self.model
            token = torch.zeros(1, 1, dtype=torch.int64)
            cache = model.new_cache(1, capacity)
            model(token, Scope.unpadded(token, cache=cache))
        return sum(n * layer.nbytes() for n, layer in zip(self.block_counts, cache.layers, strict=True))


def block_signature(block: nn.Module) -> Any:
    """Equal for blocks that cost the same: the classes, plain attributes and parameter shapes of all their modules."""
    parts: list[Any] = []
    for path, module in block.named_modules():
        shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters(recurse=False)]
        public = sorted((name, value) for name, value in vars(module).items() if not name.startswith("_"))
        values = [(name, value if isinstance(value, PLAIN) else type(value).__name__) for name, value in public]
        parts.append((path, type(module).__name__, *shapes, *values))
    return tuple(parts)


PLAIN = (int, float, str, tuple, type(None))


class PiecewisePolynomial:
    """A count at every length. Between two powers of four it is a polynomial if four counts lie on one exactly; where
    they do not (windows, chunks, a change of form), each length is counted, once."""

    def __init__(self, count: Callable[[int], int], longest: int, *, degree: int):
        self.count, self.longest, self.degree = count, longest, degree
        self.counts: dict[int, int] = {}
        self.pieces: dict[int, list[int] | None] = {}

    def __call__(self, n: int) -> int:
        low = 4 ** ((n.bit_length() - 1) // 2) if n else 0
        if low not in self.pieces:
            self.pieces[low] = self.nodes(low)
        nodes = self.pieces[low]
        return self.at(n) if nodes is None else lagrange([(x, self.at(x)) for x in nodes], n)

    def at(self, n: int) -> int:
        if n not in self.counts:
            self.counts[n] = self.count(n)
        return self.counts[n]

    def nodes(self, low: int) -> list[int] | None:
        """Lengths whose counts say all others of the piece that begins at `low`; None if they do not."""
        high = min(4 * low - 1, self.longest)
        if high - low < 8:
            return None
        nodes = [low, (low + high) // 2, high][-self.degree - 1 :] if self.degree == 2 else [low, high]
        check = low + (high - low) // 3
        exact = lagrange([(x, self.at(x)) for x in nodes], check) == self.at(check)
        return nodes if exact else None


def lagrange(points: Sequence[tuple[int, int]], x: int) -> int:
    """The polynomial through the points, at x."""
    total = Fraction(0)
    for i, (xi, yi) in enumerate(points):
        others = [xj for j, (xj, _) in enumerate(points) if j != i]
        total += yi * Fraction(math.prod(x - xj for xj in others), math.prod(xi - xj for xj in others))
    return round(total)


def image_flops(config: Any) -> tuple[int, int]:
    """(products with weights, products of patches with patches) of reading one image, forward: an image encoder with
    its classifier; of a vision-language model the encoder and the projector, before the decoder reads anything; of a
    CLIP its image encoder."""
    seen = getattr(config, "vision_config", config)
    shape = (1, seen.num_channels, seen.image_size, seen.image_size)

    def read(model: Any) -> Any:
        images = torch.zeros(shape, dtype=torch.bfloat16)
        return model(images) if seen is config else model.get_image_features(images)

    return count_flops(config, read)


def text_flops(config: Any) -> tuple[int, int]:
    """FLOPs of reading one text of the longest length, for a text encoder."""
    tokens = lambda: torch.zeros(1, config.max_position_embeddings, dtype=torch.int64)  # noqa: E731
    return count_flops(config, lambda model: model.head(model.hidden_states(tokens())[:, 0]))


def count_flops(config: Any, run: Callable[[Any], Any]) -> tuple[int, int]:
    model = materialize(build_meta_model(config).eval(), "meta", torch.bfloat16)
    with torch.device("meta"), torch.no_grad(), PassCounter() as counter:
        run(model)
    return counter.split()
