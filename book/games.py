"""The games: recorded mutations of the package, at most one for each file, whose tests are quick."""

from __future__ import annotations

from tests.mutations import MUTATIONS, Mutation

SLOW = ("tests/models/", "tests/train/", "tests/recipes/", "tests/laws/test_callbacks", "tests/laws/test_ragged",
        "tests/laws/test_alignment", "compiled", "quantized_tiles")  # fmt: skip


TAUGHT = ("layers/", "objectives/", "rollouts/", "generation/", "techniques/", "eval/")
"""Packages whose mistakes are about models and methods."""

NUMBER = 40


def choose() -> tuple[Mutation, ...]:
    """Quick mutations: one of each file, then a second of some."""
    chosen: dict[str, list[Mutation]] = {}
    for one in MUTATIONS:
        if one.file.startswith(TAUGHT) and one.file.endswith(".py") and not any(word in one.tests for word in SLOW):
            chosen.setdefault(one.file, []).append(one)
    first = [several[0] for several in chosen.values()]
    second = [several[1] for several in chosen.values() if len(several) > 1]
    return tuple([*first, *second][:NUMBER])


GAMES = choose()
