"""Hyper-connections on a whole decoder, in every form."""

from __future__ import annotations

import pytest
import torch

import llm_quest as quest
from llm_quest.errors import UsageError
from llm_quest.layers.hyper_connections import STREAM_WEIGHTS
from llm_quest.techniques.hyper_connections import HyperConnections
from tests.laws.subjects import own, random_tokens, randomize_, shared


@pytest.mark.parametrize("form", STREAM_WEIGHTS)
@pytest.mark.parametrize("page", ["gpt2-tiny", "gemma3-tiny"])
def test_every_form_is_neutral_at_birth_and_survives_a_save(form: str, page: str, tmp_path):
    tokens = random_tokens(shared(page), 2, 9)
    model = HyperConnections(streams=4, form=form)(own(page))
    torch.testing.assert_close(model(tokens), shared(page)(tokens), atol=1e-9, rtol=0)
    randomize_(model, seed=1)
    again = quest.load(quest.save(model, tmp_path / "model"))
    torch.testing.assert_close(again(tokens), model(tokens), atol=1e-10, rtol=0)
    assert (model(tokens) - shared(page)(tokens)).abs().max() > 1e-2


def test_each_layer_reads_another_stream_and_the_static_weights_do_not_decay():
    model = HyperConnections(streams=3)(own("llama3.2-tiny"))
    sublayers = [sublayer for block in model.blocks for sublayer in (block.mixer, block.feed_forward)]
    assert [sublayer.residual.weights.fixed.inward.argmax().item() for sublayer in sublayers] == [0, 1, 2, 0]
    assert all(p.dim() == 1 for name, p in model.named_parameters() if ".fixed." in name)


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="known: static, dynamic, manifold, lite"):
        HyperConnections(form="mhc")
    with pytest.raises(UsageError, match=r"take 1 to 6 \(it weighs n! permutations"):
        HyperConnections(streams=8, form="lite")
    with pytest.raises(UsageError, match="0 streams"):
        HyperConnections(streams=0)
