"""What is drawn from, against a definition spelled out token by token in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.sampling import SamplingParams, inverse_cdf, row_uniforms

FILTERS = list(product((None, 1, 3, 8), (None, 0.3, 0.8, 1.0), (None, 0.0, 0.2, 0.6), (0.5, 1.0, 3.0)))


def normalize(weights: dict[int, float]) -> dict[int, float]:
    return {token: weight / math.fsum(weights.values()) for token, weight in weights.items()}


def by_hand(logits: list[float], sampling: SamplingParams) -> dict[int, float]:
    """The distribution as the docstring tells it: every filter renormalizes before the next one looks."""
    top = max(logits)
    p = normalize({token: math.exp((x - top) / sampling.temperature) for token, x in enumerate(logits)})
    ranked = sorted(p, key=lambda token: -p[token])
    p = normalize({token: p[token] for token in ranked[: sampling.top_k]})
    if sampling.top_p is not None:
        kept, mass = {}, 0.0
        for token in p:
            if mass < sampling.top_p:
                kept[token] = p[token]
            mass += p[token]
        p = normalize(kept)
    if sampling.min_p is not None:
        p = normalize({token: mass for token, mass in p.items() if mass >= sampling.min_p * max(p.values())})
    return p


def probabilities(sampling: SamplingParams, logits: Tensor) -> dict[int, float]:
    p = sampling.log_probs(logits).exp().tolist()
    return {token: mass for token, mass in enumerate(p) if mass > 0}


@pytest.mark.parametrize(("top_k", "top_p", "min_p", "temperature"), FILTERS)
def test_every_combination_equals_the_definition(top_k, top_p, min_p, temperature, generator):
    logits = torch.randn(12, generator=generator) * 2
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = by_hand(logits.double().tolist(), sampling)
    assert probabilities(sampling, logits) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("top_k", "top_p", "min_p", "temperature"), FILTERS)
def test_a_filter_only_narrows_what_the_others_leave(top_k, top_p, min_p, temperature, generator):
    logits = torch.randn(40, generator=generator)
    choices = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    kept = set(probabilities(SamplingParams(temperature=temperature, **choices), logits))
    assert kept
    for name in choices:
        looser = SamplingParams(temperature=temperature, **(choices | {name: None}))
        assert kept <= set(probabilities(looser, logits))


def test_the_nucleus_is_measured_on_what_top_k_has_left():
    """B46: of 0.3 0.3 0.1 ..., top-k 3 leaves 3/7 3/7 1/7; two of them reach 0.8, where the old mass of three is only
    0.7."""
    logits = torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1, 0.1]).log()
    assert probabilities(SamplingParams(top_k=3, top_p=0.8), logits) == pytest.approx({0: 0.5, 1: 0.5})


def test_min_p_does_not_widen_top_k():
    """B46: top_k=1 is one token, whatever min-p would allow."""
    assert probabilities(SamplingParams(top_k=1, min_p=0.01), torch.tensor([1.0, 0.9, 0.8])) == {0: 1.0}


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    assert probabilities(SamplingParams(top_p=0.6), logits) == pytest.approx({0: 0.625, 1: 0.375})
    assert probabilities(SamplingParams(top_p=0.01), logits) == {0: 1.0}


def test_top_k_keeps_exactly_k_also_among_equals():
    assert len(probabilities(SamplingParams(top_k=2), torch.zeros(5))) == 2


def test_temperature_zero_is_one_token():
    assert probabilities(SamplingParams(temperature=0), torch.tensor([0.1, 0.3, 0.2])) == {1: 1.0}


def test_a_tiny_temperature_is_the_greedy_limit_without_overflow():
    p = SamplingParams(temperature=1e-8).log_probs(torch.tensor([50.0, 100.0, -100.0]))
    assert p.exp().tolist() == [0.0, 1.0, 0.0]


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits, seen = torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[True, True, False]])
    p = SamplingParams(repetition_penalty=2.0).log_probs(logits, seen)
    assert torch.equal(p, torch.tensor([[1.0, -2.0, 3.0]]).log_softmax(-1))


def test_the_distribution_is_float32_and_has_a_gradient():
    logits = torch.randn(3, 7, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = SamplingParams(top_k=4, top_p=0.9, temperature=0.7).log_probs(logits)
    p.max(dim=-1).values.sum().backward()
    assert p.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(top_k=5, temperature=2.0), SamplingParams(top_p=0.7, min_p=0.05)]
)
def test_draws_follow_the_distribution_and_report_its_log_probabilities(sampling, generator):
    logits = torch.randn(1, 9, generator=generator)
    many = 20_000
    tokens, logprobs = sampling.sample(logits.expand(many, -1), torch.rand(many, generator=generator))
    p = sampling.log_probs(logits)[0]
    assert torch.allclose(logprobs, p[tokens], atol=1e-6)
    frequency = tokens.bincount(minlength=9) / many
    assert (frequency - p.exp()).abs().max() < 0.015  # four standard deviations


def test_greedy_reports_the_softmax_of_the_model():
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    tokens, logprobs = SamplingParams(temperature=0, top_k=1).sample(logits, torch.zeros(1))
    assert tokens.tolist() == [1]
    assert torch.allclose(logprobs, logits.log_softmax(-1)[:, 1])


def test_a_token_of_weight_zero_is_never_chosen_at_either_end():
    weights = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]])
    ends = torch.tensor([0.0, 1 / 3 - 1e-6, 1 / 3 + 1e-6, 1 - 2**-24])
    assert inverse_cdf(weights.expand(4, -1), ends)[:, 0].tolist() == [1, 1, 3, 3]


@given(st.integers(1, 300), st.integers(0, 2**31))
def test_the_last_random_number_below_one_stays_inside(size, seed):
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(seed)) ** 8
    assert 0 <= inverse_cdf(weights, torch.tensor([1 - 2**-24])).item() < size


def test_a_row_has_its_own_random_numbers_in_any_company():
    alone = row_uniforms([[5, 6]], 1, 4, seed=7)
    together = row_uniforms([[1], [5, 6], [5, 6]], 2, 4, seed=7)
    assert torch.equal(together[2], alone[0])
    assert len({tuple(row.tolist()) for row in together}) == 6
    assert torch.equal(row_uniforms([[5, 6]], 1, 9, seed=7)[:, :4], alone)
    assert not torch.equal(row_uniforms([[5, 6]], 1, 4, seed=8), alone)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e-300}, "at least 1e-08"),
        ({"top_k": 0}, "None to keep every token"),
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_p": 1.2}, "top_p is 1.2"),
        ({"min_p": 1.5}, "from 0 to 1"),
        ({"repetition_penalty": 0.0}, "1 is no penalty"),
    ],
)
def test_a_wrong_number_is_named(choice, words):
    with pytest.raises(UsageError, match=words):
        SamplingParams(**choice)


def test_transformers_processors_agree_where_they_mean_the_same(generator):
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(4, 60, generator=generator) * 3
    history = torch.randint(0, 60, (4, 8), generator=generator)
    seen = torch.zeros(4, 60, dtype=torch.bool).scatter(1, history, True)
    scores = transformers.RepetitionPenaltyLogitsProcessor(1.4)(history, logits.clone())
    for warp in (
        transformers.TemperatureLogitsWarper(0.8),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.05),
    ):
        scores = warp(history, scores)
    ours = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.4).log_probs(
        logits, seen
    )
    assert torch.allclose(ours, scores.log_softmax(-1), atol=1e-5)
