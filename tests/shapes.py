"""The type checker of the test run: beartype, asked about tensor annotations only. Protocols and names that are
imported for the type checker alone need not be checkable while the program runs; shapes must be."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, raising where a tensor does not fit its annotation."""
    twin = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__, twin.__dict__ = function.__kwdefaults__, dict(function.__dict__)
    twin.__qualname__, twin.__module__, twin.__doc__ = function.__qualname__, function.__module__, function.__doc__
    twin.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if is_shape(hint, function)}
    return beartype(twin) if twin.__annotations__ else function


def is_shape(hint: Any, function: Callable[..., Any]) -> bool:
    """Does this annotation speak of a tensor's shape? Names not defined yet, or for the type checker alone, do not."""
    try:
        meaning = eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:
        return False
    return "jaxtyping" in f"{meaning!r}"
