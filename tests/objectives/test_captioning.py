from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llm_quest.data.image_text import ImageTextBatch
from llm_quest.models.build import build
from llm_quest.objectives.next_token import CaptioningLoss
from tests.laws.subjects import randomize_
from tests.models.vision import images, tokens_with_images

MODEL = randomize_(build("llava-tiny"))
OBJECTIVE = CaptioningLoss(MODEL)


def batch() -> ImageTextBatch:
    tokens = tokens_with_images(26, 1, 1, 1)
    targets = torch.full_like(tokens, -100)
    targets[:, 19:25] = tokens[:, 20:26]
    targets[2, 21:] = -100
    return ImageTextBatch(tokens, targets, images(3, 16), 78)


def test_the_loss_is_that_of_all_logits_at_the_learned_tokens():
    rows = batch()
    logits = MODEL(rows.input_ids, image_features=MODEL.get_image_features(rows.images))
    loss = OBJECTIVE(rows)
    assert loss.total.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), reduction="sum").item(), rel=1e-5
    )
    assert loss.count.item() == 6 + 6 + 2


def test_splitting_a_batch_adds_both_totals_and_counts():
    rows = batch()
    parts = [
        OBJECTIVE(ImageTextBatch(rows.input_ids[p], rows.targets[p], rows.images[p], 26))
        for p in (slice(0, 1), slice(1, 3))
    ]
    whole = OBJECTIVE(rows)
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(part.count.item() for part in parts) == whole.count.item()


def test_the_image_reaches_the_loss():
    rows = batch()
    other = ImageTextBatch(rows.input_ids, rows.targets, rows.images.flip(0), rows.token_count)
    assert abs(OBJECTIVE(rows).total.item() - OBJECTIVE(other).total.item()) > 1e-3
