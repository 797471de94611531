"""Calls a reward function of a user's Python file, which has TRL's signature.

      def score(completions, prompts, answer, **kwargs) -> list[float | None]

It is called once a batch, by keyword: completions, prompts, completion_ids, and every column of the rows as a list. A
function without `**kwargs` gets the arguments that it names; it may be `async`. Where the rows hold messages, prompts
are lists of messages and completions are lists of one message, as in TRL (of several after an episode); else both are
texts. None: the reward does not apply.

It runs in a process that can be killed. A failure makes every reward of its batch None. It is counted, and the first
of each kind is logged with the traceback's last line."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from llm_quest.rollouts.user_code import check_reference, load_user_object
from llm_quest.rollouts.worker_process import FailureCounter, WorkerFailure, WorkerProcess

UNSCORABLE = math.nan
RewardArguments = dict[str, list[Any]]


@runtime_checkable
class FailureSummary(Protocol):
    """A reward that counts its failures."""

    def summary(self) -> str:
        """The number of failures of each kind; "" without failures."""


class FunctionReward:
    """`FunctionReward("my_rewards.py:score")(samples) -> one number each`, NaN where the function gave None or failed.

    timeout_seconds: of one batch. log: gets the first failure of each kind. GuardStop after MAX_FAILED_BATCHES failed
    batches in a row."""

    def __init__(self, reference: str, *, timeout_seconds: float = 60.0, log: Callable[[str], None] = print):
        self.reference, self.timeout_seconds = check_reference(reference), timeout_seconds
        self.worker = WorkerProcess(answer_reward_calls, self.reference)
        self.failures = FailureCounter(f"the reward {self.reference}", log)

    def __call__(self, group: Sequence[Any]) -> list[float]:
        if not group:
            return []
        try:
            given = self.worker.call(reward_arguments(group), self.timeout_seconds)
            values = self.to_floats(given, len(group))
        except WorkerFailure as failure:
            self.failures.count(failure.kind, failure.message)
            self.failures.end_batch(True, failure.message)
            return [UNSCORABLE] * len(group)
        self.failures.end_batch(False, "")
        return values

    def to_floats(self, given: Any, expected: int) -> list[float]:
        """The function's values as floats. WorkerFailure for another number of them, or for what is no number."""
        if not isinstance(given, list) or len(given) != expected:
            actual = f"{len(given)} values" if isinstance(given, list) else f"a {given}"
            raise WorkerFailure("wrong length", f"it returned {actual} for {expected} completions; give one each")
        if wrong := [value for value in given if not isinstance(value, float | None)]:
            raise WorkerFailure("no number", f"it returned {wrong[0]!r:.60}; give a number, or None")
        infinite = sum(value is not None and not math.isfinite(value) for value in given)
        if infinite:
            what = f"{infinite} of {expected} values are NaN or infinite; give None for what does not apply"
            self.failures.count("NaN", what)
        return [UNSCORABLE if value is None or not math.isfinite(value) else value for value in given]

    def summary(self) -> str:
        return self.failures.summary()


def reward_arguments(samples: Sequence[Any]) -> RewardArguments:
    """The keyword arguments for samples: completions, prompts, completion_ids and the columns of the rows."""
    columns = list(dict.fromkeys(name for sample in samples for name in sample.problem.columns))
    return {
        **{name: [sample.problem.columns.get(name) for sample in samples] for name in columns},
        "prompts": [prompt_of(sample) for sample in samples],
        "completions": [completion_of(sample) for sample in samples],
        "completion_ids": [list(sample.completion_ids) for sample in samples],
    }


def prompt_of(sample: Any) -> Any:
    problem = sample.problem
    return [dict(message) for message in problem.messages] if problem.is_conversational else problem.prompt


def completion_of(sample: Any) -> Any:
    if sample.messages:
        return [dict(message) for message in sample.messages]
    message = {"role": "assistant", "content": sample.text}
    return [message] if sample.problem.is_conversational else sample.text


def answer_reward_calls(reference: str) -> Callable[[RewardArguments], Any]:
    """The handler of a reward's process: arguments in; a list of floats and None out, other values by their repr."""
    function = load_user_object(reference)
    accepted = accepted_arguments(function)

    def call(arguments: RewardArguments) -> Any:
        named = arguments if accepted is None else {name: arguments[name] for name in accepted if name in arguments}
        given = function(**named)
        given = asyncio.run(given) if inspect.iscoroutine(given) else given
        is_list = isinstance(given, Iterable) and not isinstance(given, str | bytes | dict)
        return [plain_number(one) for one in given] if is_list else type(given).__name__

    return call


def accepted_arguments(function: Callable[..., Any]) -> list[str] | None:
    """The arguments that a function names; None where it takes all."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def plain_number(value: Any) -> Any:
    """A float; None as it is; what is no number by its repr."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return repr(value)[:60]
