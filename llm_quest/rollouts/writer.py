"""The policy writes: groups of samples, drawn by the same engine and the same weights that are trained.

Sampling is pure: temperature alone. Top-k, top-p and min-p draw from another distribution than the one that is scored
afterwards, and the ratio of the policy with itself would be the mass they kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from llm_quest.errors import UsageError
from llm_quest.generation.generate import complete
from llm_quest.generation.sampling import Sampling
from llm_quest.generation.until import Completion, Until
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.sample import Sample

Within = Callable[[], AbstractContextManager[Any]]


class Decodes(Protocol):
    """A tokenizer, as far as samples need one. Control tokens are left out of the text."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Question:
    """What is asked: the prompt's ids and the problem they came from."""

    prompt: tuple[int, ...]
    problem: Any = None


@dataclass(frozen=True, kw_only=True)
class Writer:
    """`writer(policy, questions, n, seed) -> groups`: n samples of each question, those of one question together.

    eos: every token that ends a text. within: what to sample under (autocast, the same as in training). at_once: rows
    sampled together, 0 for all."""

    tokenizer: Decodes
    eos: tuple[int, ...]
    new_tokens: int
    temperature: float = 1.0
    within: Within = nullcontext
    at_once: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}: a policy that is trained has to be sampled, above 0")

    def __call__(self, policy: Decoder, questions: Sequence[Question], n: int, seed: int) -> list[list[Sample]]:
        sampling = Sampling(temperature=self.temperature)
        until = Until(max_new_tokens=self.new_tokens, eos=self.eos)
        groups = max(1, self.at_once // n) if self.at_once else max(1, len(questions))
        found: list[list[Sample]] = []
        with evaluating(policy), self.within():
            for first in range(0, len(questions), groups):
                some = questions[first : first + groups]
                made = complete(policy, [each.prompt for each in some], sampling, until, n=n, seed=seed + first)
                found += [
                    [self.sample(question, made[place * n + i]) for i in range(n)]
                    for place, question in enumerate(some)
                ]
        return found

    def sample(self, question: Question, made: Completion) -> Sample:
        """The text is decoded for the reward alone; what is trained on are the ids that were drawn."""
        text = self.tokenizer.decode([token for token in made.tokens if token not in self.eos])
        tokens, logprobs = tuple(made.tokens), tuple(made.logprobs)
        return Sample(question.prompt, tokens, logprobs, made.finished, text, question.problem)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode (no dropout). Afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
