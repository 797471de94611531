"""KTO: worked values, the law of sums, and TRL's trainer on the same tensors."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm_quest.data.preference_pairs import PreferenceBatch, collate_preferences
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.unpaired import add_mismatched_answers, own_rows
from llm_quest.errors import DataError
from llm_quest.objectives.kto import (
    KTO,
    UNPAIRED_LOSSES,
    APOZeroUnpaired,
    KTOLoss,
    balance_note,
    gains_with_mismatch,
    reference_point,
)
from tests.objectives.rated import Answering, elements, gradients, tiny

R = torch.tensor([1.0, -1.0], dtype=torch.float64)


def label_rows(number: int = 6, seed: int = 0) -> list[TokenizedPreference]:
    """Random rows, every third undesirable, each with another row's answer."""
    rows = elements(number, answers=1, seed=seed)
    rows = [replace(one, margin=-1.0 if n % 3 == 1 else 1.0) for n, one in enumerate(rows)]
    return add_mismatched_answers(rows, 64, seed)


def collate(rows: list[TokenizedPreference]) -> PreferenceBatch:
    """With a reference that differs from row to row."""
    batch = collate_preferences(rows)
    return replace(batch, reference_log_probs=-torch.linspace(20, 24, len(batch.input_ids), dtype=torch.float64))


def test_worked_values_of_both_sides():
    """beta 0.5, z 0.2: r = 1 and -1 are 0.8 above and 1.2 below; sigma(0.4) = 0.598688, sigma(0.6) = 0.645656."""
    loss, z = KTO(0.5), torch.tensor(0.2, dtype=torch.float64)
    assert loss.desirable(R, z).tolist() == pytest.approx([1 - 0.598688, 0.645656], abs=1e-6)
    assert loss.undesirable(R, z).tolist() == pytest.approx([0.598688, 1 - 0.645656], abs=1e-6)
    alone = APOZeroUnpaired(0.5)
    assert alone.desirable(R, z).tolist() == pytest.approx([1 - 0.622459, 0.622459], abs=1e-6)
    assert alone.undesirable(R, z).tolist() == pytest.approx([0.622459, 1 - 0.622459], abs=1e-6)


def test_the_reference_point_is_a_mean_over_all_processes_and_not_below_0():
    assert reference_point([(3.0, 2), (1.0, 2)]).item() == 1.0
    assert reference_point([(-3.0, 2), (1.0, 2)]).item() == 0.0


def test_a_policy_that_is_its_reference_has_half_of_every_weight():
    model = tiny()
    batch = collate(label_rows())
    from llm_quest.objectives.preference import sequence_log_probs

    batch = replace(batch, reference_log_probs=sequence_log_probs(model, batch).detach())
    total, rows = gains_with_mismatch(model, [batch])
    assert (rows, total) == (6, pytest.approx(0.0, abs=1e-9))
    found = KTOLoss(model, desirable_weight=2.0)(own_rows(batch, torch.zeros(())))
    assert found.total.item() == pytest.approx(4 * 2 * 0.5 + 2 * 0.5)
    assert found.count.item() == 6


def test_mismatched_answers_are_all_answers_each_with_another_question():
    rows = [TokenizedPreference(np.array([n // 2, 7]), (np.array([n, 9]),), 1.0 if n % 2 else -1.0) for n in range(8)]
    found = add_mismatched_answers(rows, 64, seed=3)
    assert [one.answers[0].tolist() for one in found] == [one.answers[0].tolist() for one in rows]
    assert [one.margin for one in found] == [one.margin for one in rows]
    assert all(mine.answers[1][0] // 2 != mine.prompt[0] for mine in found)
    different = [replace(one, prompt=np.array([n])) for n, one in enumerate(rows)]
    others = add_mismatched_answers(different, 64, seed=3)
    assert sorted(one.answers[1][0] for one in others) == list(range(8))
    cut = add_mismatched_answers([replace(one, prompt=np.arange(9) + n) for n, one in enumerate(rows)], 5, seed=0)
    assert cut[0].prompt.tolist() == [6, 7, 8], "cut on the left, so that both answers fit"
    alone = add_mismatched_answers([rows[0]], 64, seed=0, more=rows)
    assert alone[0].answers[1].tolist() == [2, 9], "the first of the others with another question"
    with pytest.raises(DataError, match="loss_type=apo_zero_unpaired"):
        add_mismatched_answers([rows[0], rows[1]], 64, seed=0)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_splitting_a_batch_adds(name: str):
    model, rows = tiny(), label_rows()
    objective = KTOLoss(model, UNPAIRED_LOSSES[name](0.3), undesirable_weight=1.7)
    batch, z = collate(rows), torch.tensor(0.4, dtype=torch.float64)
    whole = objective(own_rows(batch, z))
    parts = [
        replace(collate_preferences([row]), reference_log_probs=batch.reference_log_probs[2 * n : 2 * n + 2])
        for n, row in enumerate(rows)
    ]
    losses = [objective(own_rows(part, z)) for part in parts]
    torch.testing.assert_close(whole.total, sum(one.total for one in losses))
    for metric, (total, count) in whole.metrics.items():
        assert total.item() == pytest.approx(sum(one.metrics[metric][0].item() for one in losses)), metric
        assert count.item() == pytest.approx(sum(one.metrics[metric][1].item() for one in losses)), metric


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_gradients_are_those_of_finite_differences(name: str):
    model = tiny()
    batch = own_rows(collate(label_rows(3)), torch.tensor(0.4, dtype=torch.float64))
    objective = KTOLoss(model, UNPAIRED_LOSSES[name](0.3), desirable_weight=1.5)
    weight = model.blocks[0].mixer.layer.out.weight
    slope = gradients(model, objective(batch).total)[[id(p) for p in model.parameters()].index(id(weight))]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * step)
            values.append(objective(batch).total.item())
            weight.sub_(direction, alpha=sign * step)
    assert (slope * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
@pytest.mark.parametrize("shift", [-60.0, 30.0])
def test_loss_gradients_and_metrics_equal_trl(name: str, shift: float):
    """shift: of the reference's mismatched answers, so that z is above 0 and held at it."""
    from trl import KTOTrainer

    model, rows = tiny(), label_rows()
    batch = collate(rows)
    reference = batch.reference_log_probs.clone()
    reference[batch.rejected] -= shift
    batch = replace(batch, reference_log_probs=reference)
    total, count = gains_with_mismatch(model, [batch])
    z = reference_point([(total, count)]).double() if UNPAIRED_LOSSES[name].needs_kl else torch.zeros(())
    assert (z > 0) == (shift > 0 and name == "kto"), "both cases are there"
    ours = KTOLoss(model, UNPAIRED_LOSSES[name](0.3), desirable_weight=1.5, undesirable_weight=0.7)(own_rows(batch, z))
    logged = defaultdict(lambda: defaultdict(list))
    same = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)
    other = SimpleNamespace(
        model=Answering(model), accelerator=same, calculate_KL=UNPAIRED_LOSSES[name].needs_kl, beta=0.3, loss_type=name,
        desirable_weight=1.5, undesirable_weight=0.7, aux_loss_enabled=False, precompute_ref_logps=True,
        _metrics=logged, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    other._compute_kl_logps = lambda model, inputs: KTOTrainer._compute_kl_logps(other, model, inputs)
    theirs = KTOTrainer._compute_loss(other, other.model, trl_rows(batch), False)
    torch.testing.assert_close(ours.total / ours.count, theirs, atol=1e-7, rtol=1e-7)
    for got, wanted in zip(gradients(model, ours.total / ours.count), gradients(model, theirs), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-7, rtol=1e-6)
    for metric in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"):
        value, number = ours.metrics[metric]
        assert (value / number).item() == pytest.approx(logged["train"][metric][0], rel=1e-6), metric


def trl_rows(batch: PreferenceBatch) -> dict[str, torch.Tensor]:
    """Own answers and mismatched ones as TRL's collator lays them out."""
    learned = (batch.targets != -100).roll(1, dims=1)
    learned[:, 0] = False
    found = {"label": batch.margins > 0}
    for prefix, rows in (("", batch.chosen), ("KL_", batch.rejected)):
        found[f"{prefix}input_ids"] = batch.input_ids[rows]
        found[f"{prefix}attention_mask"] = (batch.position_ids[rows] >= 0).long()
        found[f"{prefix}completion_mask"] = learned[rows].long()
        found[f"ref_{prefix}logps"] = batch.reference_log_probs[rows]
    return found


def test_counts_are_told_and_the_weight_that_balances_them():
    """The paper's interval, 1 to 4/3, and TRL's bounds for the same counts."""
    assert balance_note(40, 40, 1, 1) == "labels: 40 desirable, 40 undesirable answers"
    assert balance_note(10, 30, 1, 1).endswith("desirable_weight=3 to 4")
    assert balance_note(30, 10, 1, 1).endswith("undesirable_weight=2.25 to 3")
    assert balance_note(10, 30, 3.5, 1) == "labels: 10 desirable, 30 undesirable answers"
    assert "one side alone" in balance_note(10, 0, 1, 1)
    assert math.isclose(3.5 * 10 / 30, 7 / 6)
