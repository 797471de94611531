"""The DPO family: the worked vectors, the laws, and TRL on the same tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from llm_quest.data.preference_pairs import collate_preferences
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.errors import UsageError
from llm_quest.models.build import build, preset
from llm_quest.objectives.preference import PreferenceLoss, sequence_log_probs
from llm_quest.objectives.preference_loss_numbers import make_preference_loss
from llm_quest.objectives.preference_losses import (
    AOT,
    DPO,
    IPO,
    PREFERENCE_LOSSES,
    AOTUnpaired,
    ConservativeDPO,
    LogRatios,
    LossTraits,
    PairwiseLoss,
    log_odds,
)
from tests.objectives.rated import Answering, elements, gradients, tiny, trainer, trl_inputs

D = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
TABLE = [
    ("dpo", 0.1, 0.0, 0.620957, -0.046257), ("cdpo", 0.1, 0.1, 0.635957, -0.036257),
    ("cdpo", 0.1, 0.2, 0.650957, -0.026257), ("robust", 0.1, 0.1, 0.602207, -0.058757),
    ("dpo", 0.5, 0.0, 0.386871, -0.160411), ("cdpo", 0.5, 0.1, 0.461871, -0.110411),
    ("cdpo", 0.5, 0.2, 0.536871, -0.060411), ("robust", 0.5, 0.1, 0.293121, -0.222911),
    ("ipo", 0.1, 0.0, 12.25, None), ("ipo", 0.5, 0.0, 0.25, None), ("hinge", 0.5, 0.0, 0.25, -0.5),
]  # fmt: skip


def of_margin(margin: torch.Tensor) -> LogRatios:
    """Comparisons that differ by this much: half of it in either answer."""
    return LogRatios(margin / 2, -margin / 2, torch.zeros_like(margin))


def make_loss(name: str, flips: float, beta: float = 0.1) -> PairwiseLoss:
    return make_preference_loss(name, beta=beta, **({"label_smoothing": flips} if flips else {}))


SMOOTHED = {"cdpo": 0.1, "robust": 0.1, "exo_pair": 0.1}
EVERY = [(name, SMOOTHED.get(name, 0.0)) for name in PREFERENCE_LOSSES]
NAMED = [(name, flips) for name, flips in EVERY if not PREFERENCE_LOSSES[name].traits.sorts_batch]
"""Losses of a comparison alone, which split into parts."""


@pytest.mark.parametrize(("name", "beta", "flips", "loss", "slope"), TABLE)
def test_vector_dpo_1(name, beta, flips, loss, slope):
    found = make_loss(name, flips, beta)(of_margin(D))
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


def policy_and_batch() -> tuple[Told, object]:
    policy = Told([[-0.5, -1.0, -0.25], [-0.75, -2.0]])
    batch = collate_preferences([TokenizedPreference(np.array([0]), (np.array([1, 1, 1]), np.array([1, 1])))])
    return policy, replace(batch, reference_log_probs=torch.tensor([-2.5, -2.0], dtype=torch.float64))


def test_log_probabilities_are_summed_and_rewards_carry_beta():
    """The worked pair as a batch: sums -1.75 and -2.75, rewards +0.075 and -0.075 at beta 0.1."""
    policy, batch = policy_and_batch()
    torch.testing.assert_close(sequence_log_probs(policy, batch), torch.tensor([-1.75, -2.75], dtype=torch.float64))
    loss = PreferenceLoss(policy)(batch)
    assert loss.total.item() == pytest.approx(0.620957, abs=1e-6)
    means = {name: (total / count).item() for name, (total, count) in loss.metrics.items()}
    assert means["rewards/chosen"] == pytest.approx(0.075)
    assert means["rewards/rejected"] == pytest.approx(-0.075)
    assert means["rewards/margin"] == pytest.approx(0.15)
    assert means["rewards/accuracy"] == 1.0


WORKED = [
    ("simpo", {}, 0.443425), ("cpo", {}, 0.644397 + 1.75 / 3), ("orpo", {}, 0.0237452 + 1.75 / 3),
    ("apo_zero", {"beta": 0.5}, 0.814667), ("apo_down", {"beta": 0.5}, 0.913488),
    ("exo_pair", {"beta": 0.5, "label_smoothing": 0.1}, 0.182790), ("nca_pair", {"beta": 0.5}, 1.233746),
    ("bco_pair", {"beta": 0.5}, 1.046246), ("sppo_hard", {"beta": 0.5}, 0.125),
    ("discopop", {"beta": 0.5, "discopop_tau": 1.0}, 0.444938),
]  # fmt: skip
"""By hand, of the pair of `policy_and_batch`: a = 0.75, b = -0.75; log p -1.75 of 3 tokens and -2.75 of 2."""


@pytest.mark.parametrize(("name", "numbers", "loss"), WORKED)
def test_the_other_losses_of_the_worked_pair(name, numbers, loss):
    policy, batch = policy_and_batch()
    assert PreferenceLoss(policy, make_preference_loss(name, **numbers))(batch).total.item() == pytest.approx(
        loss, abs=1e-6
    )


def test_every_loss_has_a_worked_value():
    sorting = {name for name, loss in PREFERENCE_LOSSES.items() if loss.traits.sorts_batch}
    assert {row[0] for row in [*TABLE, *WORKED]} | sorting == set(PREFERENCE_LOSSES)


def test_the_sft_term_is_a_mean_over_the_chosen_answers_tokens():
    policy, batch = policy_and_batch()
    for weight in (0.0, 0.5):
        found = PreferenceLoss(policy, sft_weight=weight)(batch)
        assert found.total.item() == pytest.approx(0.620957 + weight * 1.75 / 3, abs=1e-6)
    assert found.metrics["nll_loss"][0].item() == pytest.approx(1.75 / 3)
    assert PreferenceLoss(policy, make_preference_loss("cpo"), sft_weight=0.0)(batch).total.item() == pytest.approx(
        0.644397, abs=1e-6
    )


def test_aot_compares_the_sorted_margins():
    """Policy margins 1 and 3, reference margins 2 and 0: D is -1 and 3, sorted both differences are 1."""
    policy, reference = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])
    pairs = LogRatios(policy - reference, torch.zeros(2), reference)
    torch.testing.assert_close(AOT(beta=1.0)(pairs), torch.full((2,), 0.313262), atol=1e-6, rtol=0)
    unpaired = LogRatios(torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0]), reference)
    torch.testing.assert_close(AOTUnpaired(beta=1.0)(unpaired), torch.full((2,), 0.313262), atol=1e-6, rtol=0)


def test_log_odds_are_exact_at_both_ends():
    log_p = torch.tensor([-1e-5, -0.3, -0.7, -40.0], dtype=torch.float64)
    wanted = [math.log(math.exp(x) / -math.expm1(x)) for x in log_p.tolist()]
    torch.testing.assert_close(log_odds(log_p), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert log_odds(torch.zeros(1)).isfinite().all()


def test_means_over_tokens_are_another_loss_and_have_to_be_asked_for():
    policy, batch = policy_and_batch()
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
    traits: ClassVar[LossTraits] = LossTraits(needs_reference=False, average_log_prob=True)

    def __call__(self, pairs: LogRatios) -> torch.Tensor:
        return pairs.D


def test_a_loss_may_do_without_a_reference_and_ask_for_means():
    policy, batch = policy_and_batch()
    objective = PreferenceLoss(policy, LogRatioAlone())
    assert objective(batch).total.item() == pytest.approx(-1.75 / 3 + 2.75 / 2)
    assert objective(replace(batch, reference_log_probs=None)).total.item() == pytest.approx(-1.75 / 3 + 2.75 / 2)


def test_cdpo_rests_at_its_optimum_and_pushes_back_beyond():
    at = torch.tensor([13.862944, 20.0], dtype=torch.float64, requires_grad=True)
    found = ConservativeDPO(0.2)(of_margin(at))
    slope = torch.autograd.grad(found.sum(), at)[0]
    assert found[0].item() == pytest.approx(0.500402, abs=1e-6)
    assert slope[0].abs() < 1e-7
    assert slope[1] > 0


@pytest.mark.parametrize(("name", "flips"), [("dpo", 0.0), ("cdpo", 0.2)])
def test_swapping_the_answers_is_a_negative_margin(name, flips):
    other = make_loss(name, flips, 0.3)(of_margin(-D))
    if name == "cdpo":
        assert other.item() == pytest.approx(ConservativeDPO(1 - flips, 0.3)(of_margin(D)).item())
    assert (other - make_loss(name, flips, 0.3)(of_margin(D))).item() == pytest.approx((1 - 2 * flips) * 0.3 * 1.5)


def batch_of(model, number=4, **options):
    batch = collate_preferences(elements(number, **options))
    noise = torch.linspace(-1, 1, len(batch.input_ids), dtype=torch.float64)
    return replace(batch, reference_log_probs=sequence_log_probs(model, batch).detach() + noise)


def test_a_policy_that_is_its_reference_has_loss_ln_2():
    model = tiny()
    batch = collate_preferences(elements())
    batch = replace(batch, reference_log_probs=sequence_log_probs(model, batch).detach())
    for name, flips in (("dpo", 0.0), ("cdpo", 0.1)):
        loss = PreferenceLoss(model, make_loss(name, flips))(batch)
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
    objective = PreferenceLoss(model, make_loss(name, flips))
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


@pytest.mark.parametrize(("name", "flips"), EVERY)
def test_gradients_are_those_of_finite_differences(name, flips):
    model = tiny()
    batch = batch_of(model, 2)
    objective = PreferenceLoss(model, make_loss(name, flips, 0.3))
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
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing is 0.0; loss_type=exo_pair needs label_smoothing"),
        ("dpo", {"simpo_gamma": 1.0}, "simpo_gamma 1.0 has no effect on loss_type=dpo; take loss_type=simpo, or"),
    ],
)
def test_a_number_without_effect_is_refused(name, numbers, said):
    with pytest.raises(UsageError, match=said):
        make_preference_loss(name, **numbers)


TRL_SPELLING = {"dpo": "sigmoid"}
TRL_ALONE = {name for name, loss in PREFERENCE_LOSSES.items() if loss.traits.needs_reference} - {"cdpo"}
"""Losses of TRL's DPOTrainer; its sigmoid never reads label_smoothing, and the others are in trl.experimental."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "flips", "theirs", "per_token"),
    [(name, flips, TRL_SPELLING.get(name, name), name == "ipo") for name, flips in EVERY if name in TRL_ALONE]
    + [("dpo", 0.0, "sigmoid_norm", True), ("aot", 0.2, "aot", False)],
)
def test_losses_gradients_and_rewards_equal_trl(name, flips, theirs, per_token, monkeypatch):
    from trl import DPOTrainer

    model = tiny()
    batch = batch_of(model, 5)
    loss = PreferenceLoss(model, make_loss(name, flips, 0.3), average_log_prob=per_token)(batch)
    other = trainer(
        model=Answering(model), beta=0.3, loss_types=[theirs], label_smoothing=flips,
        args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    monkeypatch.setattr(torch, "tensor", partial(torch.tensor, dtype=torch.float64))  # TRL makes one of its epsilon
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "theirs"), [("simpo", "simpo"), ("cpo", "sigmoid")])
def test_cpo_and_simpo_equal_trl(name, theirs):
    """TRL's losses of given log-probabilities, and its SFT term where all chosen answers are of one length."""
    from trl.experimental.cpo import CPOTrainer

    model = tiny()
    batch = collate_preferences([*elements(6, seed=2)])
    lengths = (batch.targets != -100).sum(dim=1)
    found = sequence_log_probs(model, batch)
    log_p = found / lengths if name == "simpo" else found
    device = SimpleNamespace(device=torch.device("cpu"))
    other = SimpleNamespace(
        alpha=0.0, beta=0.7, loss_type=theirs, simpo_gamma=0.3, label_smoothing=0.0, accelerator=device
    )
    numbers = {"simpo_gamma": 0.3} if name == "simpo" else {}
    ours = PreferenceLoss(model, make_preference_loss(name, beta=0.7, **numbers))(batch)
    losses, *_ = CPOTrainer.cpo_loss(other, log_p[batch.chosen], log_p[batch.rejected])
    sft = -(found / lengths)[batch.chosen].sum() if name == "cpo" else 0.0
    torch.testing.assert_close(ours.total, losses.sum() + sft, atol=1e-9, rtol=1e-9)
    for got, wanted in zip(gradients(model, ours.total), gradients(model, losses.sum() + sft), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_orpos_odds_ratio_equals_trl():
    """Which computes it in float32."""
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = -torch.rand(8, dtype=torch.float64) * 3, -torch.rand(8, dtype=torch.float64) * 3
    other = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=torch.device("cpu")))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(other, chosen, rejected)
    ours = make_preference_loss("orpo", beta=0.3)(LogRatios(chosen, rejected, torch.zeros(8)))
    torch.testing.assert_close(ours, -theirs.double(), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_sft_term_equals_trls_where_answers_are_of_one_length():
    from trl import DPOTrainer

    random = np.random.default_rng(4)
    pairs = [
        TokenizedPreference(random.integers(0, 97, 3 + n), (random.integers(0, 97, 4), random.integers(0, 97, 2 + n)))
        for n in range(4)
    ]
    model, batch = tiny(), collate_preferences(pairs, [np.array([-9.0, -7.0])] * 4)
    batch = replace(batch, reference_log_probs=batch.reference_log_probs.double())
    ours = PreferenceLoss(model, DPO(0.3), sft_weight=0.25)(batch)
    other = trainer(model=Answering(model), beta=0.3, loss_types=["sigmoid", "sft"], label_smoothing=0.0)
    other.loss_weights = [1.0, 0.25]
    theirs = DPOTrainer._compute_loss(other, other.model, trl_inputs(batch), False)
    torch.testing.assert_close(ours.total / ours.count, theirs, atol=1e-9, rtol=1e-9)


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
