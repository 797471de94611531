"""The policy-gradient objective: aggregation, corrections and whole gradients on a policy small enough to work by hand
(alignment.md 1.6, 1.13, 1.14), and its laws on a real model."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from llm_quest.data.policy_batch import PolicyBatch, PolicyRow, collate_policy_rows, empty_row, micro_batches
from llm_quest.errors import UsageError
from llm_quest.models.build import build, preset
from llm_quest.objectives.kl_penalty import KLPenalty
from llm_quest.objectives.policy_gradient import ImportanceSamplingCorrection, PolicyGradientLoss
from llm_quest.objectives.surrogates import (
    POLICY_VARIANTS,
    CISPOSurrogate,
    ClippedSurrogate,
    SurrogateInputs,
    UnclippedSurrogate,
    sequence_ratio,
)

D = torch.float64


def objective(surrogate=None, **options) -> PolicyGradientLoss:
    return PolicyGradientLoss(nn.Identity(), surrogate or UnclippedSurrogate(), **options)


def pad_with(rows: list[list[float]], nothing: float = 0.0) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [nothing] * (width - len(row)) for row in rows], dtype=D)


def batch_of(learn: list[list[float]], **values: Tensor) -> PolicyBatch:
    """learn: ones where something is learned, ragged."""
    mask = pad_with(learn) > 0
    zeros = torch.zeros(mask.shape, dtype=D)
    given = {"advantages": zeros, "sampler_log_probs": zeros} | values
    return PolicyBatch(mask.long(), torch.where(mask, 0, -100), **given)


def rows_of_ones(*lengths: int) -> list[list[float]]:
    return [[1.0] * n for n in lengths]


# ------------------------------------------------------------------------------------------ aggregation


class Given:
    """A surrogate whose per-token loss is given."""

    def __init__(self, losses: Tensor):
        self.losses = losses

    def __call__(self, terms: SurrogateInputs) -> tuple[Tensor, Tensor]:
        return -self.losses + 0 * terms.log_p, torch.zeros_like(terms.loss_mask)


LOSSES = [[1.0, 3.0], [0.5, 0.5, 0.5, 2.5]]


def aggregate(count: str, rows: slice = slice(None), **options) -> tuple[float, float, Tensor]:
    losses = pad_with(LOSSES)[rows]
    log_p = torch.zeros_like(losses, requires_grad=True)
    batch = batch_of([[1.0] * len(row) + [0.0] * (4 - len(row)) for row in LOSSES[rows]])
    found = objective(Given(losses), count=count, **options).loss(log_p, batch)
    return found.total.item(), found.count.item(), losses


@pytest.mark.parametrize(
    ("count", "options", "mean"),
    [
        ("sequences", {}, 1.5),
        ("tokens", {}, 8 / 6),
        ("horizon", {"horizon": 8}, 0.5),
        ("sums", {}, 4.0),
    ],
)
def test_four_denominators_over_the_same_losses(count, options, mean):
    total, number, _ = aggregate(count, **options)
    assert total / number == pytest.approx(mean, abs=1e-6)
    parts = [aggregate(count, slice(i, i + 1), **options) for i in range(2)]
    assert sum(part[0] for part in parts) / sum(part[1] for part in parts) == pytest.approx(mean, abs=1e-6)


def test_a_sequence_that_is_left_out_leaves_both_sides_of_the_fraction():
    """The second sequence masked as truncated: 2.0. Counting its tokens below the line gives 0.67 (TRL #6369)."""
    log_p = torch.zeros(2, 4, dtype=D, requires_grad=True)
    batch = batch_of([[1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for count in ("tokens", "sequences"):
        found = objective(Given(pad_with(LOSSES)), count=count).loss(log_p, batch)
        assert found.total.item() / found.count.item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("count", "options", "weights"),
    [
        ("sequences", {}, (1 / 4, 1 / 8)),
        ("tokens", {}, (1 / 6, 1 / 6)),
        ("horizon", {"horizon": 8}, (1 / 16, 1 / 16)),
    ],
)
def test_what_one_token_weighs(count, options, weights):
    log_p = torch.zeros(2, 4, dtype=D, requires_grad=True)
    batch = batch_of(rows_of_ones(2, 4), advantages=torch.ones(2, 4, dtype=D))
    found = objective(count=count, **options).loss(log_p, batch)
    (slope,) = torch.autograd.grad(found.total / found.count, log_p)
    torch.testing.assert_close(slope, -pad_with([[weights[0]] * 2, [weights[1]] * 4]), atol=1e-7, rtol=0)


# ------------------------------------------------------------------------------------------ corrections

OLD, SAMPLED = [[-1.0, -2.0, -0.5]], [[-1.2, -3.0, -0.4]]


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (ImportanceSamplingCorrection(2.0), [1.221403, 2, 0.904837]),
        (ImportanceSamplingCorrection(2.0, "mask"), [1.221403, 0, 0.904837]),
        (ImportanceSamplingCorrection(10.0, level="sequence"), [3.004166] * 3),
        (ImportanceSamplingCorrection(3.0, "mask", "sequence"), [0.0] * 3),
        (ImportanceSamplingCorrection(3.0, "mask", "geometric"), [1.442917] * 3),
    ],
)
def test_importance_corrections(correction, weights):
    log_p = torch.tensor(OLD, dtype=D, requires_grad=True)
    batch = batch_of(
        rows_of_ones(3),
        advantages=torch.ones(1, 3, dtype=D),
        old_log_probs=pad_with(OLD),
        sampler_log_probs=pad_with(SAMPLED),
    )
    found = objective(count="tokens", correction=correction).loss(log_p, batch)
    (slope,) = torch.autograd.grad(-found.total, log_p)
    torch.testing.assert_close(slope, torch.tensor([weights], dtype=D), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("new", "A", "kept"),
    [([-1.0, -1.2, -0.6], -1.0, False), ([-0.5, -0.6, -0.5], -1.0, True), ([-1.0, -1.2, -0.6], 0.0, True)],
)
def test_a_stale_sequence_of_negative_advantage_is_left_alone(new, A, kept):
    old = pad_with([[-0.2, -0.4, -0.3]])
    log_p = torch.tensor([new], dtype=D, requires_grad=True)
    batch = batch_of(rows_of_ones(3), advantages=torch.full((1, 3), A, dtype=D), sampler_log_probs=old)
    found = objective(Given(torch.ones(1, 3, dtype=D)), count="tokens", off_policy_delta=0.5).loss(log_p, batch)
    assert (found.total.item(), found.count.item()) == pytest.approx((3.0 if kept else 0.0, 3.0))


# ------------------------------------------------------------------------------------------ whole gradients

OUTPUTS = [[0, 2], [2, 2, 1], [1, 0]]
STD, MEAN = [1.154701, -0.577350, -0.577350], [0.666667, -0.333333, -0.333333]


def loss_and_gradient(z: list[float], A: list[float], surrogate, count: str, **options) -> tuple[float, list[float]]:
    """Loss and its gradient in the logits of a policy over three symbols that sees nothing."""
    logits = torch.tensor(z, dtype=D, requires_grad=True)
    old, reference = (torch.tensor(t, dtype=D).log_softmax(0) for t in ([0.0, 0, 0], [0.1, 0, -0.1]))
    symbols = pad_with(OUTPUTS).long()
    learn = rows_of_ones(2, 3, 2)
    batch = batch_of(
        learn,
        advantages=torch.tensor(A, dtype=D)[:, None].expand(3, 3),
        sampler_log_probs=old[symbols],
        reference_log_probs=reference[symbols],
    )
    found = objective(surrogate, count=count, **options).loss(logits.log_softmax(0)[symbols], batch)
    loss = found.total / found.count
    return loss.item(), torch.autograd.grad(loss, logits)[0].tolist()


CLIP = ClippedSurrogate(0.1, 0.15)
SAPO = POLICY_VARIANTS["sapo"].surrogate


@pytest.mark.parametrize(
    ("A", "surrogate", "count", "options", "value", "gradient"),
    [
        (STD, CLIP, "sequences", {}, 0.012904, [0.068269, 0.119197, -0.187465]),
        (STD, CLIP, "sequences", {"kl": KLPenalty(0.1)}, 0.013280, [0.071913, 0.119553, -0.191466]),
        (STD, CLIP, "tokens", {}, 0.087677, [0.047616, 0.120375, -0.167991]),
        (MEAN, CLIP, "horizon", {"horizon": 4}, 0.029529, [0.016037, 0.040541, -0.056577]),
        (
            STD,
            ClippedSurrogate(0.02, 0.02, importance_ratio=sequence_ratio),
            "sequences",
            {},
            0.018665,
            [-0.016695, 0.160839, -0.144144],
        ),
        (
            STD,
            ClippedSurrogate(0.1, 0.15, importance_ratio=sequence_ratio),
            "sequences",
            {},
            0.003269,
            [-0.016695, 0.160839, -0.144144],
        ),
        (STD, SAPO, "sequences", {}, -0.046173, [-0.111639, 0.160911, -0.049272]),
        (STD, CISPOSurrogate(1.1), "tokens", {}, -0.098261, [-0.119674, 0.139079, -0.019404]),
        (STD, UnclippedSurrogate(), "sequences", {}, -0.009548, [-0.112142, 0.161399, -0.049257]),
        (STD, UnclippedSurrogate(), "tokens", {}, 0.063370, [-0.124869, 0.141935, -0.017066]),
    ],
)
def test_off_policy_losses_and_gradients(A, surrogate, count, options, value, gradient):
    loss, slope = loss_and_gradient([0.2, 0, -0.2], A, surrogate, count, **options)
    assert loss == pytest.approx(value, abs=1.5e-6)
    assert slope == pytest.approx(gradient, abs=1.5e-6)


@pytest.mark.parametrize(
    ("A", "surrogate", "count", "options", "value", "gradient"),
    [
        (STD, CLIP, "sequences", {}, 0.0, [-0.096225, 0.160375, -0.064150]),
        (
            STD,
            ClippedSurrogate(0.02, 0.02, importance_ratio=sequence_ratio),
            "sequences",
            {},
            0.0,
            [-0.096225, 0.160375, -0.064150],
        ),
        (STD, SAPO, "sequences", {}, -0.036657, [-0.096225, 0.160375, -0.064150]),
        (STD, CLIP, "tokens", {}, 0.082479, [-0.109971, 0.137464, -0.027493]),
        (STD, CISPOSurrogate(1.1), "tokens", {}, -0.090612, [-0.109971, 0.137464, -0.027493]),
        (MEAN, CLIP, "horizon", {"horizon": 4}, 0.027778, [-0.037037, 0.046296, -0.009259]),
    ],
)
def test_on_policy_gradients_are_equal_within_each_aggregation(A, surrogate, count, options, value, gradient):
    loss, slope = loss_and_gradient([0, 0, 0], A, surrogate, count, **options)
    assert loss == pytest.approx(value, abs=1.5e-6)
    assert slope == pytest.approx(gradient, abs=1.5e-6)


# ------------------------------------------------------------------------------------------ laws on a model


def rows(seed: int = 0, more: bool = False) -> list[PolicyRow]:
    """Ragged prompts and completions with made-up numbers."""
    g = torch.Generator().manual_seed(seed)

    def numbers(n: int, low: float, high: float):
        return (low + (high - low) * torch.rand(n, generator=g)).numpy()

    found = []
    for prompt, length in ((3, 5), (6, 1), (2, 9), (4, 4), (3, 7)):
        ids = torch.randint(1, 90, (prompt + length,), generator=g).tolist()
        old, reference = (numbers(length, -5.5, -4.0) for _ in range(2)) if more else (None, None)
        found.append(
            PolicyRow(
                tuple(ids[:prompt]),
                tuple(ids[prompt:]),
                numbers(1, -1, 1).repeat(length),
                numbers(length, -5.5, -4.0),
                old,
                reference,
            )
        )
    return found


def gradients(made: PolicyGradientLoss, batches: list[PolicyBatch]) -> tuple[float, list[Tensor]]:
    made.model.zero_grad()
    found = [made(batch) for batch in batches]
    count = sum(float(loss.count) for loss in found)
    for loss in found:
        (loss.total / count).backward()
    return sum(float(loss.total.detach()) for loss in found) / count, [p.grad.clone() for p in made.model.parameters()]


@pytest.mark.parametrize("name", POLICY_VARIANTS)
def test_the_split_into_micro_batches_changes_nothing(name):
    variant = POLICY_VARIANTS[name]
    made = PolicyGradientLoss(
        build("llama3.2-tiny").double(),
        variant.surrogate,
        count=variant.count,
        horizon=12 if variant.count == "horizon" else None,
        kl=KLPenalty(0.1, "unbiased"),
        entropy_coef=0.01,
        temperature=0.8,
    )
    loss, whole_gradients = gradients(made, [collate_policy_rows(rows(more=True))])
    for budget in (1, 16):
        batches = micro_batches(rows(more=True), budget)
        assert len(batches) > 1
        split_loss, split_gradients = gradients(made, batches)
        assert split_loss == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(split_gradients, whole_gradients, atol=1e-7, rtol=1e-6)


def test_padding_columns_and_the_order_of_rows_change_nothing():
    made = PolicyGradientLoss(build("gpt2-tiny").double(), count="tokens")
    loss, found = gradients(made, [collate_policy_rows(rows())])
    long = PolicyRow((1,) * 20, (5,), rows()[0].advantages[:1] * 0, rows()[0].sampler_log_probs[:1])
    wide, alone = collate_policy_rows([*rows(), long]), collate_policy_rows(rows()[::-1])
    ignored = wide.targets.clone()
    ignored[-1] = -100
    other, padded_gradients = gradients(made, [dataclasses.replace(wide, targets=ignored)])
    assert other == pytest.approx(loss, abs=1e-9)
    torch.testing.assert_close(padded_gradients, found, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(gradients(made, [alone])[1], found, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", POLICY_VARIANTS)
def test_gradients_are_those_of_finite_differences(name):
    variant = POLICY_VARIANTS[name]
    made = objective(
        variant.surrogate,
        count=variant.count,
        horizon=9 if variant.count == "horizon" else None,
        kl=KLPenalty(0.05, "k2"),
    )
    g = torch.Generator().manual_seed(1)
    sampled = -torch.rand(2, 4, generator=g, dtype=D)
    reference = -torch.rand(2, 4, generator=g, dtype=D)
    A = torch.tensor([[1.0], [-0.5]], dtype=D).expand(2, 4)
    batch = batch_of(rows_of_ones(2, 4), advantages=A, sampler_log_probs=sampled, reference_log_probs=reference)
    log_p = (sampled + 1e-4 * torch.randn(2, 4, generator=g, dtype=D)).requires_grad_()
    if name in ("cispo", "gspo_token"):  # what they hold back is held back by a stop-gradient
        log_p = sampled.clone().requires_grad_()
        loss = made.loss(log_p, batch)
        (slope,) = torch.autograd.grad(loss.total, log_p)
        plain = objective(count=variant.count, kl=KLPenalty(0.05, "k2")).loss(log_p, batch)
        torch.testing.assert_close(slope, torch.autograd.grad(plain.total, log_p)[0])
        return
    assert torch.autograd.gradcheck(lambda x: made.loss(x, batch).total, (log_p,), eps=1e-7, atol=1e-5)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
    model = build("llama3.2-tiny").double()
    batch = collate_policy_rows(
        [PolicyRow((1, 2), (3, 4, 5), rows()[2].advantages[:3] * 0, rows()[2].sampler_log_probs[:3])]
    )
    made = PolicyGradientLoss(model, count="tokens", entropy_coef=1.0, temperature=0.7)
    loss = made(batch)
    logits = model(batch.input_ids)[0, 1:4] / 0.7
    p = logits.softmax(-1)
    wanted = -(p * p.log()).sum()
    torch.testing.assert_close(-loss.total, wanted, atol=1e-6, rtol=0)
    got, expected = (torch.autograd.grad(x, list(model.parameters())) for x in (-loss.total, wanted))
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-6)
    assert float(loss.metrics["entropy_exact"][0]) == pytest.approx(wanted.item())


def test_nothing_to_learn_is_a_zero_that_can_go_backward():
    made = PolicyGradientLoss(build("llama3.2-tiny"), kl=KLPenalty(0.1))
    loss = made(collate_policy_rows([empty_row("old_log_probs", "reference_log_probs")], {"reward": (3.0, 4.0)}))
    loss.total.backward()
    assert all(p.grad is not None for p in made.parameters()), "several processes wait for every gradient"
    assert (loss.total.item(), loss.count.item()) == (0, 0)
    assert [float(x) for x in loss.metrics["reward"]] == [3, 4]


def test_dropout_is_off():
    model = build(dataclasses.replace(preset("gpt2-tiny").config, dropout=0.5)).train()
    made = PolicyGradientLoss(model)
    one, two = (float(made(collate_policy_rows(rows())).total) for _ in range(2))
    assert one == two


def test_the_largest_and_smallest_ratio_are_remembered_before_clipping():
    log_p = torch.tensor([[2.0, -3.0, 9.0]], dtype=D)
    made = objective(ClippedSurrogate())
    made.loss(log_p, batch_of([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(made.ratio_range, torch.tensor([-3.0, 2.0], dtype=D).exp())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"count": "words"}, "known"),
        ({"count": "horizon"}, "needs horizon"),
        ({"count": "tokens", "horizon": 9}, "no effect"),
        ({"entropy_coef": -1.0}, "at least 0"),
        ({"temperature": 0.0}, "above 0"),
    ],
)
def test_options_without_sense_are_refused(options, told):
    with pytest.raises(UsageError, match=told):
        objective(**options)


def test_what_a_batch_lacks_is_said():
    log_p, batch = torch.zeros(1, 2, dtype=D), batch_of(rows_of_ones(2))
    with pytest.raises(UsageError, match="reference"):
        objective(kl=KLPenalty(0.1)).loss(log_p, batch)
    with pytest.raises(UsageError, match="no effect"):
        objective(correction=ImportanceSamplingCorrection()).loss(log_p, batch)
    with pytest.raises(UsageError, match="known"):
        ImportanceSamplingCorrection(mode="drop")


@pytest.mark.parametrize(
    ("low", "high"),
    [({"epsilon_low": 0.1}, {}), ({"epsilon_high": 0.1}, {}), ({"dual": 1.5}, {}), ({"delta": 2.0}, {})],
)
def test_every_option_of_clipping_changes_the_loss(low, high):
    log_p = torch.tensor([[-1.0, 1.0, 0.15, -0.15]], dtype=D)
    for A in (1.0, -1.0):
        batch = batch_of(rows_of_ones(4), advantages=torch.full((1, 4), A, dtype=D))
        one, other = (objective(ClippedSurrogate(**x)).loss(log_p, batch).total.item() for x in (low, high))
        if one != other:
            return
    pytest.fail(f"{low} changed nothing")
