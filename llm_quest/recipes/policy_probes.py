"""What is looked at while a policy learns: held-out accuracy, and how far a ratio went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_quest.data.problems import Problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.policy_gradient import PolicyGradient
from llm_quest.recipes.probes import keep_samples
from llm_quest.rollouts.evaluation import Accuracy, evaluate_problems


@dataclass
class HeldOut:
    """accuracy (greedy), and from samples mean@n and pass@k; the first answers go to
    samples/step-00000020.json."""

    problems: Sequence[Problem]
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    every: int
    new_tokens: int
    samples: int
    temperature: float
    seed: int
    folder: Path | None = None
    name: str = "eval"

    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        found = self.accuracy(model)
        if self.folder is not None:
            told = [{"prompt": p, "text": text, "wanted": answer} for p, text, answer, _ in found.examples]
            keep_samples(self.folder, step, told)
        passes = {f"pass@{k}": value for k, value in found.passes.items()}
        mean = {f"mean@{found.samples}": found.mean} if found.samples else {}
        return {"accuracy": found.greedy.share, "length": found.tokens, **mean, **passes}

    def accuracy(self, model: Decoder) -> Accuracy:
        return evaluate_problems(
            model,
            self.tokenizer,
            self.problems,
            samples=self.samples,
            temperature=self.temperature,
            max_new_tokens=self.new_tokens,
            seed=self.seed,
            encode=self.encode,
        )


@dataclass
class Extremes:
    """The smallest and largest ratio, before clipping, since the last row."""

    objective: PolicyGradient
    every: int
    name: str = "ratio"

    def measure(self, model: Decoder, step: int) -> Mapping[str, float]:
        low, high = self.objective.extremes.tolist()
        self.objective.extremes = torch.ones(2)
        return {"min": low, "max": high}
