"""What an exercise is, and how an answer is judged: by what it computes, not by how it is written.

The reader's function and the reference run on the same inputs in float64. Where they differ, every typical mistake of
the exercise runs too; the one that computes what the reader's function does is named with its hint."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[..., Any]
Inputs = Callable[[torch.Generator], Sequence[tuple[Any, ...]]]


@dataclass(frozen=True)
class Mistake:
    """A typical wrong answer. hint: what is said to who gives it."""

    hint: str
    function: Function


@dataclass(frozen=True)
class Exercise:
    """name: of the function too. chapter: the page that explains it. task: the docstring of the stub. arguments: as in
    its signature. reference: the right answer, of torch or of the package."""

    name: str
    chapter: str
    arguments: str
    task: str
    inputs: Inputs
    reference: Function
    mistakes: tuple[Mistake, ...]

    def stub(self) -> str:
        """The file that the reader completes."""
        lines = "\n    ".join(self.task.strip().splitlines())
        return (
            "import math\n\nimport torch\nfrom torch.nn import functional as F\n\n\n"
            f'def {self.name}({self.arguments}):\n    """{lines}"""\n    raise NotImplementedError\n'
        )

    @property
    def summary(self) -> str:
        """What is asked in a few words: the beginning of the task."""
        return re.split(r"[.:;](?:\s|$)", " ".join(self.task.split()), maxsplit=1)[0]

    def examples(self) -> Sequence[tuple[Any, ...]]:
        """The inputs on which an answer is judged, the same every time."""
        return self.inputs(torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Judgment:
    """right: whether the answer is. lines: what to tell the reader."""

    right: bool
    lines: tuple[str, ...]


def judge(exercise: Exercise, answer: Function) -> Judgment:
    """Compare an answer with the reference, and with the typical mistakes."""
    wanted = [exercise.reference(*one) for one in exercise.examples()]
    try:
        got = [answer(*one) for one in exercise.examples()]
    except NotImplementedError:
        return Judgment(False, ("nothing is written yet: replace `raise NotImplementedError`",))
    except Exception as error:
        return Judgment(False, (f"it ends with {type(error).__name__}: {error}",))
    if same_all(got, wanted):
        inputs = "1 input" if len(wanted) == 1 else f"{len(wanted)} inputs"
        return Judgment(True, (f"right: {exercise.name} computes what the reference does on {inputs}",))
    for mistake in exercise.mistakes:
        if same_all(got, outputs(mistake.function, exercise)):
            return Judgment(False, (mistake.hint,))
    return Judgment(False, first_difference(exercise, got, wanted))


def outputs(function: Function, exercise: Exercise) -> list[Any]:
    """What a mistake computes; where it fails, the error's name."""
    found = []
    for one in exercise.examples():
        try:
            found.append(function(*one))
        except Exception as error:
            found.append(type(error).__name__)
    return found


def same_all(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def same(a: Any, b: Any) -> bool:
    """Equal to 1e-6, NaN equal to NaN, shapes equal."""
    if isinstance(a, str) or isinstance(b, str) or a is None or b is None:
        return bool(a == b)
    try:
        x, y = (torch.as_tensor(one).double() for one in (a, b))
    except (TypeError, ValueError, RuntimeError):
        return False
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-6, atol=1e-9, equal_nan=True)


def first_difference(exercise: Exercise, got: Sequence[Any], wanted: Sequence[Any]) -> tuple[str, ...]:
    """Where an unknown wrong answer differs first."""
    place = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if not same(a, b))
    if got[place] is None:
        return ("it returns nothing",)
    try:
        a, b = torch.as_tensor(got[place]).double(), torch.as_tensor(wanted[place]).double()
    except (TypeError, ValueError, RuntimeError):
        return (f"it returns a {type(got[place]).__name__}; a tensor or a number is wanted",)
    if a.shape != b.shape:
        return (f"input {place + 1}: the shape is {tuple(a.shape)}, wanted {tuple(b.shape)}",)
    worst = int((a - b).abs().nan_to_num(nan=float("inf")).argmax())
    return (
        f"input {place + 1}: the largest difference is at element {worst}: "
        f"got {a.flatten()[worst]:.6g}, wanted {b.flatten()[worst]:.6g}",
        f"the chapter explains it: {exercise.chapter}",
    )
