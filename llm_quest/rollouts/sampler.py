"""Samples groups of completions from the policy, with the weights that are trained and the package's own generation.

Temperature is the only setting. Top-k, top-p and min-p sample from another distribution than the one that is scored
afterwards: the importance ratio of the policy with itself would then be the probability mass that they keep, not 1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from llm_quest.contracts import DataShard
from llm_quest.data.batch import split_rows
from llm_quest.data.policy_batch import PolicyRow
from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import Completion, StoppingCriteria
from llm_quest.models.decoder import Decoder

ContextFactory = Callable[[], AbstractContextManager[Any]]


class DecodingTokenizer(Protocol):
    """A tokenizer, as far as samples need one: the text that ids add to their prompt's, without control tokens."""

    def decode_continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class PolicyPrompt:
    """A prompt's ids and the problem they came from."""

    prompt_ids: tuple[int, ...]
    problem: Any = None


@dataclass(frozen=True)
class Sample:
    """A completion as it was sampled, token by token.

    completion_ids: the end-of-text token included if it was sampled. logprobs: of each, under the distribution that was
    sampled. finish_reason: "length" where the budget cut it. text: the decoded completion alone, without the prompt and
    the end-of-text token: a reward that also reads the prompt is satisfied by the prompt's own example.

    Of an episode of several turns: completion_ids holds the environment's answers too, with log-probability 0;
    is_policy_token says which ids the policy sampled (None: all), messages are those after the prompt, text is the last
    turn's, episode_reward is the sum of the environment's rewards (NaN: it failed, or there was none)."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["eos", "length", "stop"]
    text: str
    problem: Any = None
    is_policy_token: tuple[bool, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    episode_reward: float = math.nan

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def environment_failed(self) -> bool:
        """Whether the sample is an episode that cannot be scored."""
        return self.is_policy_token is not None and math.isnan(self.episode_reward)

    @property
    def num_policy_tokens(self) -> int:
        return len(self.completion_ids) if self.is_policy_token is None else sum(self.is_policy_token)

    @property
    def num_turns(self) -> int:
        """The number of the policy's messages."""
        return max(1, sum(message["role"] == "assistant" for message in self.messages))


SampleGroups = list[list[Sample]]


class RolloutSampler(Protocol):
    """Draws groups of samples: `Sampler`, or `EpisodeSampler` for several turns."""

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def autocast_context(self) -> ContextFactory: ...

    def __call__(
        self,
        policy: Decoder,
        prompts: Sequence[PolicyPrompt],
        num_generations: int,
        seed: int,
        shard: DataShard = DataShard(),
    ) -> list[list[Sample]]: ...


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """`sampler(policy, prompts, n, seed) -> groups`: n samples of each prompt, those of one prompt together.

    eos_token_ids: every token that ends a text. autocast_context: what to sample under, the same as in training.
    batch_size: rows sampled together, 0 for all."""

    tokenizer: DecodingTokenizer
    eos_token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    autocast_context: ContextFactory = nullcontext
    batch_size: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature is {self.temperature}: a policy that is trained has to be sampled, above 0")

    def __call__(
        self,
        policy: Decoder,
        prompts: Sequence[PolicyPrompt],
        num_generations: int,
        seed: int,
        shard: DataShard = DataShard(),
    ) -> list[list[Sample]]:
        """shard: this process's part of the prompts, of several that share them. A text follows from the seed, its
        prompt and which copy of that prompt it is, so neither `batch_size` nor the number of processes changes it."""
        sampling_params = SamplingParams(temperature=self.temperature)
        stopping_criteria = StoppingCriteria(max_new_tokens=self.max_new_tokens, eos_token_ids=self.eos_token_ids)
        copies = copy_numbers([each.prompt_ids for each in prompts])
        share = -(-len(prompts) // shard.world_size)
        own_prompts = range(len(prompts))[shard.rank * share : (shard.rank + 1) * share]
        at_once = max(1, self.batch_size // num_generations if self.batch_size else len(own_prompts))
        groups_of_samples: list[list[Sample]] = []
        with eval_mode(policy), self.autocast_context():
            for part in split_rows(own_prompts, at_once):
                completions = generate_completions(
                    policy,
                    [prompts[place].prompt_ids for place in part],
                    sampling_params,
                    stopping_criteria,
                    n=num_generations,
                    seed=seed,
                    copy_offsets=[copies[place] for place in part],
                )
                for number, place in enumerate(part):
                    group = completions[number * num_generations : (number + 1) * num_generations]
                    groups_of_samples.append([self.make_sample(prompts[place], one) for one in group])
        return groups_of_samples

    def make_sample(self, prompt: PolicyPrompt, completion: Completion) -> Sample:
        return completion_to_sample(prompt, completion, self.tokenizer, self.eos_token_ids)


def completion_to_sample(
    prompt: PolicyPrompt, completion: Completion, tokenizer: DecodingTokenizer, ends: Sequence[int]
) -> Sample:
    """A completion in the form that rewards take. Its text is without the token that ended it; what is trained on are
    the ids that were drawn."""
    text = tokenizer.decode_continuation(prompt.prompt_ids, [token for token in completion.tokens if token not in ends])
    tokens, logprobs = tuple(completion.tokens), tuple(completion.logprobs)
    return Sample(prompt.prompt_ids, tokens, logprobs, completion.finish_reason, text, prompt.problem)


def copy_numbers(prompts: Sequence[tuple[int, ...]]) -> list[int]:
    """For each prompt, how many equal ones come before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt])
        seen[prompt] += 1
    return numbers


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside: evaluation mode (no dropout). Afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def make_policy_rows(
    groups: Sequence[Sequence[Sample]], advantages: Sequence[Sequence[np.ndarray | None]]
) -> list[PolicyRow]:
    """A row of each sample that has advantages."""
    return [
        make_policy_row(sample, each)
        for group, advantage in zip(groups, advantages, strict=True)
        for sample, each in zip(group, advantage, strict=True)
        if each is not None
    ]


def make_policy_row(sample: Sample, advantages: np.ndarray) -> PolicyRow:
    mask = None if sample.is_policy_token is None else np.array(sample.is_policy_token, np.bool_)
    sampled = np.array(sample.logprobs, np.float32)
    return PolicyRow(sample.prompt_ids, sample.completion_ids, advantages, sampled, is_policy_token=mask)
