"""A ViT training step (forward, loss, backward, clip, fused AdamW) against transformers' ViT on the same images, in
turn, in one process; the shapes are a small ViT for 32 x 32 images (CIFAR's recipe) and ViT-S/16 at 224.

python -m benchmarks.vision [--pairs 7] [--shape small] [--dtype bf16]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import llm_quest as quest
from benchmarks.pairs import race, table
from llm_quest.models import vit

SHAPES = {
    "cifar": (vit.Config(32, 4, 3, 384, 8, 6, 768, 10), 32),
    "small": (vit.Config(224, 16, 3, 384, 12, 6, 1536, 1000), 4),
}


class Step:
    """One contestant: an optimizer step a call."""

    def __init__(self, model: nn.Module, answer: Callable[[torch.Tensor], torch.Tensor], *, bf16: bool = False):
        self.model, self.answer, self.bf16 = model, answer, bf16
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.answer(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def contestants(config: vit.Config, batch: int, bf16: bool) -> dict[str, Callable[[], object]]:
    """Both on the same images."""
    from transformers import ViTConfig, ViTForImageClassification

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, config.num_channels, config.image_size, config.image_size, generator=generator)
    labels = torch.randint(config.num_labels, (batch,), generator=generator)
    theirs = ViTForImageClassification(ViTConfig(**vit.FAMILY.publish(config))).float().train()
    ours = quest.build(config).train()
    steps = {
        "transformers": Step(theirs, lambda images: theirs(pixel_values=images).logits, bf16=bf16),
        "ours": Step(ours, ours, bf16=bf16),
    }
    return {name: lambda step=step: step(images, labels) for name, step in steps.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--shape", choices=["", *SHAPES], default="")
    parser.add_argument("--dtype", choices=("", "fp32", "bf16"), default="")
    options = parser.parse_args()
    for name, (config, batch) in SHAPES.items():
        for dtype in ("fp32", "bf16"):
            if options.shape in ("", name) and options.dtype in ("", dtype):
                rows = race(contestants(config, batch, dtype == "bf16"), pairs=options.pairs)
                print(f"\n{name}, batch {batch}, {dtype}, {torch.get_num_threads()} threads")
                print(table(rows, batch, "images/s"), flush=True)


if __name__ == "__main__":
    main()
