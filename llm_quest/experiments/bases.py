"""Trains the runs that arms begin from (a policy to fine-tune, a teacher): one for each seed, which the arms of a pair
share. `<name>` in settings is the folder of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llm_quest.experiments.code_tree import CodeTree
from llm_quest.experiments.measurements import Measurements, RunRequest, hash_inputs


@dataclass(frozen=True)
class Base:
    """A run that arms begin from. pairs: its settings, which may name bases before it."""

    name: str
    recipe: str
    pairs: tuple[str, ...]


@dataclass(frozen=True)
class BaseRuns:
    """The bases of an experiment, in the order in which the control's code trains them. data: hashes by name."""

    bases: tuple[Base, ...]
    measurements: Measurements
    code: CodeTree
    data: dict[str, str] = field(default_factory=dict)

    def fill_in(self, pairs: tuple[str, ...], seed: int) -> tuple[str, ...]:
        """The settings with the folder of this seed's run in place of each `<name>`."""
        for base in self.bases:
            if any(f"<{base.name}>" in pair for pair in pairs):
                folder = str(self.measurements.folder(self.request(base, seed)).absolute())
                pairs = tuple(pair.replace(f"<{base.name}>", folder) for pair in pairs)
        return pairs

    def request(self, base: Base, seed: int) -> RunRequest:
        return RunRequest(
            base.name,
            self.fill_in(base.pairs, seed),
            seed,
            self.code,
            "base",
            recipe=base.recipe,
            data=self.data.get(base.name, ""),
        )

    def train(self, seeds: Sequence[int]) -> None:
        """Train what is missing for these seeds."""
        for base in self.bases:
            if base.name not in self.data:
                pairs = [*self.fill_in(base.pairs, seeds[0]), f"seed={seeds[0]}"]
                message = {"do": "describe", "recipe": base.recipe, "pairs": pairs}
                self.data[base.name] = hash_inputs(self.measurements.pool.submit(self.code, message).result())
            self.measurements.measure([self.request(base, seed) for seed in seeds], f"training {base.name}")
