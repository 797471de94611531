"""The three forms of the cross-entropy are one function, in value and in gradient."""

import pytest
import torch

from llm_quest.objectives.cross_entropy import (
    CROSS_ENTROPY_FORMS,
    MAX_FULL_LOGITS_BYTES,
    choose_form,
    linear_cross_entropy,
)


def example(rows=700, width=24, vocab=331, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype) / width**0.5
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[::7] = -100
    return x.requires_grad_(), weight.requires_grad_(), targets


def value_and_gradients(form, x, weight, targets, upstream=1.0, cap=None):
    total = CROSS_ENTROPY_FORMS[form](x, weight, targets, cap)
    return total.detach(), *torch.autograd.grad(total * upstream, (x, weight))


def test_full_form_is_the_formula_worked_by_hand():
    x, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    by_hand = torch.log(1 + torch.e ** torch.tensor(2.0) + 1) - 2 + torch.log(2 + torch.e ** torch.tensor(3.0)) - 0
    assert linear_cross_entropy(x, weight, torch.tensor([1, 0]), "full").item() == pytest.approx(
        by_hand.item(), rel=1e-6
    )


@pytest.mark.parametrize("form", ["chunked", "fused"])
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_every_form_equals_the_definition_in_value_and_gradient(form, upstream):
    x, weight, targets = example(dtype=torch.float32)
    for got, expected in zip(
        value_and_gradients(form, x, weight, targets, upstream),
        value_and_gradients("full", x, weight, targets, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_chunked_gradient_is_exact_in_float64_up_to_float32_logs():
    x, weight, targets = example()
    torch.testing.assert_close(
        value_and_gradients("chunked", x, weight, targets)[1],
        value_and_gradients(
            "full", x.float().detach().requires_grad_(), weight.float().detach().requires_grad_(), targets
        )[1].double(),
        atol=1e-5,
        rtol=1e-5,
    )


def test_an_ignored_row_has_no_gradient_and_adds_nothing():
    x, weight, targets = example(dtype=torch.float32)
    total, dx, _ = value_and_gradients("chunked", x, weight, targets)
    assert dx[targets == -100].abs().max() == 0
    kept = targets != -100
    torch.testing.assert_close(
        total, CROSS_ENTROPY_FORMS["full"](x[kept], weight, targets[kept]).detach(), rtol=1e-6, atol=1e-4
    )


def test_all_rows_ignored_is_zero_and_not_nan():
    x, weight, targets = example(dtype=torch.float32)
    total, dx, dw = value_and_gradients("chunked", x, weight, torch.full_like(targets, -100))
    assert total == 0
    assert dx.abs().max() == 0
    assert dw.abs().max() == 0


def test_a_frozen_head_costs_no_gradient_of_its_own():
    x, weight, targets = example(dtype=torch.float32)
    total = CROSS_ENTROPY_FORMS["chunked"](x, weight.detach(), targets)
    expected = torch.autograd.grad(CROSS_ENTROPY_FORMS["full"](x, weight.detach(), targets), x)[0]
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], expected, atol=1e-5, rtol=1e-5)


def test_under_bfloat16_autocast_chunked_and_full_agree_to_bfloat16():
    x, weight, targets = example(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients("chunked", x, weight, targets)
        expected = value_and_gradients("full", x, weight, targets)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 0.01


def test_auto_keeps_small_logits_whole_and_cuts_large_ones():
    assert choose_form(torch.empty(64, 8), torch.empty(1000, 8)) == "full"
    rows = MAX_FULL_LOGITS_BYTES // (4 * 1000) + 1
    assert choose_form(torch.empty(rows, 8), torch.empty(1000, 8)) == "chunked"


def test_capped_logits_have_the_same_gradient_in_pieces():
    x, weight, targets = example(dtype=torch.float32)
    for got, expected in zip(
        value_and_gradients("chunked", x, weight, targets, cap=0.7),
        value_and_gradients("full", x, weight, targets, cap=0.7),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_the_fused_form_refuses_a_cap_rather_than_forget_it():
    with pytest.raises(ValueError, match="knows no cap"):
        value_and_gradients("fused", *example(dtype=torch.float32), cap=5.0)
