"""The flat file against the package: log-probabilities, advantages, loss, gradients and what several updates make of
the weights, on the same samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quest.data.policy_batch import PolicyRow, collate_policy_rows
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import llama
from llm_quest.models.build import build
from llm_quest.objectives.kl_penalty import KLPenalty
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.objectives.surrogates import ClippedSurrogate
from llm_quest.recipes.flat import grpo as flat
from llm_quest.rollouts.advantages import group_std_advantages
from tests.recipes.flat import test_pretrain as shared

PROMPTS = [flat.encode("abc>"), flat.encode("hgfe>"), flat.encode("dea>")]
RIGHT, COPIED = [*flat.encode("cba"), flat.END], [*flat.encode("efgh"), flat.END]
COMPLETIONS = [RIGHT, flat.encode("cbabcb"), [flat.END], [*flat.encode("a"), flat.END]]
COMPLETIONS += [COPIED, COPIED, COPIED, flat.encode("efghef")]
COMPLETIONS += [[flat.END], [*flat.encode("e"), flat.END], flat.encode("deadea"), [*flat.encode("da"), flat.END]]
REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
SETTINGS = flat.GrpoSettings(num_generations=4, num_iterations=3, learning_rate=3e-2, epsilon=0.05, beta=0.3)


def pair(monkeypatch: pytest.MonkeyPatch):
    """The package's model and the flat file's, with the same weights."""
    config = flat.LlamaConfig(
        vocab_size=len(flat.VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
    )
    monkeypatch.setattr(shared, "CONFIG", config)
    packaged = build(
        llama.Config(config.vocab_size, 32, 2, 4, 2, 8, 48, 16, RotaryEmbedding(8, config.rope_theta), True), seed=5
    )
    return packaged, shared.as_flat(packaged)


def rows(old: torch.Tensor, reference: torch.Tensor | None) -> list[PolicyRow]:
    worth, made = group_std_advantages(REWARDS).flatten(), []
    for i, tokens in enumerate(COMPLETIONS):
        prompt = PROMPTS[i // 4]
        place = slice(len(prompt) - 1, len(prompt) - 1 + len(tokens))
        other = None if reference is None else reference[i, place].numpy()
        each = np.full(len(tokens), worth[i].item(), np.float32)
        made.append(PolicyRow(tuple(prompt), tuple(tokens), each, old[i, place].numpy(), None, other))
    return made


def test_advantages_are_the_houses() -> None:
    torch.testing.assert_close(flat.group_advantages(REWARDS), group_std_advantages(REWARDS), rtol=0, atol=1e-6)
    same = torch.full((1, 4), 0.7)
    assert flat.group_advantages(same).tolist() == group_std_advantages(same).tolist() == [[0.0] * 4]


def test_updates_on_one_rollout_are_the_houses(monkeypatch: pytest.MonkeyPatch) -> None:
    packaged, plain = pair(monkeypatch)
    prompts = [PROMPTS[i // 4] for i in range(12)]
    batch = flat.pad_batch(prompts, COMPLETIONS, flat.group_advantages(REWARDS).flatten())
    with torch.no_grad():
        first = flat.Llama(shared.CONFIG)
        first.load_state_dict(plain.state_dict())
        first.norm.weight.mul_(1.1)
        old = flat.target_log_probs(plain, batch.inputs, batch.targets)
        reference = flat.target_log_probs(first, batch.inputs, batch.targets)
        ours = collate_policy_rows(rows(old, reference))
        torch.testing.assert_close(
            ours.input_ids * (ours.targets >= 0), batch.inputs * (batch.completion_mask > 0), rtol=0, atol=0
        )
        scored = token_log_probs(packaged, ours)
        torch.testing.assert_close(scored, old * batch.completion_mask, rtol=0, atol=2e-6)

    objective = PolicyGradientLoss(
        packaged, ClippedSurrogate(SETTINGS.epsilon, SETTINGS.epsilon), kl=KLPenalty(0.3, "k3")
    )
    optimizer = torch.optim.AdamW(packaged.parameters(), lr=SETTINGS.learning_rate, weight_decay=0.0)
    expected = []
    for _ in range(SETTINGS.num_iterations):
        loss = objective(ours)
        mean = loss.total / loss.count
        mean.backward()
        torch.nn.utils.clip_grad_norm_(packaged.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(mean.item())
    own = torch.optim.AdamW(plain.parameters(), lr=SETTINGS.learning_rate, weight_decay=0.0)
    losses = flat.train_on_rollout(plain, first, own, batch, SETTINGS)
    assert losses == pytest.approx(expected, abs=2e-5)
    assert len({round(loss, 3) for loss in losses}) == 3, "the updates differ, so clipping and ratio were at work"


def test_rewards_ask_for_the_whole_answer_and_its_end() -> None:
    prompt = flat.encode("abc>")
    assert flat.exact_match_reward(prompt, [*flat.encode("cba"), flat.END]) == 1.0
    for wrong in ([*flat.encode("abc"), 0], flat.encode("cba"), [*flat.encode("cbaa"), 0], [0], []):
        assert flat.exact_match_reward(prompt, wrong) == 0.0


def test_samples_end_at_their_first_end(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = pair(monkeypatch)
    made = flat.sample_group(plain, PROMPTS[0], flat.GrpoSettings(num_generations=64), torch.Generator().manual_seed(0))
    assert all(flat.END not in row[:-1] for row in made)
    assert {len(row) for row in made} > {1, 6}


def test_it_learns_what_the_teacher_did_not_show() -> None:
    before, after = flat.main(steps=12, warmup=250)
    assert after > before + 0.15
