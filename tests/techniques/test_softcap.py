"""Soft-capping on any model: it bounds, recovers the plain model as the cap grows, and comes before the mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.models.build import build, preset
from llm_quest.techniques.softcap import SoftCap
from tests.laws.subjects import own, random_tokens, randomize_, shared

pytestmark = pytest.mark.filterwarnings("ignore:softcap")
PAGES = ("gpt2-tiny", "llama3.2-tiny", "deepseek-v3-tiny", "qwen3-next-tiny", "mimo-tiny")


@pytest.mark.parametrize("page", PAGES)
def test_a_large_cap_recovers_the_plain_model_and_a_small_one_bounds_it(page: str):
    tokens = random_tokens(shared(page), 2, 11)
    plain = shared(page)(tokens)
    torch.testing.assert_close(SoftCap(1e6, 1e6)(own(page))(tokens), plain, atol=1e-9, rtol=0)
    capped = SoftCap(0.5, 2.0)(own(page))(tokens)
    assert capped.abs().max() < 2.0
    assert (SoftCap(0.5, None)(own(page))(tokens) - plain).abs().max() > 1e-2
    torch.testing.assert_close(SoftCap(None, 2.0)(own(page))(tokens), 2 * torch.tanh(plain / 2))


def test_capped_on_a_gemma_without_caps_it_is_gemma_2():
    config = preset("gemma2-tiny").config
    model = randomize_(build(replace(config, attn_logit_softcapping=None, final_logit_softcapping=None))).double()
    tokens = random_tokens(model, 2, 11)
    torch.testing.assert_close(SoftCap(2.0, 3.0)(model)(tokens), shared("gemma2-tiny")(tokens), atol=1e-12, rtol=0)


def test_the_reason_for_the_slower_form_is_printed():
    with pytest.warns(UserWarning, match="the fused kernel has no cap"):
        SoftCap()(build("gpt2-tiny"))


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="give at least one, above 0"):
        SoftCap(None, None)
    with pytest.raises(UsageError, match="give at least one, above 0"):
        SoftCap(-1.0)
    with pytest.raises(UsageError, match=r"logits are capped at 3.0 already: set final to null"):
        SoftCap()(build("gemma2-tiny"))
    with pytest.raises(UsageError, match=r"scores are capped at 2.0 already: set attention to null"):
        SoftCap(final=None)(build("gemma2-tiny"))
