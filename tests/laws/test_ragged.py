"""Rows of unlike lengths cost what they cost alone and give the same: padded rows and packed documents as blocks, and
prompts that are read in groups of like length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_quest.generation.decoding import MAX_PADDING, group_by_length, prefill
from llm_quest.layers.scaled_dot_product import ScaledDotProduct, dense_mask, explicit_attention
from llm_quest.models.decoder import Decoder
from llm_quest.scope import BlockDiagonalMask, Scope, split_into_blocks
from tests.laws.subjects import EVERYBODY, logits_of_rows, own, random_tokens, shared

everybody = pytest.mark.parametrize("name", EVERYBODY)
EXACT = {"rtol": 0.0, "atol": 1e-10}
LENGTHS = (9, 14, 3, 11)

ROWS = {
    "left": torch.stack([torch.arange(14) - (14 - n) for n in LENGTHS]).clamp(min=-1),
    "right": torch.stack([torch.where(torch.arange(14) < n, torch.arange(14), -1) for n in LENGTHS]),
    "a row of padding": torch.tensor([[-1] * 7, [0, 1, 2, 3, 4, 5, -1]]),
    "whole rows": torch.arange(6).expand(3, -1),
}
PACKED = (
    torch.tensor([[-1, 0, 1, 2, 0, 0, 1, 2, 3, 4, -1, -1], [0, 1, 2, 3, 4, 5, 6, -1, 0, 1, 2, 3]]),
    torch.tensor([[9, 3, 3, 3, 1, 0, 0, 0, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5, 2, 2, 2, 2]]),
)
COUNTED_ON = (torch.arange(8)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]]))
CASES: dict[str, tuple[Tensor, Tensor | None]] = {
    **{name: (rows, None) for name, rows in ROWS.items()},
    "packed": PACKED,
    "packed, positions counted on": COUNTED_ON,
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def every_block_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks also where they save nothing, so that small rows have them."""
    monkeypatch.setattr("llm_quest.scope.SCORES_PER_BLOCK", 0)


def logits_and_gradients(model: Decoder, tokens: Tensor, here: Scope) -> list[Tensor]:
    """Of the real tokens."""
    logits = model(tokens, here)[here.position_ids >= 0]
    learned = [p for path, p in model.named_parameters() if p.requires_grad and not path.startswith("mtp_modules.")]
    loss = logits.log_softmax(-1)[:, 3].sum() + 0 * sum(p.sum() for p in learned)
    return [logits.detach(), *torch.autograd.grad(loss, learned)]


@everybody
@pytest.mark.parametrize("case", ["left", "packed"])
def test_blocks_give_the_logits_and_gradients_of_a_mask(name: str, case: str, request: pytest.FixtureRequest):
    positions, segments = CASES[case]
    model = own(name)
    tokens = random_tokens(model, *positions.shape)
    by_mask = logits_and_gradients(model, tokens, Scope(positions, segment_ids=segments))
    assert isinstance(Scope(positions, segment_ids=segments).attention_mask(), Tensor), "too small to pay"
    request.getfixturevalue("every_block_pays")
    assert isinstance(Scope(positions, segment_ids=segments).attention_mask(), BlockDiagonalMask)
    by_blocks = logits_and_gradients(model, tokens, Scope(positions, segment_ids=segments))
    for ours, expected in zip(by_blocks, by_mask, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)
    for mixer in model.modules():
        if isinstance(mixer, ScaledDotProduct):
            mixer.implementation = explicit_attention
    explicit = logits_and_gradients(model, tokens, Scope(positions, segment_ids=segments))
    torch.testing.assert_close(explicit[0], by_mask[0], **EXACT)


@cases
@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_block_diagonal_mask_is_the_rule_of_build_mask_for_every_real_token(
    case: str, window: int | None, every_block_pays: None
):
    positions, segments = CASES[case]
    scope = Scope(positions, segment_ids=segments)
    blocks = scope.attention_mask(window)
    assert isinstance(blocks, BlockDiagonalMask)
    assert sum(blocks.lengths) == positions.numel()
    x = torch.zeros(*positions.shape, 1, 1)
    real = positions >= 0
    by_rule = scope.build_mask(positions, scope.segment_ids, window)
    assert torch.equal(dense_mask(blocks, x, x)[real], by_rule[real])
    assert dense_mask(blocks, x, x).any(dim=-1).all(), "no query sees nothing"


PIECES: dict[str, tuple[list[int], list[int] | None]] = {
    "padding inside": ([0, -1, 1, 2], None),
    "a gap": ([0, 1, 4, 5], None),
    "a position twice": ([0, 1, 2, 2], None),
    "padding inside a document": ([0, 1, -1, 2], [0, 0, 0, 0]),
    "documents that alternate": ([0, 0, 1, 0], [0, 1, 0, 1]),
}


@pytest.mark.parametrize("case", PIECES)
def test_a_document_in_pieces_is_no_block(case: str):
    row, segments = PIECES[case]
    assert split_into_blocks(torch.tensor([row]), None if segments is None else torch.tensor([segments])) is None


def test_blocks_are_chosen_where_they_save_scores_and_positions_lie_on_the_host():
    rows = torch.stack([torch.arange(256) - n for n in (0, 90, 200)]).clamp(min=-1)
    assert isinstance(Scope(rows).attention_mask(), BlockDiagonalMask)
    assert Scope(rows).attention_mask(64).window == 64
    assert isinstance(Scope(rows, bidirectional=True).attention_mask(), Tensor)
    assert isinstance(Scope(rows[:, -20:]).attention_mask(), Tensor)
    assert isinstance(Scope(rows.to("meta")).find_blocks(), type(None))


@everybody
@pytest.mark.parametrize("max_rewind", [0, 4])
def test_caches_that_are_joined_give_every_row_its_own_past(name: str, max_rewind: int):
    """Rows read in three passes of one, two and one rows, joined in another order, decoded, taken back and decoded."""
    model = shared(name)
    rows = [random_tokens(model, 1, length + 6, seed=length)[0] for length in LENGTHS]
    caches, order = [], [1, 0, 3, 2]
    for group in ([1], [0, 3], [2]):
        width = max(LENGTHS[row] for row in group)
        positions = torch.stack([torch.arange(width) - (width - LENGTHS[row]) for row in group]).clamp(min=-1)
        tokens = torch.stack([rows[row][place.clamp(min=0)] for row, place in zip(group, positions, strict=True)])
        caches.append(model.new_cache(len(group), 24, max_rewind))
        model(tokens, Scope(positions, cache=caches[-1]))
    cache = caches[0]
    cache.batch_concat(caches[1:], sorted(range(4), key=order.__getitem__))
    assert cache.batch_size == 4
    decode(model, cache, rows, list(LENGTHS), 4)
    if max_rewind:
        assert cache.rewind(list(LENGTHS)) == list(LENGTHS)
        decode(model, cache, rows, list(LENGTHS), 6)


def decode(model: Decoder, cache: object, rows: list[Tensor], starts: list[int], steps: int) -> None:
    """Every row's next tokens give the logits of that row alone."""
    alone = logits_of_rows(model, rows)
    for step in range(steps):
        positions = torch.tensor(starts)[:, None] + step
        tokens = torch.stack([row[place] for row, place in zip(rows, positions, strict=True)])
        logits = model(tokens, Scope(positions, cache=cache))
        for b, expected in enumerate(alone):
            torch.testing.assert_close(logits[b, 0], expected[starts[b] + step], **EXACT)


@everybody
def test_prompts_read_in_groups_give_the_logits_of_each_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llm_quest.generation.decoding.MAX_PADDING", 4)
    model = shared(name)
    prompts = [random_tokens(model, 1, length, seed=length)[0].tolist() for length in (3, 12, 1, 11, 12, 2)]
    cache, logits = prefill(model, prompts, 16, torch.device("cpu"))
    assert cache.batch_size == 6
    for b, alone in enumerate(logits_of_rows(model, prompts)):
        torch.testing.assert_close(logits[b], alone[-1], **EXACT)


def test_rows_of_like_length_are_one_group_and_padding_never_costs_more_than_a_pass():
    assert group_by_length([5, 5, 5]) == [[0, 1, 2]]
    assert group_by_length([40, 64, 50, 71]) == [[0, 1, 2, 3]]
    assert group_by_length([10, 4096, 12, 4000, 700]) == [[1, 3], [4], [0, 2]]
    lengths = [1 + 37 * n % 900 for n in range(100)]
    groups = group_by_length(lengths)
    assert sorted(row for group in groups for row in group) == list(range(100))
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert sum(longest - lengths[row] for row in group) <= MAX_PADDING
