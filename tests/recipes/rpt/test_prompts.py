"""Places as questions: the original ids, and only what can be answered in writing."""

from __future__ import annotations

import pytest

from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import UsageError
from llm_quest.recipes.rpt.prompts import (
    DOCUMENT_END,
    INSIDE_CHARACTER,
    Position,
    make_prompt_builder,
    max_document_length,
    split_documents,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" caf is caf is caf"] * 9, 300)


def test_the_text_is_asked_for_by_its_own_ids(tokenizer):
    """These ids spell ` caf` in a way that encoding would not."""
    pieces = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in (" ", "c", "a", "f")]
    ids = [
        tokenizer.start_token_id,
        *pieces,
        *tokenizer.encode(" is", add_special_tokens=False),
        tokenizer.eos_token_id,
    ]
    assert tokenizer.encode(" caf", add_special_tokens=False) != pieces
    asking = make_prompt_builder(tokenizer, [ids], prefix="<|im_start|>", suffix="<think>", max_target_tokens=2)
    question = asking.build_prompt(ids, 4)
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.encode("<think>", add_special_tokens=False)
    assert question.prompt_ids == (tokenizer.start_token_id, start, *pieces[:3], *end)
    assert question.problem.target_tokens == (b"f", b" is")
    assert asking.num_instruction_tokens == 1 + len(end)


def test_what_cannot_be_written_is_not_asked(tokenizer):
    ids = [
        tokenizer.start_token_id,
        *tokenizer.encode(" caf\u00e9 is", add_special_tokens=False),
        tokenizer.eos_token_id,
    ]
    asking = make_prompt_builder(tokenizer, [ids], prefix="", suffix="<think>", max_target_tokens=4)
    bytes_of = [asking.token_bytes_by_id[i] for i in ids]
    inside, lead = bytes_of.index(b"\xa9"), bytes_of.index(b"\xc3")
    assert asking.skip_reason(ids, inside) == INSIDE_CHARACTER
    assert asking.skip_reason(ids, lead) == "", "the character is whole after the second token"
    short = make_prompt_builder(tokenizer, [ids], prefix="", suffix="<think>", max_target_tokens=1)
    assert short.skip_reason(ids, lead) == INSIDE_CHARACTER, "one token ahead, and it is half a character"
    assert asking.skip_reason(ids, len(ids) - 1) == DOCUMENT_END
    found, lost = asking.filter_positions([ids], [Position(0, place, 1.0) for place in range(1, len(ids))])
    assert lost == {DOCUMENT_END: 1, INSIDE_CHARACTER: 1}
    assert len(found) == len(ids) - 3


def test_documents_are_cut_so_that_every_place_leaves_room(tokenizer):
    asking = make_prompt_builder(tokenizer, [[0, 9]], prefix="", suffix="<think>", max_target_tokens=1)
    around = asking.num_instruction_tokens
    assert max_document_length(100, 60, asking, None) == 40 - around
    assert max_document_length(100, 60, asking, 9) == 9
    with pytest.raises(UsageError, match="no room for any text"):
        max_document_length(64, 63, asking, None)
    with pytest.raises(UsageError, match="no room for texts of 50 tokens"):
        max_document_length(100, 60, asking, 50)
    assert split_documents([[1, 2, 3, 4, 5, 6], [1, 7]], 3, 1) == [[1, 2, 3], [1, 4, 5], [1, 6], [1, 7]]
    assert split_documents([[1]], 3, 1) == []
