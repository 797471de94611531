"""Rollouts: the policy that samples is the policy that is scored, to 1e-5, on every page; and what is learned from."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_quest.contracts import DataShard
from llm_quest.data.policy_batch import IGNORE_INDEX, PolicyBatch
from llm_quest.errors import DataError, UsageError
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.kl_penalty import KLPenalty
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import POLICY_VARIANTS
from llm_quest.rollouts.advantages import ADVANTAGE_ESTIMATORS, RewardPipeline, WeightedReward, overlong_penalty
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan
from llm_quest.rollouts.sampler import PolicyPrompt, Sample, Sampler

TINY = [one.name for page in FAMILIES for one in page.presets if one.name.endswith("-tiny")]
NAN = float("nan")


class Words:
    """Ids as text."""

    def decode_continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def ask(index: int) -> PolicyPrompt:
    """Ragged prompts: 3, 7, 4, 1, ... tokens."""
    length = (3, 7, 4, 1)[index % 4]
    return PolicyPrompt(tuple((13 * index + 5 * place) % 90 + 1 for place in range(length)), index)


def even_reward(group: Sequence[Sample]) -> list[float]:
    """1 for an even first token."""
    return [float(sample.completion_ids[0] % 2 == 0) for sample in group]


def rollouts(
    policy: Decoder, *, reward: Callable = even_reward, new_tokens: int = 8, temperature=1.0, **options
) -> RolloutLoader:
    scoring = options.pop("scoring", None) or RewardPipeline(rewards=(WeightedReward("even", reward),))
    others = {name: options.pop(name) for name in ("scorers", "ask", "processes", "read_all") if name in options}
    at_once = options.pop("at_once", 0)
    writer = Sampler(
        tokenizer=Words(), eos_token_ids=(7, 9), max_new_tokens=new_tokens, temperature=temperature, batch_size=at_once
    )
    plan = RolloutPlan(**{"prompts_per_rollout": 4, "num_generations": 4, "seed": 3} | options)
    return RolloutLoader(policy, others.pop("ask", ask), writer, scoring, plan, **others)


def log_ratios(policy: Decoder, batches: Sequence, temperature: float) -> Tensor:
    with torch.no_grad():
        gaps = [token_log_probs(policy, batch, temperature) - batch.sampler_log_probs for batch in batches]
    return torch.cat([gap[batch.loss_mask] for gap, batch in zip(gaps, batches, strict=True)])


@pytest.mark.parametrize(
    ("name", "temperature"),
    [
        *((name, 0.6) for name in TINY),
        *((name, t) for name in ("llama3.2-tiny", "qwen3-next-tiny") for t in (1.0, 1.3)),
    ],
)
def test_the_ratio_is_one_before_the_first_update(name: str, temperature: float):
    """Ragged prompts, one prefill per group, rows that leave, a cache against a whole pass (P1 to P6, P8). Logits are
    divided by the temperature behind the model, so no family can see it: each is asked at one, two at others too."""
    policy = build(name, seed=1)
    policy.head.weight.data *= 3
    feed = rollouts(policy, temperature=temperature, max_micro_batch_tokens=60, read_all=True)
    batches = feed.batches(0)
    assert len(batches) > 1
    gaps = log_ratios(policy, batches, temperature)
    assert len(gaps) > 50
    assert gaps.abs().max() < 1e-5
    assert min(float(batch.sampler_log_probs.min()) for batch in batches) < -1


def test_the_ratio_is_one_with_dropout_configured_and_every_mode_is_restored():
    policy = build(dataclasses.replace(preset("gpt2-tiny").config, dropout=0.3), seed=1).train()
    policy.blocks[0].eval()
    modes = [module.training for module in policy.modules()]
    feed = rollouts(policy)
    batches = feed.batches(0)
    assert [module.training for module in policy.modules()] == modes
    objective = PolicyGradientLoss(policy)
    for batch in batches:
        objective(batch)
    assert objective.ratio_range.log().abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_the_objective_scores_at_the_temperature_that_was_sampled_at(temperature: float):
    policy = build("llama3.2-tiny", seed=1)
    policy.head.weight.data *= 3
    objective = PolicyGradientLoss(policy, temperature=temperature)
    for batch in rollouts(policy, temperature=temperature).batches(0):
        objective(batch)
    assert objective.ratio_range.log().abs().max() < 1e-5


def test_temperature_counts():
    """Scored at 1, what was sampled at 0.6 has another ratio: the test above can fail."""
    policy = build("llama3.2-tiny", seed=1)
    policy.head.weight.data *= 3
    assert log_ratios(policy, rollouts(policy, temperature=0.6).batches(0), 1.0).abs().max() > 0.1


def test_what_is_trained_on_is_what_was_sampled():
    """Token for token: the prompt, the completion with the eos that ended it, and nothing where a prompt stands."""
    feed = rollouts(build("llama3.2-tiny", seed=1), new_tokens=30)
    batches = feed.batches(0)
    seen = [sample for group in feed.rollout.groups for sample in group]
    learned = {}
    for batch in batches:
        for tokens, targets, sampled in zip(batch.input_ids, batch.targets, batch.sampler_log_probs, strict=True):
            at = (targets != IGNORE_INDEX).nonzero()[:, 0]
            prompt = tuple(tokens[: at[0] + 1].tolist())
            learned[prompt, tuple(targets[at].tolist())] = tuple(sampled[at].tolist())
            assert tokens[at[1:]].tolist() == targets[at[:-1]].tolist()
    for sample in seen:
        found = learned.get((sample.prompt_ids, sample.completion_ids))
        assert found is None or found == sample.logprobs
        assert (sample.completion_ids[-1] in (7, 9)) == (sample.finish_reason == "eos")
        assert not {"7", "9"} & set(sample.text.split())
    assert len(learned) > 8
    assert {sample.finish_reason for sample in seen} == {"eos", "length"}


def test_prompts_that_hold_an_eos_are_read_whole():
    policy = build("llama3.2-tiny", seed=1)
    feed = rollouts(policy, ask=lambda index: PolicyPrompt((7, 5, 9, 4 + index)))
    assert log_ratios(policy, feed.batches(0), 1.0).abs().max() < 1e-5


def test_old_log_probs_are_stored_once_and_the_second_update_has_a_ratio():
    policy = build("llama3.2-tiny", seed=1)
    feed = rollouts(policy, num_iterations=2)
    first = feed.batches(0)
    assert log_ratios(policy, first, 1.0).abs().max() < 1e-5
    with torch.no_grad():
        policy.head.weight.add_(
            0.01 * torch.randn(policy.head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    second = feed.batches(1)
    torch.testing.assert_close(
        [b.sampler_log_probs for b in first], [b.sampler_log_probs for b in second], rtol=0, atol=0
    )
    assert log_ratios(policy, second, 1.0).abs().max() > 1e-3
    assert log_ratios(policy, feed.batches(2), 1.0).abs().max() < 1e-5


def test_minibatches_part_the_rows_and_every_pass_deals_anew():
    feed = rollouts(build("llama3.2-tiny", seed=1), prompts_per_rollout=6, num_iterations=2, minibatches=3)

    def minibatch_rows(step: int) -> list[tuple[int, ...]]:
        feed.batches(step)
        return [row.prompt_ids + row.completion_ids for row in feed.minibatch(step % 6)]

    passes = [[minibatch_rows(step) for step in (0, 1, 2)], [minibatch_rows(step) for step in (3, 4, 5)]]
    everything = sorted(row.prompt_ids + row.completion_ids for row in feed.rollout.rows)
    for one in passes:
        assert sorted(row for part in one for row in part) == everything
        assert max(map(len, one)) - min(map(len, one)) <= 1
    assert passes[0] != passes[1]


def test_a_rollout_is_a_function_of_seed_step_and_weights():
    def rows(seed: int, step: int) -> list:
        feed = rollouts(build("llama3.2-tiny", seed=1), seed=seed)
        feed.num_prompts_taken = 4 * step
        feed.batches(step)
        return [row.completion_ids for row in feed.rollout.rows]

    assert rows(3, 0) == rows(3, 0)
    assert rows(3, 0) != rows(4, 0)
    assert rows(3, 0) != rows(3, 1)


def test_the_bookmark_goes_on_in_the_middle_of_a_rollout():
    import json

    policy = build("llama3.2-tiny", seed=1)
    reference = build("llama3.2-tiny", seed=2)

    def make_loader() -> RolloutLoader:
        return rollouts(
            policy,
            num_iterations=2,
            minibatches=2,
            scorers={"reference_log_probs": lambda batch: token_log_probs(reference, batch)},
        )

    straight = make_loader()
    steps = [straight.batches(step) for step in range(6)]
    for stop in (0, 1, 3):
        before = make_loader()
        for step in range(stop + 1):
            before.batches(step)
        after = make_loader()
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        for step in range(stop + 1, 6):
            for got, wanted in zip(after.batches(step), steps[step], strict=True):
                for name in ("input_ids", "targets", "advantages", "sampler_log_probs", "reference_log_probs"):
                    assert torch.equal(getattr(got, name), getattr(wanted, name))
    with pytest.raises(ValueError, match="num_iterations"):
        rollouts(policy, num_iterations=3).load_state_dict(straight.state_dict())


# ------------------------------------------------------------------------------------------ what is learned from


def rewards_by_question(table: dict[int, list[float]]) -> Callable:
    return lambda group: table[group[0].problem]


def advantages_by_question(feed: RolloutLoader) -> dict[int, list[float]]:
    """Question -> advantages of the samples that are learned from."""
    questions = {ask(index).prompt_ids: index for index in range(100)}
    feed.batches(0)
    found: dict[int, list[float]] = {}
    for row in feed.rows_to_read(feed.rollout.rows):
        found.setdefault(questions[row.prompt_ids], []).append(float(row.advantages[0]))
    return found


MIXED, WRONG, RIGHT = [1.0, 0, 0, 0], [0.0] * 4, [1.0] * 4


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("given_up", [0, 1, 2, 3])
def test_a_step_that_is_given_up_leaves_no_trace(passes: int, given_up: int, monkeypatch):
    """In the middle of sampling as in the passes after it: the state to save is that of the steps before."""
    policy = build("llama3.2-tiny", seed=1)
    straight, broken = (rollouts(policy, num_iterations=passes) for _ in range(2))
    for step in range(given_up):
        assert straight.batches(step)
        assert broken.batches(step)
    before = broken.state_dict()
    with monkeypatch.context() as patched:
        patched.setattr(broken, "score_rows", None)
        with contextlib.suppress(TypeError):
            broken.batches(given_up)
        broken.rewind()
    assert broken.state_dict() == before
    broken.batches(given_up)
    broken.rewind()
    assert broken.state_dict() == before
    for one, other in zip(straight.batches(given_up), broken.batches(given_up), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_groups_without_spread_are_not_read_and_count_in_the_divisor():
    """Two of four groups are mixed: 8 of 16 samples are read, and the loss is divided by all 16 (DeepSeekMath, eq. 3);
    dropped (keep_flat off), it would be divided by 8."""
    policy, table = build("llama3.2-tiny", seed=1), {0: MIXED, 1: WRONG, 2: RIGHT, 3: MIXED}
    feed = rollouts(policy, reward=rewards_by_question(table))
    assert set(advantages_by_question(feed)) == {0, 3}
    notes = feed.batches(0)[0].metric_sums
    assert notes["frac_reward_zero_std"] == (2, 4)
    assert notes["reward"] == (6, 16)
    assert notes["rows_trained"] == (8, 16)
    everything = rollouts(policy, reward=rewards_by_question(table), read_all=True)
    assert set(advantages_by_question(everything)) == {0, 1, 2, 3}
    dropped = rollouts(
        policy,
        scoring=RewardPipeline(rewards=(WeightedReward("r", rewards_by_question(table)),), keep_uniform_groups=False),
    )
    losses = [loss_sum_and_count(policy, some, count="sequences") for some in (feed, everything, dropped)]
    assert [count for _, count in losses] == [16, 16, 8]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6)
    tokens = sum(len(row.completion_ids) for row in everything.rollout.rows)
    assert [loss_sum_and_count(policy, some, count="tokens")[1] for some in (feed, everything)] == [tokens, tokens]
    assert loss_sum_and_count(policy, feed, count="horizon", horizon=8)[1] == 16 * 8, "Dr. GRPO's divisor is a constant"


def loss_sum_and_count(policy: Decoder, feed: RolloutLoader, **options: Any) -> tuple[float, float]:
    """The loss of the first step: its sum, and what that is divided by."""
    losses = [PolicyGradientLoss(policy, **options)(batch) for batch in feed.batches(0)]
    return sum(float(loss.total.detach()) for loss in losses), sum(float(loss.count) for loss in losses)


def test_a_term_that_acts_on_all_samples_has_them_all_read():
    """A KL term in the loss reads flat groups too; an entropy bonus with samples left out is refused."""
    policy, table = build("llama3.2-tiny", seed=1), {0: MIXED, 1: WRONG, 2: RIGHT, 3: MIXED}
    reference = partial(token_log_probs, build("llama3.2-tiny", seed=2))
    feed = rollouts(policy, reward=rewards_by_question(table), scorers={"reference_log_probs": reference})
    assert set(advantages_by_question(feed)) == {0, 1, 2, 3}
    assert loss_sum_and_count(policy, feed, kl=KLPenalty(0.1))[1] == 16
    with pytest.raises(UsageError, match="read_all=True"):
        loss_sum_and_count(policy, rollouts(policy, reward=rewards_by_question(table)), entropy_coef=0.1)


def test_a_step_without_any_advantage_has_nothing_to_learn():
    policy = build("llama3.2-tiny", seed=1)
    feed = rollouts(policy, reward=rewards_by_question(dict.fromkeys(range(4), WRONG)))
    assert loss_sum_and_count(policy, feed) == (0, 0)


def test_of_several_processes_one_counts_the_samples_that_nobody_reads():
    table = {i: MIXED if i % 2 else WRONG for i in range(4)}

    def make_loader(**more: Any) -> RolloutLoader:
        return rollouts(
            build("llama3.2-tiny", seed=1), reward=rewards_by_question(table), max_micro_batch_tokens=40, **more
        )

    counts = [batch.zero_rows for _, steps in run_processes(2, make_loader, 1) for batch in steps[0]]
    assert sum(counts) == 8
    assert counts[0] == 8


@dataclasses.dataclass
class Thread:
    """One of several processes, as a thread: they put down what they have, and read what lies there."""

    data_shard: DataShard
    desk: list[Any]
    barrier: threading.Barrier

    def all_gather(self, thing: Any) -> list[Any]:
        self.desk[self.data_shard.rank] = thing
        self.barrier.wait()
        told = list(self.desk)
        self.barrier.wait()
        return told


def run_processes(
    world: int, made: Callable[..., RolloutLoader], steps: int
) -> list[tuple[RolloutLoader, list[list[PolicyBatch]]]]:
    """So many processes as threads, each with rollouts and a policy of its own; their batches of so many steps."""
    desk: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=60)

    def work(rank: int) -> tuple[RolloutLoader, list[list[PolicyBatch]]]:
        feed = made(processes=Thread(DataShard(rank, world), desk, barrier))
        return feed, [feed.batches(step) for step in range(steps)]

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


def test_several_processes_share_one_rollout():
    """Two know the rows that one has which samples half at a time; each learns from its part, and together from all."""
    table = {i: MIXED if i % 3 else WRONG for i in range(40)}

    def make_loader(at_once: int = 0, **more: Any) -> RolloutLoader:
        policy = build("llama3.2-tiny", seed=1)
        options = {
            "scorers": {"reference_log_probs": partial(token_log_probs, build("llama3.2-tiny", seed=2))},
            "minibatches": 2,
            "max_sampling_rounds": 3,
        }
        return rollouts(
            policy, reward=rewards_by_question(table), at_once=at_once, max_micro_batch_tokens=40, **options, **more
        )  # fmt: skip

    one = make_loader(at_once=8)
    alone = [one.batches(step) for step in range(2)]
    both = run_processes(2, make_loader, 2)
    for feed, _ in both:
        assert feed.num_prompts_taken == one.num_prompts_taken
        for mine, theirs in zip(feed.rollout.rows, one.rollout.rows, strict=True):
            assert (mine.prompt_ids, mine.completion_ids) == (theirs.prompt_ids, theirs.completion_ids)
            np.testing.assert_allclose(mine.reference_log_probs, theirs.reference_log_probs, atol=1e-5)
            np.testing.assert_array_equal(mine.advantages, theirs.advantages)
    for step in range(2):
        parts = [batches[step] for _, batches in both]
        assert len(parts[0]) == len(parts[1]), "DDP waits for as many backward passes from everybody"
        assert sum(b.num_tokens for part in parts for b in part) == sum(b.num_tokens for b in alone[step])
        losses = [
            [PolicyGradientLoss(one.policy, kl=KLPenalty(0.1))(b) for b in part] for part in (*parts, alone[step])
        ]
        sums = [sum(float(loss.total.detach()) for loss in part) for part in losses]
        assert sums[0] + sums[1] == pytest.approx(sums[2], abs=1e-5)
        assert len({frozenset(loss.metrics) for part in losses[:2] for loss in part[:1]}) == 1
        told = [part[0].metrics["reward"] for part in losses]
        assert [float(a + b) for a, b in zip(told[0], told[1], strict=True)] == [float(a) for a in told[2]]


@pytest.mark.parametrize(("batch_size", "world"), [(0, 1), (4, 1), (0, 2), (8, 3)])
def test_a_text_is_the_same_however_the_prompts_are_shared_and_equal_prompts_have_texts_of_their_own(
    batch_size: int, world: int
):
    policy = build("llama3.2-tiny", seed=1)
    prompts = [PolicyPrompt((5, 6, 7)), PolicyPrompt((8, 9)), PolicyPrompt((5, 6, 7)), PolicyPrompt((5, 6, 7))]
    options = {"tokenizer": Words(), "eos_token_ids": (7,), "max_new_tokens": 6}
    whole = Sampler(**options)(policy, prompts, 2, seed=3)
    assert len({sample.completion_ids for group in (whole[0], whole[2], whole[3]) for sample in group}) == 6
    sampler = Sampler(**options, batch_size=batch_size)
    parts = [sampler(policy, prompts, 2, 3, DataShard(rank, world)) for rank in range(world)]
    assert [[one.completion_ids for one in group] for part in parts for group in part] == [
        [one.completion_ids for one in group] for group in whole
    ]


def test_who_comes_away_empty_waits_with_a_row_that_is_as_complete():
    """One group of four rows in one micro-batch, and two processes."""
    reward = rewards_by_question({0: MIXED, 1: WRONG, 2: WRONG, 3: WRONG})
    reference = partial(token_log_probs, build("llama3.2-tiny", seed=2))

    def make_loader(**more: Any) -> RolloutLoader:
        return rollouts(
            build("llama3.2-tiny", seed=1),
            reward=reward,
            scorers={"reference_log_probs": reference},
            max_micro_batch_tokens=999,
            **more,
        )

    (_, [[full]]), (feed, [[empty]]) = run_processes(2, make_loader, 1)
    assert full.loss_mask.any()
    assert not empty.loss_mask.any()
    loss = PolicyGradientLoss(feed.policy, kl=KLPenalty(0.1))(empty)
    assert {"kl", "reward"} <= set(loss.metrics)
    assert float(loss.metrics["reward"][1]) == 0
    with pytest.raises(UsageError, match="4 prompts cannot be shared by 3 processes"):
        make_loader(processes=Thread(DataShard(0, 3), [], threading.Barrier(3)))


def test_all_groups_without_spread_leave_a_step_with_notes_and_nothing_to_learn():
    feed = rollouts(build("llama3.2-tiny", seed=1), reward=lambda group: WRONG)
    (batch,) = feed.batches(0)
    assert not batch.loss_mask.any()
    assert batch.metric_sums["frac_reward_zero_std"] == (4, 4)
    assert float(PolicyGradientLoss(feed.policy)(batch).count) == 0


def test_dynamic_sampling_draws_until_enough_groups_are_mixed():
    table = {i: MIXED if i in (1, 6, 9, 10, 11) else WRONG for i in range(12)}
    feed = rollouts(build("llama3.2-tiny", seed=1), reward=rewards_by_question(table), max_sampling_rounds=5)
    assert set(advantages_by_question(feed)) == {1, 6, 9, 10}
    assert feed.rollout.metric_sums["sampling_rounds"] == (3, 1)
    assert feed.rollout.metric_sums["frac_reward_zero_std"] == (7, 12)
    assert feed.num_prompts_taken == 12
    few = rollouts(build("llama3.2-tiny", seed=1), reward=rewards_by_question(table), max_sampling_rounds=2)
    assert set(advantages_by_question(few)) == {1, 6}


def test_dynamic_sampling_judges_raw_correctness_and_not_what_shapes_it():
    """All wrong, but of different lengths and formats: filtered (P23)."""
    shaped = RewardPipeline(
        rewards=(WeightedReward("right", lambda group: WRONG), WeightedReward("format", even_reward, 0.1)),
        max_new_tokens=8,
        overlong_window=6,
    )
    feed = rollouts(build("llama3.2-tiny", seed=1), scoring=shaped, max_sampling_rounds=2)
    feed.batches(0)
    assert feed.rollout.rows == []
    assert feed.rollout.metric_sums["frac_reward_zero_std"] == (8, 8)


def test_the_unscorable_is_not_learned_from_and_counted():
    table = {0: [1.0, NAN, 0, 0], 1: [NAN] * 4, 2: [NAN, NAN, NAN, 1.0], 3: WRONG}
    feed = rollouts(build("llama3.2-tiny", seed=1), reward=rewards_by_question(table))
    found = advantages_by_question(feed)
    assert set(found) == {0}
    assert found[0] == pytest.approx([1.154501, -0.577250, -0.577250])
    assert feed.rollout.metric_sums["rewards/unscorable"] == (8, 16)
    assert feed.rollout.metric_sums["reward"] == (2, 8)


@pytest.mark.parametrize(("length", "penalty"), [(15, 0), (16, 0), (17, -0.25), (18, -0.5), (20, -1), (21, -1)])
def test_overlong_punishment(length: int, penalty: float):
    assert overlong_penalty(length, 20, 4) == penalty


def test_what_the_budget_cut_can_be_left_out_of_batch_and_statistics():
    scoring = RewardPipeline(rewards=(WeightedReward("even", even_reward),), filter_truncated=True)
    feed = rollouts(build("llama3.2-tiny", seed=1), scoring=scoring, new_tokens=30, prompts_per_rollout=8)
    feed.batches(0)
    assert feed.rollout.rows
    assert all(row.completion_ids[-1] in (7, 9) for row in feed.rollout.rows)


def test_kl_in_the_reward_moves_the_baseline_too_and_is_told_per_token():
    policy, other = build("llama3.2-tiny", seed=1), build("llama3.2-tiny", seed=2)
    scoring = RewardPipeline(rewards=(WeightedReward("even", even_reward),), estimator=ADVANTAGE_ESTIMATORS["mean"])
    feed = rollouts(
        policy,
        scoring=scoring,
        kl_coef=0.5,
        scorers={"reference_log_probs": lambda batch: token_log_probs(other, batch)},
    )
    (batch,) = feed.batches(0)
    assert batch.reference_log_probs is None
    k3 = []
    for group in feed.rollout.groups:
        rewards = []
        for sample in group:
            with torch.no_grad():
                logits = other(torch.tensor([sample.prompt_ids + sample.completion_ids]))[
                    0, len(sample.prompt_ids) - 1 : -1
                ]
            theirs = logits.log_softmax(-1)[range(len(sample.completion_ids)), list(sample.completion_ids)]
            gaps = theirs - torch.tensor(sample.logprobs)
            rewards.append(float(sample.completion_ids[0] % 2 == 0) + 0.5 * gaps.sum().item())
            k3 += (gaps.exp() - gaps - 1).tolist()
        rows = {
            row.completion_ids: row.advantages[0] for row in feed.rollout.rows if row.prompt_ids == group[0].prompt_ids
        }
        for sample, reward in zip(group, rewards, strict=True):
            assert rows[sample.completion_ids] == pytest.approx(reward - sum(rewards) / 4, abs=1e-4)
    assert batch.metric_sums["kl"] == pytest.approx((sum(k3), len(k3)), rel=1e-4)


def test_process_supervision_gives_every_step_its_own_advantage():
    scoring = RewardPipeline(
        rewards=(WeightedReward("even", even_reward),),
        step_rewards=lambda sample: [(0, float(sample.completion_ids[0] % 2)), (len(sample.completion_ids) - 1, 1.0)],
    )
    feed = rollouts(build("llama3.2-tiny", seed=1), scoring=scoring)
    feed.batches(0)
    several = [row for row in feed.rollout.rows if len(row.completion_ids) > 2]
    assert several
    for row in several:
        assert len(set(row.advantages[1:].tolist())) == 1
    assert any(row.advantages[0] != row.advantages[1] for row in several)


def test_rescored_rows_carry_both_log_probabilities():
    policy = build("llama3.2-tiny", seed=1)
    feed = rollouts(policy, scorers={"old_log_probs": lambda batch: token_log_probs(policy, batch)})
    (batch,) = feed.batches(0)
    torch.testing.assert_close(batch.old_log_probs, batch.sampler_log_probs, atol=1e-5, rtol=0)
    assert not torch.equal(batch.old_log_probs, batch.sampler_log_probs)


# ------------------------------------------------------------------------------------------ mistakes


def test_prompts_that_leave_no_room_are_passed_over_and_at_last_an_error():
    policy = build("llama3.2-tiny", seed=1)
    long = tuple(range(1, 90)) * (policy.config.max_position_embeddings // 80)
    feed = rollouts(policy, ask=lambda index: PolicyPrompt(long if index % 2 else (1, 2, index)))
    feed.batches(0)
    assert feed.num_prompts_taken == 7
    with pytest.raises(DataError, match="no room"):
        rollouts(policy, ask=lambda index: PolicyPrompt(long)).batches(0)


@pytest.mark.parametrize(
    ("reward", "told"), [(lambda group: [1.0], "4 samples"), (lambda group: [float("inf")] * 4, "infinite")]
)
def test_a_reward_that_returns_nonsense_is_named(reward: Callable, told: str):
    with pytest.raises(DataError, match=f"even.*{told}"):
        rollouts(build("llama3.2-tiny", seed=1), reward=reward).batches(0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_generations": 1}, "others of its group"),
        ({"temperature": 0.0}, "above 0"),
        ({"kl_coef": 0.1}, "reference"),
    ],
)
def test_plans_without_sense_are_refused(options: dict, told: str):
    with pytest.raises(UsageError, match=told):
        rollouts(build("llama3.2-tiny", seed=1), **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rewards": ()}, "no reward"),
        ({"overlong_window": 9, "max_new_tokens": 8}, "fewer tokens"),
        ({"per_reward_advantages": True}, "no effect"),
        ({"step_rewards": lambda sample: [], "overlong_window": 2, "max_new_tokens": 8}, "no effect"),
    ],
)
def test_scoring_without_sense_is_refused(options: dict, told: str):
    with pytest.raises(UsageError, match=told):
        RewardPipeline(**{"rewards": (WeightedReward("even", even_reward),)} | options)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_a_step_on_a_rollout_moves_the_policy_even_at_a_tiny_rate(name: str):
    policy = build("llama3.2-tiny", seed=1)
    objective = PolicyGradientLoss(policy, POLICY_VARIANTS[name].surrogate, count=POLICY_VARIANTS[name].count)
    before = policy.head.weight.detach().clone()
    losses = [objective(batch) for batch in rollouts(policy).batches(0)]
    sum(loss.total / loss.count for loss in losses).backward()
    torch.optim.AdamW(policy.parameters(), lr=1e-6).step()
    assert not torch.equal(before, policy.head.weight)
