"""Process reward models: worked values, where steps end, read-outs by hand, and TRL's two-class loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm_quest.data.document import DropReport
from llm_quest.data.records import Record
from llm_quest.data.step_labels import StepDataset, TokenizedSteps, parse_labeled_steps, tokenize_steps
from llm_quest.errors import DataError, UsageError
from llm_quest.objectives.process_reward import ProcessRewardLoss
from llm_quest.objectives.readouts import READOUTS, read_rewards, score_tokens, step_ends, token_scores
from llm_quest.techniques.score_head import ScoreHead
from tests.objectives.rated import gradients, tiny

ROWS = [
    TokenizedSteps((1, 2, 3, 50, 4, 50), (3, 5), (1.0, 0.0)),
    TokenizedSteps((7, 8, 50), (2,), (0.25,)),
    TokenizedSteps((9, 1, 2, 3, 4, 5, 50), (6,), (1.0,)),
]


def scorer(readout: str = "mean_steps", separator: tuple[int, ...] = (50,)):
    return ScoreHead(1, std=0.5, readout=readout, step_token_ids=separator)(tiny())


def test_the_loss_is_of_the_ends_of_steps_alone():
    """By hand from the scores: -log sigma(s) for right, -log sigma(-s) for wrong, both for a soft label."""
    model = scorer()
    found = ProcessRewardLoss(model)(StepDataset(ROWS).collate([0, 1, 2]))
    one, two, three = (scores.tolist() for scores in token_scores(model, [row.input_ids for row in ROWS]))

    def loss(s: float, y: float) -> float:
        return y * math.log1p(math.exp(-s)) + (1 - y) * math.log1p(math.exp(s))

    assert found.total.item() == pytest.approx(
        loss(one[3], 1) + loss(one[5], 0) + loss(two[2], 0.25) + loss(three[6], 1)
    )
    assert found.count.item() == 4
    right = sum((s > 0) == y for s, y in ((one[3], True), (one[5], False), (two[2], False), (three[6], True)))
    assert found.metrics["accuracy"][0].item() == right
    assert found.metrics["score/right"][1].item() == 2


def test_splitting_a_batch_adds_and_gradients_equal_a_two_class_cross_entropy():
    """TRL's PRMTrainer: a token classifier's cross-entropy, at labels -100 but for the ends; z_1 - z_0 is our score."""
    model, data = scorer(), StepDataset([ROWS[0], ROWS[2]])
    whole = ProcessRewardLoss(model)(data.collate([0, 1]))
    parts = [ProcessRewardLoss(model)(data.collate([n])).total for n in (0, 1)]
    torch.testing.assert_close(whole.total, sum(parts))
    batch = data.collate([0, 1])
    s = score_tokens(model, batch.input_ids, batch.position_ids)
    labels = batch.labels.nan_to_num(-100).long()
    theirs = F.cross_entropy(torch.stack([-s / 2, s / 2], dim=-1).flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(whole.total, theirs)
    for ours, other in zip(gradients(model, whole.total), gradients(model, theirs), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    ("ids", "start", "separator", "ends"),
    [
        ((5, 1, 5, 2, 3, 5, 4), 1, (5,), [2, 5, 6]),  # one in the question, and a last step without a separator
        ((1, 2, 5, 3, 5), 1, (5,), [2, 4]),
        ((1, 6, 7, 2, 7, 6, 7), 1, (6, 7), [2, 6]),
        ((1, 2, 3), 1, (), [2]),
    ],
)
def test_steps_end_at_separators_of_the_answer_and_at_its_end(ids, start, separator, ends):
    assert step_ends(ids, start, separator) == ends


def test_readouts_by_hand():
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0])
    found = {name: float(read(scores, [1, 3])) for name, read in READOUTS.items()}
    sigma = 1 / (1 + math.exp(-2))
    assert found == {
        "last_token": 2.0, "mean_tokens": 0.5, "mean_steps": pytest.approx((0.5 + sigma) / 2),
        "min_steps": pytest.approx(0.5),
    }  # fmt: skip


def test_a_models_own_readout_is_read_without_padding():
    tokens, positions = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[0, 1, 2], [0, 1, -1]])
    one, two = token_scores(scorer("mean_tokens", ()), [[1, 2, 3], [4, 5]])
    found = read_rewards(scorer("mean_tokens", ()), tokens, positions)
    torch.testing.assert_close(found, torch.stack([one.mean(), two.mean()]))
    last = read_rewards(scorer("last_token", ()), tokens, positions)
    torch.testing.assert_close(last, torch.stack([one[-1], two[-1]]))
    with pytest.raises(UsageError, match="scores the steps of an answer"):
        read_rewards(scorer(), tokens, positions)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_rows_are_trls_and_labels_stand_at_the_separators_last_token():
    row = {"prompt": "2+2:", "completions": ["a", "bc"], "labels": [True, 0.5]}
    steps = parse_labeled_steps(Record(row, "rows.jsonl:1"))
    (found,) = tokenize_steps([steps], [1], encode, "\n\n", 32, DropReport())
    assert found.input_ids == (1, *encode("2+2:a\n\nbc\n\n"))
    assert (found.ends, found.labels) == ((7, 11), (1.0, 0.5))
    (cut,) = tokenize_steps([steps], [1], encode, "\n\n", 9, DropReport())
    assert cut.input_ids == tuple(encode("+2:a\n\nbc\n\n")[1:]) or len(cut.input_ids) == 9
    report = DropReport()
    with pytest.raises(DataError, match="raise sequence_length"):
        tokenize_steps([steps], [1], encode, "\n\n", 7, report)
    batch = StepDataset([found, *ROWS[1:2]]).collate([0, 1])
    assert np.isnan(batch.labels[1, 3:]).all()
    assert batch.num_tokens == 12 + 3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completions": ["b"]}, "rows.jsonl:1: has the keys prompt, completions; expected those of"),
        ({"prompt": "a", "completions": ["b"], "labels": [True, False]}, "1 steps in 'completions' and 2 labels"),
        ({"prompt": "a", "completions": ["b"], "labels": [2]}, "expected true, false or numbers from 0 to 1"),
        ({"prompt": "a", "completions": "b", "labels": [True]}, "no list of texts"),
        ({"prompt": [1], "completions": ["b"], "labels": [True]}, "'prompt'"),
    ],
)
def test_rows_that_are_not_labeled_steps_are_refused(row, said):
    with pytest.raises(DataError, match=said):
        parse_labeled_steps(Record(row, "rows.jsonl:1"))
