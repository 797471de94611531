"""Lookahead modules added to a decoder: the page's own block, trained by the objective's weight, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm_quest.data.batch import TokenBatch
from llm_quest.errors import UsageError
from llm_quest.models.build import build
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import Scope
from llm_quest.techniques.multi_token_prediction import MultiTokenPrediction
from tests.laws.subjects import TINY, own, random_tokens, randomize_


@pytest.mark.parametrize("page", [page for page in TINY if page not in ("deepseek-v3-tiny", "mimo-tiny")])
def test_it_is_the_pages_own_last_layer(page: str):
    model = MultiTokenPrediction(2)(build(page))
    last = model.blocks[-1]
    for module in model.mtp_modules:
        assert {n: p.shape for n, p in module.block.named_parameters()} == {
            n: p.shape for n, p in last.named_parameters()
        }
        assert type(module.norm) is type(model.norm)
    first, second = (module.join.weight for module in model.mtp_modules)
    assert not torch.equal(first, second)
    assert 0.015 < first.std() < 0.025


def test_the_loss_pairs_each_state_with_the_token_two_further_on():
    model = randomize_(MultiTokenPrediction()(own("gpt2-tiny")), seed=2)
    tokens = random_tokens(model, 2, 12)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = NextTokenLoss(model, mtp_weight=0.3)(TokenBatch(inputs, targets))
    h, module = model.hidden_states(inputs)[:, :-1], model.mtp_modules[0]
    scope_tokens = inputs[:, 1:]
    embedded = model.embed.token(scope_tokens) + model.embed.position(torch.arange(1, 11))
    pair = torch.cat((module.embed_norm(embedded), module.hidden_norm(h)), dim=-1)
    scope = Scope(torch.arange(1, 11).expand(2, -1))
    logits = model.head(module.norm(module.block(module.join(pair), scope)))
    expected = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum")
    total, count = loss.metrics["lookahead_1"]
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-6)
    assert count == 20
    main, _ = loss.metrics["next_token"]
    torch.testing.assert_close(loss.total, main + 0.3 * total)


def test_it_learns():
    model = MultiTokenPrediction()(build("llama3.2-tiny")).train()
    batch = TokenBatch(torch.arange(24).repeat(4, 1), torch.arange(1, 25).repeat(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = NextTokenLoss(model)(batch)
        losses.append(float(loss.metrics["lookahead_1"][0] / loss.metrics["lookahead_1"][1]))
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="at least one module"):
        MultiTokenPrediction(0)
    with pytest.raises(ValueError, match=r"has multi-token modules already \(2\): train those"):
        MultiTokenPrediction()(build("deepseek-v3-tiny"))
