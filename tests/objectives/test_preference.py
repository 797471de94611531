"""The DPO family: the worked vectors, the laws, and TRL on the same tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from llm_quest.data.preference_pairs import collate_preferences
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.errors import UsageError
from llm_quest.models.build import build, preset
from llm_quest.objectives.preference import (
    DPO,
    IPO,
    ConservativeDPO,
    PairwiseLoss,
    PreferenceLoss,
    make_preference_loss,
    sequence_log_probs,
)
from tests.objectives.rated import Answering, elements, gradients, tiny, trainer, trl_inputs

D = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
TABLE = [
    ("dpo", 0.1, 0.0, 0.620957, -0.046257), ("cdpo", 0.1, 0.1, 0.635957, -0.036257),
    ("cdpo", 0.1, 0.2, 0.650957, -0.026257), ("robust", 0.1, 0.1, 0.602207, -0.058757),
    ("dpo", 0.5, 0.0, 0.386871, -0.160411), ("cdpo", 0.5, 0.1, 0.461871, -0.110411),
    ("cdpo", 0.5, 0.2, 0.536871, -0.060411), ("robust", 0.5, 0.1, 0.293121, -0.222911),
    ("ipo", 0.1, 0.0, 12.25, None), ("ipo", 0.5, 0.0, 0.25, None), ("hinge", 0.5, 0.0, 0.25, -0.5),
]  # fmt: skip


def made(name: str, flips: float, beta: float = 0.1) -> PairwiseLoss:
    return make_preference_loss(name, beta=beta, **({"label_smoothing": flips} if flips else {}))


NAMED = [("dpo", 0.0), ("cdpo", 0.1), ("robust", 0.1), ("ipo", 0.0), ("hinge", 0.0)]


@pytest.mark.parametrize(("name", "beta", "flips", "loss", "slope"), TABLE)
def test_vector_dpo_1(name, beta, flips, loss, slope):
    found = made(name, flips, beta)(D)
    assert found.item() == pytest.approx(loss, abs=1e-6)
    if slope is not None:
        assert torch.autograd.grad(found, D)[0].item() == pytest.approx(slope, abs=1e-6)


class Told(torch.nn.Module):
    """A model whose log-probabilities are what they are said to be: logits of the target against one other token."""

    def __init__(self, rows: list[list[float]]):
        super().__init__()
        self.rows = rows

    def hidden_states(self, tokens, scope):
        h = torch.zeros(*tokens.shape, 2, dtype=torch.float64)
        for r, row in enumerate(self.rows):
            for t, logp in enumerate(row):
                h[r, t, 1] = logp - math.log1p(-math.exp(logp))
        return h

    class head:
        weight, softcap = torch.eye(2, dtype=torch.float64), None


def told() -> tuple[Told, object]:
    policy = Told([[-0.5, -1.0, -0.25], [-0.75, -2.0]])
    batch = collate_preferences([TokenizedPreference(np.array([0]), (np.array([1, 1, 1]), np.array([1, 1])))])
    return policy, replace(batch, reference_log_probs=torch.tensor([-2.5, -2.0], dtype=torch.float64))


def test_log_probabilities_are_summed_and_rewards_carry_beta():
    """The worked pair as a batch: sums -1.75 and -2.75, rewards +0.075 and -0.075 at beta 0.1."""
    policy, batch = told()
    torch.testing.assert_close(sequence_log_probs(policy, batch), torch.tensor([-1.75, -2.75], dtype=torch.float64))
    loss = PreferenceLoss(policy)(batch)
    assert loss.total.item() == pytest.approx(0.620957, abs=1e-6)
    means = {name: (total / count).item() for name, (total, count) in loss.metrics.items()}
    assert means["rewards/chosen"] == pytest.approx(0.075)
    assert means["rewards/rejected"] == pytest.approx(-0.075)
    assert means["rewards/margin"] == pytest.approx(0.15)
    assert means["rewards/accuracy"] == 1.0


def test_means_over_tokens_are_another_loss_and_have_to_be_asked_for():
    policy, batch = told()
    found = {
        loss: PreferenceLoss(policy, loss, average_log_prob=True)(batch).total.item()
        for loss in (DPO(0.1), IPO(0.1), IPO(0.5))
    }
    assert found[DPO(0.1)] == pytest.approx(0.662385, abs=1e-6)
    assert found[IPO(0.1)] == pytest.approx(19.140625, abs=1e-6)
    assert found[IPO(0.5)] == pytest.approx(0.140625, abs=1e-6)


@dataclass(frozen=True)
class LogRatioAlone:
    """A loss of the policy alone, whose D is a mean over tokens."""

    beta: float = 1.0
    needs_reference: ClassVar[bool] = False
    average_log_prob: ClassVar[bool] = True

    def __call__(self, margin: torch.Tensor) -> torch.Tensor:
        return margin


def test_a_loss_may_do_without_a_reference_and_ask_for_means():
    policy, batch = told()
    objective = PreferenceLoss(policy, LogRatioAlone())
    assert objective(batch).total.item() == pytest.approx(-1.75 / 3 + 2.75 / 2)
    assert objective(replace(batch, reference_log_probs=None)).total.item() == pytest.approx(-1.75 / 3 + 2.75 / 2)


def test_cdpo_rests_at_its_optimum_and_pushes_back_beyond():
    at = torch.tensor([13.862944, 20.0], dtype=torch.float64, requires_grad=True)
    found = ConservativeDPO(0.2)(at)
    slope = torch.autograd.grad(found.sum(), at)[0]
    assert found[0].item() == pytest.approx(0.500402, abs=1e-6)
    assert slope[0].abs() < 1e-7
    assert slope[1] > 0


@pytest.mark.parametrize(("name", "flips"), [("dpo", 0.0), ("cdpo", 0.2)])
def test_swapping_the_answers_is_a_negative_margin(name, flips):
    other = made(name, flips, 0.3)(-D)
    if name == "cdpo":
        assert other.item() == pytest.approx(ConservativeDPO(1 - flips, 0.3)(D).item())
    assert (other - made(name, flips, 0.3)(D)).item() == pytest.approx((1 - 2 * flips) * 0.3 * 1.5)


def batch_of(model, number=4, **options):
    batch = collate_preferences(elements(number, **options))
    noise = torch.linspace(-1, 1, len(batch.input_ids), dtype=torch.float64)
    return replace(batch, reference_log_probs=sequence_log_probs(model, batch).detach() + noise)


def test_a_policy_that_is_its_reference_has_loss_ln_2():
    model = tiny()
    batch = collate_preferences(elements())
    batch = replace(batch, reference_log_probs=sequence_log_probs(model, batch).detach())
    for name, flips in (("dpo", 0.0), ("cdpo", 0.1)):
        loss = PreferenceLoss(model, made(name, flips))(batch)
        assert (loss.total / loss.count).item() == pytest.approx(math.log(2), abs=1e-9)


def test_what_is_added_to_both_answers_of_a_question_changes_nothing():
    model = tiny()
    batch = batch_of(model)
    shifted = replace(batch, reference_log_probs=batch.reference_log_probs + torch.arange(4.0).repeat_interleave(2))
    torch.testing.assert_close(PreferenceLoss(model)(shifted).total, PreferenceLoss(model)(batch).total)


@pytest.mark.parametrize(("name", "flips"), NAMED)
@pytest.mark.parametrize("answers", [2, 3])
def test_splitting_a_batch_adds_and_padding_is_invisible(name, flips, answers):
    """Elements of other lengths make rows of other widths: each alone, and all together."""
    model = tiny()
    objective = PreferenceLoss(model, made(name, flips))
    rated = elements(5, answers=answers)
    known = np.linspace(-9, -4, 5 * answers).reshape(5, answers)
    whole = objective(collate_preferences(rated, list(known)))
    parts = [objective(collate_preferences(rated[n : n + 1], [known[n]])) for n in range(5)]
    torch.testing.assert_close(whole.total, sum(part.total for part in parts))
    assert whole.count.item() == sum(part.count.item() for part in parts) == pytest.approx(5)
    for got, wanted in zip(
        gradients(model, whole.total), gradients(model, sum(part.total for part in parts)), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(("name", "flips"), NAMED)
def test_gradients_are_those_of_finite_differences(name, flips):
    model = tiny()
    batch = batch_of(model, 2)
    objective = PreferenceLoss(model, made(name, flips, 0.3))
    weight = model.blocks[0].mixer.layer.out.weight
    slope = gradients(model, objective(batch).total)[[id(p) for p in model.parameters()].index(id(weight))]
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * step)
            values.append(objective(batch).total.item())
            weight.sub_(direction, alpha=sign * step)
    assert (slope * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_dropout_is_off_in_training():
    config = replace(preset("gpt2-tiny").config, dropout=0.3)
    model = build(config, seed=0).train()
    batch = collate_preferences(elements())
    batch = replace(batch, reference_log_probs=sequence_log_probs(model, batch).detach())
    model.train()
    assert PreferenceLoss(model)(batch).total.item() == pytest.approx(4 * math.log(2), abs=1e-5)


def test_a_reference_may_be_computed_and_has_no_gradient():
    model, other = tiny(), tiny(seed=5)
    batch = collate_preferences(elements())
    known = replace(batch, reference_log_probs=sequence_log_probs(other, batch).detach())
    live = PreferenceLoss(model, reference=lambda batch: sequence_log_probs(other, batch))
    total = live(batch).total
    torch.testing.assert_close(total, PreferenceLoss(model)(known).total)
    assert all(found is None for found in gradients(other, total))


@pytest.mark.parametrize(
    ("name", "numbers", "said"),
    [
        (
            "dpo",
            {"label_smoothing": 0.1},
            "label_smoothing 0.1 has no effect on loss_type=dpo; take loss_type=cdpo or ",
        ),
        ("ipo", {"label_smoothing": 0.1}, "has no effect on loss_type=ipo"),
        ("hinge", {"margin": 0.5}, "margin 0.5 has no effect on loss_type=hinge; it has beta"),
        ("cdpo", {}, "cdpo needs label_smoothing"),
        ("robust", {"label_smoothing": 0.5}, "robust needs label_smoothing"),
        ("dqo", {}, "no preference loss is called 'dqo'; known: dpo, cdpo"),
        ("dpo", {"beta": 0.0}, "beta is 0.0"),
    ],
)
def test_a_number_without_effect_is_refused(name, numbers, said):
    with pytest.raises(UsageError, match=said):
        make_preference_loss(name, **numbers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "flips", "theirs", "per_token"),
    [("dpo", 0.0, "sigmoid", False), ("robust", 0.1, "robust", False), ("hinge", 0.0, "hinge", False),
     ("ipo", 0.0, "ipo", True), ("dpo", 0.0, "sigmoid_norm", True)],
)  # fmt: skip
def test_losses_gradients_and_rewards_equal_trl(name, flips, theirs, per_token):
    from trl import DPOTrainer

    model = tiny()
    batch = batch_of(model, 5)
    loss = PreferenceLoss(model, made(name, flips, 0.3), average_log_prob=per_token)(batch)
    other = trainer(model=Answering(model), beta=0.3, loss_types=[theirs], label_smoothing=flips)
    their_loss = DPOTrainer._compute_loss(other, other.model, trl_inputs(batch), False)
    torch.testing.assert_close(loss.total / loss.count, their_loss, atol=1e-9, rtol=1e-9)
    for got, wanted in zip(gradients(model, loss.total / loss.count), gradients(model, their_loss), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)
    if not per_token:
        logged = other._metrics["train"]
        for ours, name in (
            ("chosen", "chosen"),
            ("rejected", "rejected"),
            ("margin", "margins"),
            ("accuracy", "accuracies"),
        ):
            total, count = loss.metrics[f"rewards/{ours}"]
            assert (total / count).item() == pytest.approx(logged[f"rewards/{name}"][0], abs=1e-9)


def test_eight_pairs_can_be_learned_by_heart():
    model = tiny(dtype=torch.float32)
    batch = collate_preferences(elements(8, seed=3))
    batch = replace(batch, reference_log_probs=sequence_log_probs(model, batch).detach())
    objective, optimizer = PreferenceLoss(model, DPO(0.5)), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = objective(batch)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    right, all_ = objective(batch).metrics["rewards/accuracy"]
    assert right == all_
    assert (objective(batch).total / 8).item() < 0.3
