"""Environments of multi-turn reinforcement learning, and their client, which runs a user's class in a process.

An environment is a class with two methods:

      class Env:
          tools = [...]                                             optional: for chat templates (`tool_schema.py`)
          def reset(self, row) -> messages                          row: the columns of a row, as a dict
          def step(self, completion) -> (messages, reward, done)    the answer, its reward, whether the episode ends

Messages are {"role": ..., "content": ...}, or a text for one message of the user. One object plays one episode; those
of one row must begin with the same messages, for their rewards are compared. The environment's text is in the context
of the policy and has no loss.

Commonly got wrong: the context of the next turn is rendered and tokenized anew, so that the policy is trained on ids
that it never sampled; or the answers of tools have a loss, and the policy learns to invent them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from llm_quest.errors import UsageError
from llm_quest.rollouts.included_environments import ENVIRONMENTS, Messages
from llm_quest.rollouts.tool_schema import tool_schemas
from llm_quest.rollouts.user_code import load_user_object
from llm_quest.rollouts.worker_process import FailureCounter, WorkerFailure, WorkerProcess, describe_exception

Row = Mapping[str, Any]


class Environment(Protocol):
    """One episode: the methods that a class of an environment has."""

    def reset(self, row: Row) -> Any: ...

    def step(self, completion: str) -> Any: ...


class EpisodeFailure(NamedTuple):
    """An environment that raised, or returned something else than messages, reward and done."""

    message: str


class Step(NamedTuple):
    """An environment's answer to a completion."""

    messages: Messages
    reward: float
    done: bool


class EnvironmentHost:
    """Holds the environments of a batch of episodes, and answers requests about them: ("reset", rows) begins a new
    batch, ("step", {number: completion}) plays one turn of some of them, ("tools", None) gives the schemas of its
    tools."""

    def __init__(self, make: Callable[[], Environment]):
        self.make = make
        self.environments: list[Environment | None] = []

    def answer(self, request: tuple[str, Any]) -> Any:
        kind, content = request
        if kind == "tools":
            return tool_schemas(getattr(self.make(), "tools", ()))
        return self.reset(content) if kind == "reset" else self.step(content)

    def reset(self, rows: Sequence[Row]) -> list[Messages | EpisodeFailure]:
        """The first messages of each episode."""
        replies: list[Messages | EpisodeFailure] = []
        self.environments = []
        for row in rows:
            try:
                environment = self.make()
                replies.append(to_message_list(environment.reset(dict(row))))
                self.environments.append(environment)
            except Exception as error:
                replies.append(EpisodeFailure(describe_exception(error)))
                self.environments.append(None)
        return replies

    def step(self, completions: Mapping[int, str]) -> dict[int, Step | EpisodeFailure]:
        """One turn of some episodes."""
        return {number: self.step_one(number, completion) for number, completion in completions.items()}

    def step_one(self, number: int, completion: str) -> Step | EpisodeFailure:
        environment = self.environments[number] if number < len(self.environments) else None
        if environment is None:
            return EpisodeFailure("its environment is gone")
        try:
            messages, reward, done = environment.step(completion)
            return Step(to_message_list(messages), finite_reward(reward), bool(done))
        except Exception as error:
            return EpisodeFailure(describe_exception(error))


def to_message_list(given: Any) -> Messages:
    """An environment's messages as dicts. ValueError for what is none."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}] if given else []
    messages = [dict(one) for one in given or ()]
    for one in messages:
        if not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            raise ValueError(f"a message needs 'role' and 'content', both text; got {one!r:.80}")
    return messages


def finite_reward(given: Any) -> float:
    """A reward as a float; None is 0. ValueError for one that is not finite."""
    reward = 0.0 if given is None else float(given)
    if not math.isfinite(reward):
        raise ValueError(f"the reward is {reward}; give a finite number")
    return reward


@dataclass
class EnvironmentClient:
    """The environments of a batch, by requests that always get an answer: EpisodeFailure for an environment that
    raises, hangs or crashes. call: answers requests, and raises WorkerFailure where it cannot. Failures are counted,
    and the first of each kind is logged. GuardStop after MAX_FAILED_BATCHES batches in a row in which all fail."""

    name: str
    call: Callable[[tuple[str, Any]], Any]
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.failures = FailureCounter(f"the environment {self.name}", self.log)

    @cached_property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """The JSON schemas of the environment's tools. UsageError for tools that cannot be described."""
        try:
            return tuple(self.call(("tools", None)))
        except WorkerFailure as failure:
            raise UsageError(f"the tools of the environment {self.name}: {failure.message}") from None

    def reset(self, rows: Sequence[Row]) -> list[Messages | EpisodeFailure]:
        replies = self.ask(("reset", [dict(row) for row in rows]), range(len(rows)))
        return [replies[number] for number in range(len(rows))]

    def step(self, completions: Mapping[int, str]) -> dict[int, Step | EpisodeFailure]:
        return self.ask(("step", dict(completions)), completions)

    def ask(self, request: tuple[str, Any], numbers: Any) -> dict[int, Any]:
        """The answers by episode."""
        try:
            given = self.call(request)
            answers = dict(given) if isinstance(given, dict) else dict(enumerate(given))
        except WorkerFailure as failure:
            self.failures.count(failure.kind, failure.message)
            answers = {number: EpisodeFailure(failure.message) for number in numbers}
        failed = [answer for answer in answers.values() if isinstance(answer, EpisodeFailure)]
        for one in failed:
            self.failures.count("exception", one.message)
        self.failures.end_batch(bool(failed) and len(failed) == len(answers), failed[0].message if failed else "")
        return answers

    def failure_lines(self) -> list[str]:
        """A line with the number of failures of each kind; none without failures."""
        counts = self.failures.summary()
        return [f"the environment {self.name} failed, {counts}"] if counts else []


def serve_environments(reference: str, options: Mapping[str, Any]) -> Callable[[tuple[str, Any]], Any]:
    """The handler of the process in which a user's environments run."""
    make = ENVIRONMENTS[reference] if reference in ENVIRONMENTS else load_user_object(reference)
    return EnvironmentHost(lambda: make(**options)).answer


def start_user_environment(
    reference: str, options: Mapping[str, Any], *, timeout_seconds: float, log: Callable[[str], None]
) -> EnvironmentClient:
    """Environments of a user's class (`FILE.py:CLASS`), or an included one that runs a user's code, in a process that
    can be killed."""
    worker = WorkerProcess(serve_environments, reference, dict(options))
    try:
        worker.start()
    except UsageError as error:
        raise UsageError(f"environment {reference} cannot be loaded: {error}") from None
    return EnvironmentClient(reference, lambda request: worker.call(request, timeout_seconds), log)
