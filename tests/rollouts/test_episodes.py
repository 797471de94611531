"""Episodes of several turns: the environment's text is read and never learned, and the policy that samples is the
policy that is scored with that text in the middle."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.policy_batch import IGNORE_INDEX, PolicyRow, collate_policy_rows, row_from_json, row_to_json
from llm_quest.data.problems import Problem
from llm_quest.data.vocabulary import character_tokenizer, train_bpe
from llm_quest.errors import GuardStop, UsageError
from llm_quest.models import FAMILIES
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import POLICY_VARIANTS
from llm_quest.rollouts.advantages import RewardPipeline, WeightedReward
from llm_quest.rollouts.environments import (
    EnvironmentClient,
    EnvironmentHost,
    EpisodeFailure,
    Step,
    start_user_environment,
)
from llm_quest.rollouts.episodes import EpisodeSampler, TurnEncoder
from llm_quest.rollouts.gae import GAE
from llm_quest.rollouts.included_environments import Calculator, FileSearch, GuessingGame, rank_paragraphs
from llm_quest.rollouts.rewards import EnvironmentReward, RandomReward
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan
from llm_quest.rollouts.sampler import PolicyPrompt, Sampler, make_policy_row
from llm_quest.rollouts.verifiers import verify_answer

TINY = [one.name for page in FAMILIES for one in page.presets if one.name.endswith("-tiny")]
TOKENIZER = character_tokenizer("abcdefghij?: ")


class Echo:
    """Answers each turn with letters that depend on it; ends after three."""

    turns = 0

    def reset(self, row: dict[str, Any]) -> str:
        return row["prompt"]

    def step(self, completion: str) -> tuple[Any, float, bool]:
        self.turns += 1
        return f"{'abcdefg'[: 1 + len(completion) % 4]}:", 0.5 * (len(completion) % 3), self.turns == 3


def prompt(index: int) -> PolicyPrompt:
    """Ragged prompts."""
    text = "abcdefghij"[index % 5 : 4 + index % 7] + "?"
    message = {"role": "user", "content": text}
    problem = Problem(text, "", "equal", text, messages=(message,), columns={"prompt": text})
    return PolicyPrompt((TOKENIZER.start_token_id, *TOKENIZER.encode(text, add_special_tokens=False)), problem)


def policy(name: str = "llama3.2-tiny") -> Decoder:
    """A policy that ends a turn now and then."""
    model = build(name, seed=1)
    model.head.weight.data *= 3
    return model


class Spoken:
    """A tokenizer of any id: what a random policy of a larger vocabulary writes is decodable."""

    def decode_continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def episodes(make: Any = Echo, *, ends: Sequence[int] = range(20, 120), **options: Any) -> EpisodeSampler:
    """Many ids end a turn, so that random weights play several."""
    own = {name: options.pop(name) for name in ("max_new_tokens", "batch_size") if name in options}
    sampler = Sampler(**{"tokenizer": Spoken(), "eos_token_ids": tuple(ends), "max_new_tokens": 8} | own)
    client = EnvironmentClient("echo", EnvironmentHost(make).answer, log=options.pop("log", lambda line: None))
    return EpisodeSampler(
        sampler=sampler, environments=client, encode_turns=TurnEncoder(TOKENIZER, None), **{"max_turns": 3} | options
    )


def rollouts(model: Decoder, **options: Any) -> RolloutLoader:
    sampler = options.pop("sampler", None) or episodes()
    rewards = (WeightedReward("environment", EnvironmentReward()), WeightedReward("random", RandomReward()))
    plan = {"prompts_per_rollout": 4, "num_generations": 4, "max_micro_batch_tokens": 200, "seed": 3}
    scorers = options.pop("scorers", {})
    return RolloutLoader(
        model, prompt, sampler, RewardPipeline(rewards=rewards), RolloutPlan(**plan | options), scorers=scorers,
        read_all=True,
    )  # fmt: skip


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_the_ratio_is_one_with_the_environments_text_in_the_middle(name: str, share_prompts: bool):
    model = policy(name)
    batches = rollouts(model, share_prompts=share_prompts).batches(0)
    with torch.no_grad():
        gaps = [(token_log_probs(model, one) - one.sampler_log_probs)[one.loss_mask] for one in batches]
    assert torch.cat(gaps).abs().max() < 1e-5
    between = [inner_gaps(row) for one in batches for row in one.targets]
    assert sum(between) > 5, "the environment's text is in the middle of rows"


def inner_gaps(targets: torch.Tensor) -> int:
    """How many runs of tokens that are not learned stand between learned ones."""
    at = (targets != IGNORE_INDEX).nonzero()[:, 0]
    return int((at.diff() > 1).sum())


@pytest.mark.parametrize("variant", POLICY_VARIANTS)
def test_every_variant_learns_from_episodes_at_ratio_one(variant: str):
    model = policy()
    chosen = POLICY_VARIANTS[variant]
    horizon = 24 if chosen.count == "horizon" else None
    objective = PolicyGradientLoss(model, chosen.surrogate, count=chosen.count, horizon=horizon)
    for batch in rollouts(model).batches(0):
        objective(batch).total.backward()
    assert objective.ratio_range.log().abs().max() < 1e-5
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


def test_the_environments_tokens_get_no_gradient_and_count_in_no_divisor():
    """By hand: of six ids the policy wrote four; the loss of the row with the others masked is that of the four."""
    model = policy()
    sampler = episodes()
    sample = next(s for group in sampler(model, [prompt(0)], 8, seed=5) for s in group if not all(s.is_policy_token))
    row = make_policy_row(sample, torch.ones(len(sample.completion_ids)).numpy())
    batch = collate_policy_rows([row])
    learned = [t for t, own in zip(sample.completion_ids, sample.is_policy_token, strict=True) if own]
    assert batch.targets[batch.loss_mask].tolist() == learned
    assert [p for p, own in zip(sample.logprobs, sample.is_policy_token, strict=True) if not own] == [0.0] * (
        len(sample.completion_ids) - len(learned)
    )
    loss = PolicyGradientLoss(model, count="tokens")(batch)
    assert float(loss.count) == len(learned) == row.num_policy_tokens < len(sample.completion_ids)


def test_a_reference_is_scored_at_the_policys_tokens_alone_and_a_row_survives_its_checkpoint():
    model, reference = policy(), policy()
    feed = rollouts(model, scorers={"reference_log_probs": lambda batch: token_log_probs(reference, batch)})
    feed.batches(0)
    for row in feed.rollout.rows:
        assert row.reference_log_probs.shape == row.sampler_log_probs.shape == (len(row.completion_ids),)
        assert abs(row.reference_log_probs - row.sampler_log_probs).max() < 1e-5
        again = row_from_json(json.loads(json.dumps(row_to_json(row))))
        assert again.is_policy_token.tolist() == row.is_policy_token.tolist()
        assert again.num_policy_tokens == row.num_policy_tokens


def test_gae_passes_over_the_environments_tokens():
    """A row of policy tokens with others in between has the advantages and returns of the row without these."""
    own = np.array([True, False, False, True, True])
    advantages, sampled = np.full(5, 2.0, np.float32), np.array([-1, 0, 0, -2, -3], np.float32)
    row = PolicyRow((1,), (5, 6, 7, 8, 9), advantages, sampled, is_policy_token=own)
    plain = PolicyRow((1,), (5, 8, 9), advantages[own], sampled[own])
    values, penalties = np.array([0.5, 9, 9, 0.2, 0.4]), np.array([0.1, 9, 9, 0.2, 0.3])
    gae = GAE(lam=0.5)
    found = gae.rows_with_values([row], [values], [penalties])[0]
    wanted = gae.rows_with_values([plain], [values[own]], [penalties[own]])[0]
    for name in ("advantages", "returns", "values"):
        assert getattr(found, name)[own].tolist() == getattr(wanted, name).tolist()
        assert not getattr(found, name)[~own].any()


def test_episodes_are_the_same_alone_and_among_others():
    model = policy()

    def sample_episodes(numbers: Sequence[int], at_once: int) -> list[Any]:
        sampler = episodes(batch_size=at_once)
        return [[s.completion_ids for s in group] for group in sampler(model, [prompt(n) for n in numbers], 4, seed=3)]

    together = sample_episodes(range(4), 0)
    assert sample_episodes(range(4), 3) == together
    assert [sample_episodes([n], 0)[0] for n in range(4)] == together


@pytest.mark.parametrize(("options", "most"), [({"max_episode_tokens": 6}, 6), ({"max_turns": 1}, 8)])
def test_budgets_end_an_episode(options: dict[str, int], most: int):
    sampler = episodes(**options)
    found = [s for group in sampler(policy(), [prompt(n) for n in range(4)], 4, seed=1) for s in group]
    assert all(len(s.completion_ids) <= most and s.is_policy_token[-1] for s in found)
    assert {s.finish_reason for s in found} == {"length"}
    assert all(s.num_turns == 1 for s in found if "max_turns" in options)


def test_a_turn_that_its_budget_cuts_ends_the_episode_without_an_answer():
    sampler = episodes(ends=(), max_new_tokens=3)
    found = [s for group in sampler(policy(), [prompt(0)], 4, seed=1) for s in group]
    assert all(s.truncated and len(s.completion_ids) == 3 and s.episode_reward == 0 for s in found)


class Broken(Echo):
    def step(self, completion: str) -> Any:
        raise ValueError("no such tool")


class Wild(Echo):
    def reset(self, row: dict[str, Any]) -> str:
        Wild.number = getattr(Wild, "number", 0) + 1
        return f"{row['prompt']}{Wild.number}"


@pytest.mark.parametrize(("make", "said"), [(Broken, "no such tool"), (Wild, "other messages for the same row")])
def test_an_episode_whose_environment_fails_is_not_scored_and_told_once(make: Any, said: str):
    lines: list[str] = []
    sampler = episodes(make, log=lines.append)
    groups = sampler(policy(), [prompt(0)], 4, seed=1)
    assert all(math.isnan(s.episode_reward) and s.environment_failed for s in groups[0] if not s.truncated)
    pipeline = RewardPipeline(rewards=(WeightedReward("random", RandomReward()),))
    scores = pipeline.compute_rewards(groups)[0, 0]
    assert [bool(one.isnan()) for one in scores] == [s.environment_failed for s in groups[0]]
    assert len(lines) == 1
    assert said in lines[0]


USERS = """
import os
import time

class Env:
    def __init__(self, bonus=1.0):
        self.bonus = bonus

    def reset(self, row):
        if row["prompt"] == "bad":
            raise KeyError("bad row")
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, completion):
        if completion == "hang":
            time.sleep(1000)
        if completion == "die":
            os._exit(1)
        if completion == "nan":
            return "", float("nan"), True
        if completion == "odd":
            return [{"role": "user"}], 0, False
        return [], self.bonus, True
"""


def test_a_users_environment_lives_in_a_process_that_can_be_killed(tmp_path: Path):
    (tmp_path / "my_env.py").write_text(USERS)
    lines: list[str] = []
    reference = f"{tmp_path}/my_env.py:Env"
    client = start_user_environment(reference, {"bonus": 2.0}, timeout_seconds=1.0, log=lines.append)
    first = client.reset([{"prompt": "a"}, {"prompt": "bad"}])
    assert first[0] == [{"role": "user", "content": "a"}]
    assert isinstance(first[1], EpisodeFailure)
    assert "KeyError: 'bad row'" in first[1].message
    assert client.step({0: "x"}) == {0: Step([], 2.0, True)}
    client.reset([{"prompt": "a"}] * 3)
    answers = client.step({0: "nan", 1: "odd", 2: "x"})
    assert [type(answers[n]) for n in range(3)] == [EpisodeFailure, EpisodeFailure, Step]
    for word, kind in (("hang", "hang"), ("die", "crash")):
        client.reset([{"prompt": "a"}, {"prompt": "b"}])
        assert all(isinstance(one, EpisodeFailure) for one in client.step({0: word, 1: "x"}).values())
        assert client.failures.counts[kind] == 1
    assert isinstance(client.reset([{"prompt": "a"}])[0], list), "the next batch has a new process"
    assert len(client.failure_lines()) == 1


def test_an_environment_that_fails_in_every_episode_ends_the_run():
    client = EnvironmentClient("broken", EnvironmentHost(Broken).answer, log=lambda line: None)
    with pytest.raises(GuardStop, match=r"batches in a row: .*no such tool"):
        play_broken(client)


def play_broken(client: EnvironmentClient) -> None:
    client.reset([{"prompt": "a"}])
    for _ in range(5):
        client.step({0: "x"})


# ------------------------------------------------------------------------------------------ turns through a template


@pytest.mark.parametrize("ended", [True, False])
def test_the_turns_of_an_episode_are_those_that_the_template_writes(ended: bool):
    """ChatML: prompt, reply and the next turn, put together from pieces, are the ids of the whole conversation."""
    tokenizer = train_bpe(["a cab is bad, user, assistant, tool"], 300)
    chat = ChatTemplate(tokenizer)
    encode = TurnEncoder(tokenizer, chat)
    asked = [{"role": "user", "content": "a?"}]
    answered = [{"role": "tool", "content": "bad"}]
    reply = tokenizer.encode("cab", add_special_tokens=False)
    end = [tokenizer.backend_tokenizer.token_to_id("<|im_end|>")] if ended else []
    pieces = [*chat.encode_prompt(asked), *reply, *end]
    pieces += encode([answered], [pieces[-1]])[0]
    whole = chat.encode_prompt([*asked, {"role": "assistant", "content": "cab"}, *answered])
    assert pieces == whole


# ------------------------------------------------------------------------------------------ the included ones

NESTED = "<tool_call>{" + "[" * 5000 + "}</tool_call>"


def test_the_calculator_computes_and_pays_for_the_answer():
    row = {"prompt": "12*7?", "answer": "84"}
    for call in ("I need <calc>12*7</calc>", '<tool_call>{"name": "calc", "arguments": {"e": "12*7"}}</tool_call>'):
        env = Calculator()
        assert "<calc>" in env.reset(row)[0]["content"]
        assert env.step(call) == ([{"role": "tool", "content": "84"}], 0.0, False)
        assert env.step("<answer>84</answer>") == ([], 1.0, True)
    env = Calculator(hint=False)
    assert env.reset(row) == [{"role": "user", "content": "12*7?"}]
    assert env.step("84") == ([], 1.0, True)
    assert env.step("85") == ([], 0.0, True)
    assert env.step("<calc>1/3</calc>")[0][0]["content"] == "0.3333333333"


@pytest.mark.parametrize(
    "asked", ["<calc>__import__('os')</calc>", "<calc>9**9**9</calc>", "<calc>1/0</calc>", "<tool_call>{}</tool_call>",
              '<tool_call>{"name": "rm", "arguments": {"x": 1}}</tool_call>', NESTED],
)  # fmt: skip
def test_a_call_that_is_no_sum_is_an_error_that_the_model_reads(asked: str):
    env = Calculator()
    env.reset({"prompt": "?", "answer": "1"})
    messages, reward, done = env.step(asked)
    assert messages[0]["content"].startswith("error: ")
    assert (reward, done) == (0.0, False)


def test_the_guessing_game_says_higher_and_lower():
    env = GuessingGame(low=1, high=9)
    env.reset({"secret": 4})
    assert [env.step(text)[0][0]["content"] for text in ("2", "8", "what?")] == ["higher", "lower", "Say one number."]
    assert env.step("so 4") == ([], 1.0, True)
    secrets = []
    for index in range(50):
        env.reset({"index": index})
        secrets.append(env.secret)
    assert set(secrets) == set(range(1, 10))
    with pytest.raises(UsageError, match="low must be the smaller"):
        GuessingGame(low=3, high=3)


def test_file_search_finds_the_paragraph(tmp_path: Path):
    (tmp_path / "a.txt").write_text("The cat sleeps all day.\n\nThe capital of France is Paris.\n")
    (tmp_path / "b.md").write_text("A cat and a cat and a dog.\n")
    env = FileSearch(str(tmp_path), num_results=1)
    env.reset({"prompt": "What is the capital of France?", "answer": "Paris"})
    assert env.step("<search>capital France</search>")[0][0]["content"] == "The capital of France is Paris."
    assert env.step("<search>quarks</search>")[0][0]["content"] == "nothing found"
    assert env.step("<answer>paris</answer>") == ([], 1.0, True)
    with pytest.raises(UsageError, match=r"holds no .txt or .md"):
        FileSearch(str(tmp_path / "empty"))


def test_bm25_by_hand():
    """Two texts of three words: `cat` in one (idf ln 2), `the` in both (idf ln 1.2): length is the mean, so each term
    is idf 2.5 f / (f + 1.5)."""
    texts = ("the cat cat", "the old dog")
    assert rank_paragraphs(texts, "cat") == ["the cat cat"]
    assert rank_paragraphs(texts, "the") == ["the cat cat", "the old dog"]
    assert verify_answer(Problem("", "a", "equal", ""), "a") == 1.0
