"""What a policy wrote for one problem: token ids end to end, each with its log-probability as it was sampled.

Text is only ever the decoded *completion*: a reward that also reads the prompt is satisfied by the prompt's own example
(alignment.md P31)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol


class PromptedProblem(Protocol):
    """What a task asks. A task is a pure function (seed, index) -> problem."""

    @property
    def prompt(self) -> str: ...


class ProblemSource(Protocol):
    """The same seed and index give the same problem, on every machine."""

    def __call__(self, seed: int, index: int) -> PromptedProblem: ...


@dataclass(frozen=True)
class Sample:
    """prompt_ids: ids. completion_ids: the completion's ids, the end-of-text token included if it was sampled;
    logprobs: of each, under the distribution that was sampled. finish_reason: "eos", "stop", or "length" (cut by the
    budget). text: the decoded completion, without the prompt and the end-of-text token. problem: what was asked."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["eos", "length", "stop"]
    text: str
    problem: Any = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"
