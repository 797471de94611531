"""Shape annotations that are checked while the tests run, by jaxtyping and beartype, and tensor annotations only:
protocols and names that are imported for the type checker alone need not be checkable while the program runs.

The verdict depends on the shapes and dtypes of what is annotated and on nothing else, so each combination of them is
checked once per function. A call like an earlier one pays for a look into a set."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping import install_import_hook, jaxtyped
from torch import Tensor
from torch.compiler import is_dynamo_compiling


def check_imports(packages: Sequence[str]) -> None:
    """From here on, modules of these packages are imported with every function's shapes checked."""
    jaxtyping.jaxtyped = wrap  # the decorator that jaxtyping's import hook writes above each function and class
    install_import_hook(packages, None)


def wrap(*, typechecker: Any = None) -> Callable[[Any], Any]:
    return check_shapes


def check_shapes(wanted: Any) -> Any:
    """The function, raising where a tensor does not fit its annotation; of a class, what `@dataclass` wrote."""
    if isinstance(wanted, type):
        if "__dataclass_fields__" in vars(wanted) and "__init__" in vars(wanted):
            wanted.__init__ = check_shapes(wanted.__init__)
        return wanted
    if not isinstance(wanted, types.FunctionType) or not (checks := checks_of(wanted)).hints:
        return wanted

    fitting, returns, num_places = checks.fitting, checks.returns, checks.num_places
    describe_places = checks.describe_places

    @functools.wraps(wanted)
    def check_and_call(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():  # or a set that grows with every test is traced and guarded
            return wanted(*args, **kwargs)
        by_place = not kwargs and len(args) >= num_places
        given = describe_places(args) if by_place else checks.describe_arguments(args, kwargs)
        results = fitting.get(given)
        if results is None:
            checks.check_arguments(args, kwargs)
            results = fitting[given] = set()
        result = wanted(*args, **kwargs)
        if returns:
            described = (result.shape, result.dtype) if type(result) is Tensor else describe(result)
            if described not in results:
                checks.check_call(result, args, kwargs)
                results.add(described)
        return result

    return check_and_call


HELD = threading.local()


class Checks:
    """The shape annotations of one function, and the descriptions of arguments that fit them, each with those of the
    results that fit the annotations with them. num_places: with so many positional arguments each that is hinted is
    among them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        hints = {name: meaning(hint, function) for name, hint in function.__annotations__.items()}
        self.hints = {name: hint for name, hint in hints.items() if "jaxtyping" in f"{hint!r}"}
        self.fitting: dict[Hashable, set[Hashable]] = {}
        if not self.hints:
            return
        self.returns = "return" in self.hints
        parameters = inspect.signature(function).parameters.values()
        hinted = [(place, one) for place, one in enumerate(parameters) if one.name in self.hints]
        self.variadic = any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for _, one in hinted)
        self.places = tuple(place for place, _ in hinted)
        self.num_places = sys.maxsize if self.variadic else 1 + max(self.places, default=-1)
        self.describe_places = make_description(self.places)
        self.names = tuple(one.name for _, one in hinted)
        self.parameters = [one.replace(annotation=self.hints.get(one.name, one.empty)) for one in parameters]
        self.function = function

    def describe_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        if self.variadic:
            return describe(args), describe(kwargs)
        by_place = tuple([describe(args[place]) for place in self.places if place < len(args)])
        if not kwargs:
            return by_place
        return by_place, tuple([(name, describe(kwargs[name])) for name in self.names if name in kwargs])

    def check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.of_arguments(*args, **kwargs)

    def check_call(self, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        HELD.result = result
        try:
            self.of_calls(*args, **kwargs)
        finally:
            HELD.result = None

    @functools.cached_property
    def of_arguments(self) -> Callable[..., Any]:
        return self.replay(inspect.Signature.empty)

    @functools.cached_property
    def of_calls(self) -> Callable[..., Any]:
        return self.replay(self.hints["return"])

    def replay(self, returns: Any) -> Callable[..., Any]:
        """A function with the annotations, checked at every call, that has nothing to compute any more."""

        @functools.wraps(self.function)
        def return_result(*args: Any, **kwargs: Any) -> Any:
            return getattr(HELD, "result", None)

        return_result.__signature__ = inspect.Signature(self.parameters, return_annotation=returns)  # type: ignore[attr-defined]
        return jaxtyped(return_result, typechecker=beartype)


CHECKS: dict[types.CodeType, Checks] = {}


def checks_of(function: types.FunctionType) -> Checks:
    """One for a function that is defined anew at every call of another."""
    if function.__code__ not in CHECKS:
        CHECKS[function.__code__] = Checks(function)
    return CHECKS[function.__code__]


def meaning(hint: Any, function: Callable[..., Any]) -> Any:
    """Names not defined yet, or for the type checker alone, mean nothing here."""
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:
        return None


def make_description(places: Sequence[int]) -> Callable[[tuple[Any, ...]], Hashable]:
    """`describe` of each of these positional arguments as one expression: a pass of a small model has a hundred calls
    with annotations, and a loop over their places would cost as much as the rest."""
    each = [f"((a.shape, a.dtype) if type(a := args[{place}]) is Tensor else describe(a))," for place in places]
    return eval(f"lambda args: ({' '.join(each)})", {"Tensor": Tensor, "describe": describe})  # type: ignore[no-any-return]


def describe(value: Any) -> Hashable:
    """All that a shape annotation can ask about."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (tuple, list)):
        return type(value), tuple([describe(one) for one in value])
    if isinstance(value, dict):
        return type(value), tuple([(name, describe(one)) for name, one in value.items()])
    return type(value)
