"""Computing wholly in float64: float32 is replaced wherever it is requested.

Models compute norms, softmax, routing, rotations and recurrences in float32 whatever the dtype of their weights, so
that even a model of float64 weights rounds to 1e-7, and recurrences and norms magnify that to 1e-3. While `Float64` is
active nothing rounds to float32, and what is left between two models is a difference of method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Mode that replaces float32 by float64 in every call, `Tensor.float` included."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        double_func: Callable[..., Any] = torch.Tensor.double if func is torch.Tensor.float else func
        single, double = torch.float32, torch.float64
        args = tuple([double if value is single else value for value in args])
        if not kwargs:  # most calls; to read a shape is one too
            return double_func(*args)
        return double_func(*args, **{name: double if value is single else value for name, value in kwargs.items()})


@contextmanager
def computing_in_float64() -> Iterator[None]:
    """Compute in float64 inside, by default dtype and by `Float64`. Models must be built and loaded inside too, from
    files of float64: frequencies and embedding scales are computed then."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)
