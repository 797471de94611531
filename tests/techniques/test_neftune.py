"""NEFTune: the size of the noise by hand, its document's own length, and transformers on rows without padding."""

from __future__ import annotations

import math

import pytest
import torch

from llm_quest.errors import UsageError
from llm_quest.models.build import build
from llm_quest.scope import Scope
from llm_quest.techniques.neftune import EmbeddingNoise, NEFTune, document_lengths
from tests.recipes.tuned import base, start_run, write_rows


def noise(scope: Scope, dim: int, alpha: float = 5.0) -> torch.Tensor:
    """What is added to zeros."""
    embed = torch.nn.Identity().train()
    torch.manual_seed(0)
    return EmbeddingNoise(alpha)(embed, (None, scope, None), torch.zeros(*scope.position_ids.shape, dim))


def test_lengths_are_of_the_document_without_padding():
    positions = torch.tensor([[-1, 0, 1, 2, -1], [0, 1, 0, 1, 2]])
    assert document_lengths(Scope(positions)).tolist() == [[3] * 5, [5] * 5]
    segments = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    assert document_lengths(Scope(positions, segment_ids=segments)).tolist() == [[3] * 5, [2, 2, 3, 3, 3]]


def test_noise_is_uniform_and_bounded_by_alpha_over_the_root_of_length_and_width():
    """4 tokens of 100 dimensions: 5 / sqrt(400) = 0.25; the norm over the document is near 5 / sqrt(3)."""
    found = noise(Scope(torch.arange(4)[None].expand(500, -1)), 100)
    assert 0.249 < found.abs().max() <= 0.25
    assert found.mean().abs() < 1e-3
    assert found.flatten(1).norm(dim=1).mean().item() == pytest.approx(5 / math.sqrt(3), rel=0.01)


def test_a_texts_noise_does_not_depend_on_the_texts_beside_it():
    """Of one token among nine columns the bound is 5 / sqrt(1 * 100), as if it were alone."""
    positions = torch.full((200, 9), -1)
    positions[:, 0] = 0
    assert 0.49 < noise(Scope(positions), 100)[:, 0].abs().max() <= 0.5


def test_rows_without_padding_have_the_noise_of_transformers():
    from transformers.integrations.neftune import neftune_post_forward_hook

    module = torch.nn.Identity().train()
    module.neftune_noise_alpha = 5.0
    torch.manual_seed(0)
    theirs = neftune_post_forward_hook(module, None, torch.zeros(50, 8, 16))
    ours = noise(Scope(torch.arange(8)[None].expand(50, -1)), 16)
    torch.testing.assert_close(ours, theirs)


def test_evaluation_is_without_noise_and_training_is_not():
    model = NEFTune(5.0)(build("llama3.2-tiny", seed=0))
    tokens = torch.arange(12).reshape(2, 6)
    quiet = build("llama3.2-tiny", seed=0).eval()(tokens)
    torch.testing.assert_close(model.eval()(tokens), quiet)
    assert (model.train()(tokens) - quiet).abs().max() > 1e-3


def test_noise_below_0_and_models_without_tokens_are_refused():
    with pytest.raises(UsageError, match="noise_alpha is 0"):
        NEFTune(0.0)
    with pytest.raises(UsageError, match="take a language model"):
        NEFTune()(torch.nn.Linear(2, 2))


WORDS = ("red", "blue", "cat", "dog")


def test_a_run_of_sft_takes_it_and_recipes_that_score_in_evaluation_mode_refuse_it(tmp_path):
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"prompt": f"say {w} {v}", "completion": w, "chosen": w, "rejected": v}
            for w in WORDS
            for v in WORDS
            if v != w
        ],
    )
    options = [f"model.load={base(tmp_path / 'model')}", f"data.source={rows}", "max_steps=2"]
    text = "recipe: {}\nbatch_size: 2\nsequence_length: 40\neval_steps: 0\n"
    losses = {}
    for techniques in ("[]", "[neftune]", "[{name: neftune, noise_alpha: 50}]"):
        out = tmp_path / techniques
        outcome = start_run(
            "sft", text.format("sft"), out, *options, f"techniques={techniques}", "samples.every_steps=0"
        )
        losses[techniques] = outcome.metrics["loss"]
    assert len(set(losses.values())) == 3
    for recipe in ("dpo", "reward"):
        with pytest.raises(UsageError, match=r"neftune has no effect on .* without dropout and noise"):
            start_run(recipe, text.format(recipe), tmp_path / recipe, *options, "techniques=[neftune]")
