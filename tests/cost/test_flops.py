"""The counter of passes against PyTorch's counter on the real model, for every family at several lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from llm_quest.cost.flops import ModelCost, flop_formulas, lagrange
from llm_quest.cost.profile import profile_step
from llm_quest.data.batch import TokenBatch
from llm_quest.models import FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import Scope
from llm_quest.techniques.lora import LoRA

TINY = [one.name for family in FAMILIES for one in family.presets if one.name.endswith("-tiny")]


@torch.no_grad()
def count_real(model: Decoder, length: int, start: int = 0) -> int:
    tokens, cache = torch.zeros(1, start + length, dtype=torch.int64), None
    if start:
        cache = model.new_cache(1, start + length)
        model(tokens[:, :start], Scope.unpadded(tokens[:, :start], cache=cache))
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        model(tokens[:, start:], Scope.unpadded(tokens[:, start:], cache=cache, start=start))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TINY)
def test_every_pass_costs_what_is_counted_on_the_model_itself(name: str):
    model = build(name)
    cost, longest = ModelCost(model), model.config.max_position_embeddings
    shortest = {1} if TINY.index(name) % 3 == 0 else set()  # counted, as the longest is; 33 and 40 on a polynomial
    for length in shortest | {33, longest}:
        assert cost.forward(length) == count_real(model, length), f"a row of {length} tokens"
    for place in shortest | {40}:
        assert cost.decoding(place, 2) == count_real(model, 1, start=place), f"a cached token at {place}"


def test_beyond_its_window_attention_grows_with_the_tokens_alone():
    config = dataclasses.replace(
        preset("gemma3-tiny").config, num_hidden_layers=6, sliding_window=128, max_position_embeddings=4096,
        layer_types=("sliding_attention",) * 5 + ("full_attention",),
    )  # fmt: skip
    model = build(config)
    assert ModelCost(model).forward(2048) == count_real(model, 2048)


def test_a_cached_step_of_latent_attention_is_absorbed():
    config = dataclasses.replace(
        preset("deepseek-v3-tiny").config, num_nextn_predict_layers=0, kv_lora_rank=64, max_position_embeddings=2048
    )
    model = build(config)
    assert ModelCost(model).decoding(1024, 2) == count_real(model, 1, start=1024)


def test_techniques_are_counted_with_the_model():
    plain, model = build("llama3.2-tiny"), LoRA(rank=4)(build("llama3.2-tiny"))
    assert ModelCost(model).forward(33) == count_real(model, 33) > ModelCost(plain).forward(33)


@pytest.mark.parametrize("name", ["mixtral-tiny", "qwen3-moe-tiny"])
def test_the_gradients_of_experts_are_counted(name: str):
    """Backward is twice the forward pass: two products for each one."""
    objective, tokens = NextTokenLoss(build(name).train()), torch.zeros(2, 17, dtype=torch.int64)
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:])
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        loss = objective(batch)
        forward = counter.get_total_flops()
        loss.total.backward()
    assert counter.get_total_flops() == 3 * forward


def test_experts_of_a_width_that_the_grouped_kernel_refuses_are_counted():
    """Their loop has shapes that follow from values, which a count without memory does not have."""
    config = dataclasses.replace(preset("mixtral-tiny").config, intermediate_size=44)
    model, tokens = build(config).train(), torch.randint(0, config.vocab_size, (2, 34))
    assert ModelCost(model).forward(33) == count_real(model, 33)
    objective, batch = NextTokenLoss(model), TokenBatch(tokens[:, :-1], tokens[:, 1:])
    profile = profile_step(objective, batch, None, bf16=False, mode=FakeTensorMode())
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        objective(batch).total.backward()
    assert profile.flops == counter.get_total_flops()


def test_products_with_weights_are_two_operations_a_weight():
    model = build("llama3.2-tiny")
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert ModelCost(model).count_pass(10)[0] == 10 * 2 * matrices, "the tied embedding is a product once, as the head"


def test_decoding_begins_with_the_second_token():
    cost = ModelCost(build("llama3.2-tiny"))
    assert cost.decoding(5, 0) == cost.decoding(5, 1) == 0, "the first token comes out of the prompt's pass"
    assert cost.decoding(5, 3) == cost.decoding(5, 2) + cost.decoding(6, 2)
    assert cost.training(9) == 3 * cost.forward(9)


def test_a_published_size_is_counted_without_memory():
    cost = ModelCost.from_config(preset("deepseek-v3").config)
    assert cost.block_counts == (3, 58)
    linear, _ = cost.count_pass(512)
    assert linear / 512 == pytest.approx(2 * 37e9, rel=0.02), "37 G parameters act on each token"


def test_a_polynomial_through_points():
    assert lagrange([(1, 3), (2, 7), (4, 21)], 3) == 13
