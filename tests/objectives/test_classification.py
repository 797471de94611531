from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llm_quest.data.image_datasets import ImageBatch
from llm_quest.models.build import build
from llm_quest.objectives.classification import ImageClassificationLoss


class Says(nn.Module):
    """Logits as they come: images (B,1,1,V)."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, 0, 0]


def batch_of(logits: list[list[float]], labels: list[int]) -> ImageBatch:
    return ImageBatch(torch.tensor(logits)[:, None, None], torch.tensor(labels))


def test_two_images_by_hand():
    loss = ImageClassificationLoss(Says())(batch_of([[0.0, 0.0], [math.log(3), 0.0]], [1, 0]))
    assert loss.total.item() == pytest.approx(math.log(2) + math.log(4 / 3))
    assert loss.count.item() == 2
    assert [value.item() for value in loss.metrics["accuracy"]] == [1, 2]


def test_smoothing_gives_every_class_its_share():
    loss = ImageClassificationLoss(Says(), label_smoothing=0.2)(batch_of([[math.log(3), 0.0]], [0]))
    assert loss.total.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_splitting_a_batch_adds_both_totals_and_counts():
    objective = ImageClassificationLoss(build("vit-tiny"))
    images, labels = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    whole = objective(ImageBatch(images, labels))
    parts = [objective(ImageBatch(images[part], labels[part])) for part in (slice(0, 2), slice(2, 5))]
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(part.count.item() for part in parts) == whole.count.item()
    assert sum(part.metrics["accuracy"][0].item() for part in parts) == whole.metrics["accuracy"][0].item()
