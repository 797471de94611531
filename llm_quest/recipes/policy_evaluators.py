"""What is looked at while a policy learns: held-out accuracy, and how far a ratio went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_quest.data.problems import Problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.eval.evaluators import save_samples
from llm_quest.eval.problems import ProblemAccuracy, evaluate_problems
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.policy_gradient import PolicyGradientLoss


@dataclass
class ProblemEvaluator:
    """accuracy (greedy), and from samples mean@n and pass@k; the first answers go to
    samples/step-00000020.json."""

    problems: Sequence[Problem]
    tokenizer: Tokenizer
    encode: Callable[[str], list[int]]
    interval: int
    max_new_tokens: int
    num_samples: int
    temperature: float
    seed: int
    samples_dir: Path | None = None
    name: str = "eval"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        found = self.accuracy(model)
        if self.samples_dir is not None:
            sample_rows = [{"prompt": p, "text": text, "wanted": answer} for p, text, answer, _ in found.examples]
            save_samples(self.samples_dir, step, sample_rows)
        passes = {f"pass@{k}": value for k, value in found.pass_at_k.items()}
        mean = {f"mean@{found.num_samples}": found.mean_at_k} if found.num_samples else {}
        return {"accuracy": found.greedy_accuracy.share, "length": found.mean_tokens, **mean, **passes}

    def accuracy(self, model: Decoder) -> ProblemAccuracy:
        return evaluate_problems(
            model,
            self.tokenizer,
            self.problems,
            num_samples=self.num_samples,
            temperature=self.temperature,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            encode_prompt=self.encode,
        )


@dataclass
class RatioRangeEvaluator:
    """The smallest and largest ratio, before clipping, since the last row."""

    objective: PolicyGradientLoss
    interval: int
    name: str = "ratio"

    def evaluate(self, model: Decoder, step: int) -> Mapping[str, float]:
        low, high = self.objective.ratio_range.tolist()
        self.objective.ratio_range = torch.ones(2)
        return {"min": low, "max": high}
