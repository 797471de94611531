"""Vision models compile to one graph without a break (in a process of its own, without checked annotations)."""

from __future__ import annotations

import torch

from llm_quest.models.build import build
from tests.forked import run_forked
from tests.laws.subjects import keep_block_kinds_

NAMES = ("vit-tiny", "llava-tiny", "gemma3-vision-tiny")


def judge(*names: str) -> None:
    for name in names:
        torch.compiler.reset()
        model = build(name).double()
        for part in model.modules():
            if hasattr(part, "blocks"):
                keep_block_kinds_(part)
        inputs: tuple[torch.Tensor, ...] = (torch.randn(2, 3, 16, 16, dtype=torch.float64),)
        logits_of_images = model
        if name in ("llava-tiny", "gemma3-vision-tiny"):
            length = model.config.num_image_tokens(16, 16)
            tokens = torch.randint(90, (2, length + 8))
            tokens[:, 2 : 2 + length] = 96
            inputs = (tokens, *inputs)

            def logits_of_images(tokens: torch.Tensor, images: torch.Tensor, model=model) -> torch.Tensor:
                return model(tokens, image_features=model.get_image_features(images))

        compiled = torch.compile(logits_of_images, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs), logits_of_images(*inputs), atol=1e-10, rtol=0)
        compiled(*inputs).square().sum().backward()
        print(name, flush=True)


def test_a_compiled_model_is_one_graph_with_the_same_logits():
    assert tuple(run_forked(judge, *NAMES)) == NAMES
