from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llm_quest.data.image_datasets import ImageBatch
from llm_quest.models.build import build
from llm_quest.objectives.classification import ImageClassificationLoss, classification_loss


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


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_torchs_over_any_split_of_the_batch(smoothing: float):
    logits, labels = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 0, 1, 0])
    weights = torch.tensor([0.5, 1.0, 4.0])
    theirs = nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(logits, labels)
    parts = [classification_loss(logits[p], labels[p], smoothing, weights) for p in (slice(0, 2), slice(2, 7))]
    total, count = sum(one.total for one in parts), sum(one.count for one in parts)
    assert (total / count).item() == pytest.approx(theirs.item(), rel=1e-6)
    assert sum(one.metrics["accuracy"][1].item() for one in parts) == 7


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 4.0])])
def test_several_labels_are_torchs_binary_cross_entropy(weights: torch.Tensor | None):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(7, 3, generator=generator), (torch.rand(7, 3, generator=generator) < 0.4).float()
    theirs = nn.BCEWithLogitsLoss(pos_weight=weights)(logits, targets)
    parts = [classification_loss(logits[p], targets[p], 0.0, weights) for p in (slice(0, 2), slice(2, 7))]
    assert (sum(one.total for one in parts) / sum(one.count for one in parts)).item() == pytest.approx(theirs.item())
    double, said = (sum(one.metrics["micro_f1"][k].item() for one in parts) for k in (0, 1))
    right = ((logits > 0) & (targets > 0)).sum().item()
    assert (double, said) == (2 * right, (logits > 0).sum().item() + targets.sum().item())


def test_smoothed_labels_of_several_lie_between():
    loss = classification_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 0.2)
    assert loss.total.item() == pytest.approx(2 * math.log(2))
    sure = classification_loss(torch.tensor([[3.0, -3.0]]), torch.tensor([[1.0, 0.0]]), 0.2).total.item()
    assert sure == pytest.approx(2 * (math.log(1 + math.exp(-3)) + 0.1 * 3), rel=1e-5)
