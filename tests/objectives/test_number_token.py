"""Number Token Loss: equal to `ntloss` and scipy; splits add up; padded vocabularies, spaces, no number at all."""

from __future__ import annotations

import math

import pytest
import tokenizers
import torch
from tokenizers import models
from torch import Tensor

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.models.build import build
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.objectives.number_token import DISTANCES, NumberTokenLoss, number_values
from tests.later import Later

stats, ntloss = Later("scipy.stats"), Later("ntloss")

WORDS = ["<pad>", "7", "a", "3", "0", "9", "1", "inf", "2", "nan", "8", "4", "6", "5", "12", "Ġ5", "▁6", "Ġ1984", "-1"]
WORDS += ["1.5", "٣", "½", "5a", "e5"]
VOCAB = 97


def tokenizer() -> Tokenizer:
    table = {word: i for i, word in enumerate(WORDS)}
    return Tokenizer(tokenizers.Tokenizer(models.WordLevel(table, unk_token="<pad>")))


class Theirs:
    """What ntloss asks of a tokenizer, of the same vocabulary without the spaced digits, which it does not know."""

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(WORDS) if word[0] not in "Ġ▁"}

    def __len__(self) -> int:
        return len(WORDS)

    def add_tokens(self, tokens) -> int:
        return 0

    def convert_tokens_to_ids(self, tokens):
        return [self.get_vocab()[token] for token in tokens]


def plain_values() -> Tensor:
    values = number_values(tokenizer(), VOCAB)
    values[[WORDS.index("Ġ5"), WORDS.index("▁6")]] = float("nan")
    return values


def case(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(4, 9, VOCAB, generator=generator, dtype=torch.float64)
    targets = torch.randint(len(WORDS), (4, 9), generator=generator)
    targets[WORDS.index("Ġ5") == targets] = 2
    targets[WORDS.index("▁6") == targets] = 1
    targets[0, :3] = IGNORE_INDEX
    return logits, targets


@pytest.mark.parametrize("distance", DISTANCES)
def test_it_equals_ntloss(distance: str, generator: torch.Generator):
    logits, targets = case(generator)
    kind = ntloss.NTLoss if distance == "was" else ntloss.NTLossDotProduct
    theirs = kind(Theirs(), vocab_size=VOCAB, reweigh=False)
    ours = NumberTokenLoss(plain_values(), distance=distance)
    total, count = ours.distance_sum(logits[..., ours.ids], targets)
    torch.testing.assert_close(total / count, theirs(logits, targets).double(), atol=1e-6, rtol=1e-6)


def test_was_is_scipys_wasserstein_distance(generator: torch.Generator):
    logits, targets = case(generator)
    ours = NumberTokenLoss(plain_values())
    total, count = ours.distance_sum(logits[..., ours.ids], targets)
    expected, found = 0.0, 0
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target >= 0 and WORDS[target] in list("0123456789"):
            p = row[ours.ids].softmax(-1)
            expected += stats.wasserstein_distance(ours.values.numpy(), [float(WORDS[target])], p.numpy(), [1.0])
            found += 1
    assert count.item() == found
    assert total.item() == pytest.approx(expected, abs=1e-6)


def test_by_hand():
    """Numbers 0, 4 and 8 with probabilities 1/2, 1/4, 1/4, target 4: WAS 1/2 4 + 1/4 4 = 3, the mean is 3: MSE 1."""
    values = torch.tensor([float("nan"), 8.0, 0.0, 4.0])
    logits = torch.tensor([0.25, 0.5, 0.25]).log()[None, None]
    for distance, expected in (("was", 3.0), ("mse", 1.0)):
        total, count = NumberTokenLoss(values, distance=distance).distance_sum(logits, torch.tensor([[3]]))
        assert (total.item(), count.item()) == (pytest.approx(expected), 1.0)


def test_which_tokens_are_numbers():
    values = number_values(tokenizer(), VOCAB)
    found = {WORDS[i]: values[i].item() for i in range(VOCAB) if not math.isnan(values[i])}
    assert found == {**{d: float(d) for d in "0123456789"}, "Ġ5": 5.0, "▁6": 6.0}
    more = number_values(tokenizer(), VOCAB, multi_digit=True)
    assert {WORDS[i] for i in range(VOCAB) if not math.isnan(more[i])} - set(found) == {"12", "Ġ1984"}
    assert more[WORDS.index("Ġ1984")] == 1984


def objective(distance: str = "was", page: str = "llama3.2-tiny") -> NextTokenLoss:
    return NextTokenLoss(
        build(page).double(), auxiliary=[NumberTokenLoss(plain_values(), weight=0.3, distance=distance)]
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_it_is_added_and_splits_add_up(distance: str, generator: torch.Generator):
    _, targets = case(generator)
    batch = TokenBatch(torch.randint(VOCAB, (4, 9), generator=generator), targets)
    both = objective(distance, "gemma2-tiny")
    loss, plain = both(batch), NextTokenLoss(both.model)(batch)
    total, _ = loss.metrics["number_token"]
    torch.testing.assert_close(loss.total, plain.total + 0.3 * total)
    logits = both.model(batch.input_ids)[..., both.auxiliary[0].ids]
    torch.testing.assert_close(both.auxiliary[0].distance_sum(logits, targets)[0].detach(), total)
    assert loss.count == plain.count
    halves = [both(batch.slice_rows(0, 1)), both(batch.slice_rows(1, 4))]
    torch.testing.assert_close(halves[0].total + halves[1].total, loss.total)
    torch.testing.assert_close(halves[0].count + halves[1].count, loss.count)
    for part in (0, 1):
        summed = halves[0].metrics["number_token"][part] + halves[1].metrics["number_token"][part]
        torch.testing.assert_close(summed, loss.metrics["number_token"][part])


def test_without_a_number_in_the_batch_it_is_0_and_the_gradient_is_the_plain_one():
    tokens, targets = torch.tensor([[2, 0, 7]]), torch.tensor([[0, 7, IGNORE_INDEX]])
    both = objective()
    loss = both(TokenBatch(tokens, targets))
    total, count = loss.metrics["number_token"]
    assert (total.item(), count.item()) == (0.0, 0.0)
    loss.total.backward()
    gradients = [p.grad.clone() for p in both.model.parameters()]
    both.model.zero_grad()
    NextTokenLoss(both.model)(TokenBatch(tokens, targets)).total.backward()
    for mine, other in zip(gradients, both.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, atol=1e-12, rtol=0)


def test_a_nearer_wrong_digit_costs_less():
    ours = NumberTokenLoss(plain_values())
    costs = []
    for guess in (4.0, 6.0, 9.0):
        logits = torch.where(ours.values == guess, 9.0, 0.0)[None, None]
        costs.append(ours.distance_sum(logits, torch.tensor([[WORDS.index("5")]]))[0].item())
    assert costs[0] == pytest.approx(costs[1], abs=2e-3)
    assert costs[2] > 3 * costs[0]


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="known: was, mse"):
        NumberTokenLoss(plain_values(), distance="mae")
    with pytest.raises(UsageError, match="0 of the vocabulary's tokens are numbers"):
        NumberTokenLoss(torch.full((5,), float("nan")))
    with pytest.raises(UsageError, match="is beyond the vocabulary of 5"):
        number_values(tokenizer(), 5)
    with pytest.raises(UsageError, match="the values are of 50 tokens, the model has 97"):
        NextTokenLoss(build("gpt2-tiny"), auxiliary=[NumberTokenLoss(number_values(tokenizer(), 50))])(
            TokenBatch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
        )
