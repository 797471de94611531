"""Episodes: samples of several turns, in which an environment answers the policy.

      prompt   a a </s>   x x x x   a a a </s>   x x   a </s>
               1 1  1     0 0 0 0   1 1 1  1     0 0   1  1       is_policy_token

The context of a turn is the ids as they were sampled, with the environment's ids behind them: nothing is tokenized
twice, so that the log-probabilities of a turn are those of the whole row. An episode ends when the environment says so,
when a turn is cut by its budget (max_new_tokens), after max_turns, or when max_episode_tokens or the context are full;
cut by a budget it is truncated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_quest.contracts import DataShard
from llm_quest.data.batch import split_rows
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.template_sandbox import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import Completion, StoppingCriteria
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.environments import EnvironmentClient, EpisodeFailure, Step
from llm_quest.rollouts.sampler import ContextFactory, PolicyPrompt, Sample, Sampler, copy_numbers, eval_mode


class TurnEncoder:
    """`TurnEncoder(tokenizer, chat)(messages of each turn, what ended each reply) -> ids of each turn`. chat: None for
    plain text. A template that knows no role `tool` gets tools' messages as the user's."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate | None):
        self.tokenizer, self.chat = tokenizer, chat
        self.known: dict[str, list[int]] = {}
        self.tool_role = "tool" if chat is None or renders_tool_messages(chat) else "user"

    def __call__(self, turns: Sequence[Messages], last_ids: Sequence[int]) -> list[list[int]]:
        """The ids between a reply and the next. A template's end of the reply is left out where the policy wrote it."""
        turns = [[self.with_known_role(message) for message in messages] for messages in turns]
        if self.chat is None:
            return [
                self.tokenizer.encode("".join(m["content"] for m in turn), add_special_tokens=False) for turn in turns
            ]
        new = list({repr(turn): turn for turn in turns if repr(turn) not in self.known}.values())
        if new:
            self.known |= dict(zip(map(repr, new), self.chat.encode_continuations(new), strict=True))
        rewards = [self.known[repr(turn)] for turn in turns]
        return [ids[1:] if ids[:1] == [last] else ids for ids, last in zip(rewards, last_ids, strict=True)]

    def with_known_role(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {**message, "role": self.tool_role if message["role"] == "tool" else message["role"]}


def renders_tool_messages(chat: ChatTemplate) -> bool:
    """Whether the template writes a tool's message, and not as the assistant's or not at all."""
    conversations = [[{"role": role, "content": "42"}] for role in ("tool", "assistant")]
    try:
        tool = chat.encode_continuations(conversations[:1])[0]
    except DataError:
        return False
    return "42" in chat.tokenizer.decode(tool) and tool != chat.encode_continuations(conversations[1:])[0]


@dataclass
class Episode:
    """One episode as it is played. ids, logprobs, is_policy_token: of everything behind the prompt."""

    prompt: PolicyPrompt
    copy: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_policy_token: list[bool] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    reward: float = 0.0
    ended: bool = False
    finish_reason: Any = "length"

    @property
    def context(self) -> list[int]:
        return [*self.prompt.prompt_ids, *self.ids]

    def add_ids(self, ids: Sequence[int], logprobs: Sequence[float], from_policy: bool) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.is_policy_token += [from_policy] * len(ids)

    def end(self, finish_reason: str) -> None:
        self.ended, self.finish_reason = True, finish_reason

    def fail(self) -> None:
        """End the episode without a reward; the tokens that were sampled stay."""
        self.reward = math.nan
        self.end("stop")

    def to_sample(self) -> Sample:
        return Sample(
            self.prompt.prompt_ids, tuple(self.ids), tuple(self.logprobs), self.finish_reason, self.text,
            self.prompt.problem, tuple(self.is_policy_token), tuple(self.messages), self.reward,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EpisodeSampler:
    """`EpisodeSampler(...)(policy, prompts, n, seed) -> groups`, as `Sampler`, whose settings hold for every turn.

    max_turns: of the policy; max_episode_tokens: of policy and environment together, behind the prompt; None: what the
    model's context holds."""

    sampler: Sampler
    environments: EnvironmentClient
    encode_turns: TurnEncoder
    max_turns: int
    max_episode_tokens: int | None = None

    @property
    def max_new_tokens(self) -> int:
        return self.sampler.max_new_tokens

    @property
    def autocast_context(self) -> ContextFactory:
        return self.sampler.autocast_context

    def __call__(
        self,
        policy: Decoder,
        prompts: Sequence[PolicyPrompt],
        num_generations: int,
        seed: int,
        shard: DataShard = DataShard(),
    ) -> list[list[Sample]]:
        """shard: this process's part of the prompts."""
        share = -(-len(prompts) // shard.world_size)
        own_prompts = range(len(prompts))[shard.rank * share : (shard.rank + 1) * share]
        copies = copy_numbers([each.prompt_ids for each in prompts])
        sampling = SamplingParams(temperature=self.sampler.temperature)
        return self.play(
            policy, [prompts[n] for n in own_prompts], [copies[n] for n in own_prompts], sampling, num_generations, seed
        )  # fmt: skip

    def play(
        self,
        policy: Decoder,
        prompts: Sequence[PolicyPrompt],
        copies: Sequence[int],
        sampling: SamplingParams,
        num_generations: int,
        seed: int,
    ) -> list[list[Sample]]:
        """Episodes of each prompt, those of one prompt together. copies: how many equal prompts come before each."""
        episodes = [
            Episode(prompt, copy * num_generations + g)
            for prompt, copy in zip(prompts, copies, strict=True)
            for g in range(num_generations)
        ]
        self.begin(episodes)
        with eval_mode(policy), self.autocast_context():
            for _ in range(self.max_turns):
                active = {number: episode for number, episode in enumerate(episodes) if not episode.ended}
                if not active:
                    break
                self.write_turn(policy, list(active.values()), sampling, seed)
                self.answer_turn(policy, {number: one for number, one in active.items() if not one.ended})
        samples = [episode.to_sample() for episode in trim_episodes(episodes)]
        return [samples[first : first + num_generations] for first in range(0, len(samples), num_generations)]

    def begin(self, episodes: Sequence[Episode]) -> None:
        """Every episode's environment, at its beginning. One that does not begin as its prompt says fails."""
        first = self.environments.reset([one.prompt.problem.columns for one in episodes])
        for episode, messages in zip(episodes, first, strict=True):
            same = list(messages) == [dict(message) for message in episode.prompt.problem.messages]
            if not same and not isinstance(messages, EpisodeFailure):
                self.environments.failures.count(
                    "unequal beginning", "reset gave other messages for the same row than before"
                )
            if not same:
                episode.fail()

    def write_turn(self, policy: Decoder, episodes: Sequence[Episode], sampling: SamplingParams, seed: int) -> None:
        """The policy's next turn in each episode; one whose budget cuts it ends."""
        stopping = StoppingCriteria(max_new_tokens=self.max_new_tokens, eos_token_ids=self.sampler.eos_token_ids)
        for part in split_rows(range(len(episodes)), self.sampler.batch_size or len(episodes)):
            some = [episodes[place] for place in part]
            completions = generate_completions(
                policy, [one.context for one in some], sampling, stopping, seed=seed,
                copy_offsets=[one.copy for one in some],
            )  # fmt: skip
            for episode, completion in zip(some, completions, strict=True):
                self.add_turn(policy, episode, completion)

    def add_turn(self, policy: Decoder, episode: Episode, completion: Completion) -> None:
        room = self.room(policy, episode)
        tokens = completion.tokens[:room]
        written = [token for token in tokens if token not in self.sampler.eos_token_ids]
        episode.text = self.sampler.tokenizer.decode_continuation(episode.context, written)
        episode.messages.append({"role": "assistant", "content": episode.text})
        episode.add_ids(tokens, completion.logprobs[:room], from_policy=True)
        if completion.finish_reason == "length" or room < len(completion.tokens):
            episode.end("length")

    def room(self, policy: Decoder, episode: Episode) -> int:
        """The number of tokens that the episode may still add."""
        context = policy.config.max_position_embeddings - len(episode.prompt.prompt_ids)
        most = context if self.max_episode_tokens is None else min(self.max_episode_tokens, context)
        return max(0, most - len(episode.ids))

    def answer_turn(self, policy: Decoder, episodes: Mapping[int, Episode]) -> None:
        """The environment's answer to each episode that goes on."""
        if not episodes:
            return
        answers = self.environments.step({number: one.text for number, one in episodes.items()})
        going_on: list[tuple[Episode, Messages]] = []
        for number, episode in episodes.items():
            answer = answers[number]
            if isinstance(answer, Step):
                episode.reward += answer.reward
                episode.messages += answer.messages
                if answer.done:
                    episode.end("eos")
                else:
                    going_on.append((episode, answer.messages))
            else:
                episode.fail()
        ids = self.encode_turns([messages for _, messages in going_on], [one.ids[-1] for one, _ in going_on])
        for (episode, _), new in zip(going_on, ids, strict=True):
            episode.add_ids(new, [0.0] * len(new), from_policy=False)
            if self.room(policy, episode) < 1:
                episode.end("length")


def trim_episodes(episodes: Sequence[Episode]) -> Sequence[Episode]:
    """Without the environment's ids behind the last turn, which nothing is learned from."""
    for episode in episodes:
        while episode.is_policy_token and not episode.is_policy_token[-1]:
            for listed in (episode.ids, episode.logprobs, episode.is_policy_token):
                listed.pop()
    return episodes
