"""The environment of a policy recipe: its keys, and episodes in place of single answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import Field, field_validator, model_validator

from llm_quest.contracts import LogFn
from llm_quest.data.problems import Problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError
from llm_quest.files import absolute_path
from llm_quest.generation.sampling import SamplingParams
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.config_schema import PositiveFloat, PositiveInt
from llm_quest.recipes.policy import PolicyConfig
from llm_quest.recipes.policy_prompts import ProblemSet, PromptEncoder
from llm_quest.recipes.schema import did_you_mean
from llm_quest.rollouts.environments import EnvironmentClient, EnvironmentHost, EpisodeFailure, start_user_environment
from llm_quest.rollouts.episodes import EpisodeSampler, TurnEncoder
from llm_quest.rollouts.included_environments import ENVIRONMENTS, read_paragraphs
from llm_quest.rollouts.sampler import PolicyPrompt, Sample, Sampler, copy_numbers
from llm_quest.rollouts.user_code import check_reference, hash_user_code

RESETS_AT_ONCE = 64
HELD_OUT_GAMES = 10


class EpisodeConfig(PolicyConfig):
    """Keys of a policy that acts in an environment, over several turns."""

    environment: str | None = Field(
        default=None,
        description="calculator, guessing_game, file_search, functions, or FILE.py:CLASS; null: one answer a prompt",
    )
    environment_kwargs: dict[str, Any] = Field(default_factory=dict, description="the environment's own options")
    environment_timeout: PositiveFloat = Field(default=60.0, description="seconds for a turn of all episodes")
    max_turns: PositiveInt = Field(default=4, description="turns of the policy, each of max_new_tokens at most")
    max_episode_tokens: PositiveInt | None = Field(
        default=None, description="tokens of policy and environment together; null: the context"
    )

    @model_validator(mode="before")
    @classmethod
    def default_rewards(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("environment") is not None and given.get("rewards") is None:
            return {**given, "rewards": [{"name": "environment"}]}
        return given

    @field_validator("environment")
    @classmethod
    def check_environment_name(cls, environment: str | None) -> str | None:
        return None if environment is None else check_environment(environment)

    @model_validator(mode="after")
    def check_environment_keys(self) -> EpisodeConfig:
        if self.environment is None:
            for key in ("environment_kwargs", "environment_timeout", "max_turns", "max_episode_tokens"):
                if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                    raise ValueError(f"{key} has no effect without environment; leave it out")
            return self
        for key in ("attention_coef", "overlong_buffer_tokens"):
            if getattr(self, key):
                raise ValueError(f"{key} is for single answers; leave it out, or environment")
        if self.by_steps:
            raise ValueError("process_supervision is for single answers; leave it out, or environment")
        check_environment_options(self.environment, self.environment_kwargs)
        return self

    @property
    def max_completion_tokens(self) -> int:
        turns = self.max_turns if self.environment is not None else 1
        return turns * self.max_new_tokens


def check_environment(environment: str) -> str:
    """The name of an included environment, or FILE.py:CLASS with the whole path."""
    if environment in ENVIRONMENTS:
        return environment
    if ".py:" in environment:
        return check_reference(environment)
    known = list(ENVIRONMENTS)
    raise UsageError(
        f"no environment is called {environment!r}{did_you_mean(environment, known)}; known: {', '.join(known)}, or "
        "FILE.py:CLASS"
    )


def check_environment_options(environment: str, options: Mapping[str, Any]) -> None:
    """ValueError for an option that an included environment does not have."""
    if environment in ENVIRONMENTS:
        known = [one.name for one in dataclasses.fields(ENVIRONMENTS[environment]) if one.init]
        for name in options:
            if name not in known:
                raise ValueError(
                    f"environment_kwargs.{name} has no effect on {environment}{did_you_mean(name, known)}; it has "
                    f"{', '.join(known)}"
                )
    if environment == "functions":
        functions = options.get("functions")
        if not isinstance(functions, list) or not functions:
            raise ValueError("environment_kwargs.functions: name the tools, [my_tools.py:FUNCTION]")
        options["functions"] = [check_reference(str(function)) for function in functions]  # type: ignore[index]
    if environment == "file_search" and isinstance(options.get("folder"), str):
        options["folder"] = absolute_path(options["folder"])  # type: ignore[index]


def environment_hashes(environment: str | None, options: Mapping[str, Any]) -> dict[str, str]:
    """Name -> hash of each file that decides the environment, which a resumed run may not change."""
    if environment == "functions":
        return {f"environment.{one}": hash_user_code(one) for one in options.get("functions", ())}
    if environment == "file_search":
        text = "\0".join(read_paragraphs(str(options["folder"])))
        return {"environment.folder": hashlib.sha256(text.encode()).hexdigest()}
    if environment is None or environment in ENVIRONMENTS:
        return {}
    return {"environment": hash_user_code(environment)}


def start_environment(
    environment: str, options: Mapping[str, Any], *, timeout_seconds: float, log: LogFn
) -> EnvironmentClient:
    """Start an environment: an included one in this process, a user's class or functions in one that can be killed."""
    if environment not in ENVIRONMENTS or environment == "functions":
        return start_user_environment(environment, options, timeout_seconds=timeout_seconds, log=log)
    make = partial(ENVIRONMENTS[environment], **options)
    try:
        make()
    except TypeError as error:
        raise UsageError(f"environment_kwargs of {environment}: {error}") from None
    return EnvironmentClient(environment, EnvironmentHost(make).answer, log)


def environment_failures(environments: EnvironmentClient | None) -> list[str]:
    """Lines about the failures of the environment, for the end of a run."""
    return [] if environments is None else environments.failure_lines()


def game_problems(number: int, seed: int) -> ProblemSet:
    """Problems for an environment that needs no rows: {"index": 0}, {"index": 1} and so on, one in HELD_OUT_GAMES held
    out."""

    def game(index: int) -> Problem:
        return Problem("", "", "equal", str(index), columns={"index": index, "seed": seed})

    return ProblemSet(
        lambda index: game(index + index // (HELD_OUT_GAMES - 1) + 1),
        [game(index * HELD_OUT_GAMES) for index in range(number)],
        f"games {seed}",
    )


def reset_row(problem: Problem) -> dict[str, Any]:
    """The arguments of an environment's `reset`: the row's columns, or a task's prompt and answer."""
    if problem.columns:
        messages = {"messages": [dict(message) for message in problem.messages]} if problem.messages else {}
        return {**messages, "prompt": problem.prompt, "answer": problem.answer, **problem.columns}
    return {"prompt": problem.prompt, "answer": problem.answer}


@dataclass
class EnvironmentProblems:
    """Problems that begin with an environment's first messages. keep_answers: whether a reward besides the
    environment's compares with the answers. Rows on which `reset` fails are skipped."""

    problems: ProblemSet
    environments: EnvironmentClient
    keep_answers: bool
    known: dict[int, Problem] = field(default_factory=dict)

    def train_problem(self, index: int) -> Problem:
        if index not in self.known:
            self.known = dict(enumerate(self.begin([self.problems.train_problem(n) for n in self.block(index)]), index))
        return self.known[index]

    def block(self, index: int) -> range:
        return range(index, index + RESETS_AT_ONCE)

    def begin(self, problems: Sequence[Problem]) -> list[Problem]:
        """Reset the environment for each problem; one that fails is replaced by the next that does not."""
        first = self.environments.reset([reset_row(problem) for problem in problems])
        begun = [
            None if isinstance(messages, EpisodeFailure) or not messages else self.begin_problem(problem, messages)
            for problem, messages in zip(problems, first, strict=True)
        ]
        good = [one for one in begun if one is not None]
        if not good:
            failed = next((one.message for one in first if isinstance(one, EpisodeFailure)), "it gave no messages")
            raise DataError(f"the environment {self.environments.name} begins no episode: {failed}")
        episodes, following = [], good[0]
        for one in reversed(begun):
            following = one or following
            episodes.append(following)
        return episodes[::-1]

    def begin_problem(self, problem: Problem, messages: list[dict[str, Any]]) -> Problem:
        return replace(
            problem,
            prompt="".join(message["content"] for message in messages),
            messages=tuple(messages),
            is_conversational=True,
            columns=reset_row(problem),
            answer=problem.answer if self.keep_answers else "",
            tools=self.environments.tools or problem.tools,
        )

    def as_set(self) -> ProblemSet:
        held_out = self.begin(self.problems.held_out)
        return replace(self.problems, train_problem=self.train_problem, held_out=held_out, is_conversational=True)


def episode_sampler_wrapper(
    environments: EnvironmentClient, tokenizer: Tokenizer, encode: PromptEncoder, *, max_turns: int,
    max_episode_tokens: int | None,
) -> Callable[[Sampler], EpisodeSampler]:  # fmt: skip
    """A function that makes a sampler of episodes from a sampler of answers."""
    turns = TurnEncoder(tokenizer, encode.chat)
    return lambda sampler: EpisodeSampler(
        sampler=sampler, environments=environments, encode_turns=turns, max_turns=max_turns,
        max_episode_tokens=max_episode_tokens,
    )  # fmt: skip


def draw_episodes(
    sampler: EpisodeSampler, encode: PromptEncoder, model: Decoder, problems: Sequence[Problem],
    sampling: SamplingParams, n: int, seed: int,
) -> list[list[Sample]]:  # fmt: skip
    """Play n episodes of each problem."""
    ids = encode.encode_problems(problems)
    prompts = [PolicyPrompt(tuple(one), problem) for one, problem in zip(ids, problems, strict=True)]
    return sampler.play(model, prompts, copy_numbers([prompt.prompt_ids for prompt in prompts]), sampling, n, seed)
