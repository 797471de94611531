"""Places as questions: the original ids, and only what can be answered in writing."""

from __future__ import annotations

import pytest

from llm_quest.data.tokenizer import train_bpe
from llm_quest.errors import UsageError
from llm_quest.rollouts.foretelling import END, INSIDE, asking_of, cut, room_for
from llm_quest.rollouts.positions import Position


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([" caf is caf is caf"] * 9, 300)


def test_the_text_is_asked_for_by_its_own_ids(tokenizer):
    """These ids spell ` caf` in a way that encoding would not."""
    pieces = [tokenizer.encode(letter, template=False)[0] for letter in (" ", "c", "a", "f")]
    ids = [tokenizer.start_id, *pieces, *tokenizer.encode(" is", template=False), tokenizer.end_id]
    assert tokenizer.encode(" caf", template=False) != pieces
    asking = asking_of(tokenizer, [ids], before="<|im_start|>", after="<think>", ahead=2)
    question = asking.question(ids, 4)
    start, end = tokenizer.id("<|im_start|>"), tokenizer.encode("<think>", template=False)
    assert question.prompt == (tokenizer.start_id, start, *pieces[:3], *end)
    assert question.problem.truth == (b"f", b" is")
    assert asking.around == 1 + len(end)


def test_what_cannot_be_written_is_not_asked(tokenizer):
    ids = [tokenizer.start_id, *tokenizer.encode(" caf\u00e9 is", template=False), tokenizer.end_id]
    asking = asking_of(tokenizer, [ids], before="", after="<think>", ahead=4)
    bytes_of = [asking.pieces[i] for i in ids]
    inside, lead = bytes_of.index(b"\xa9"), bytes_of.index(b"\xc3")
    assert asking.obstacle(ids, inside) == INSIDE
    assert asking.obstacle(ids, lead) == "", "the character is whole after the second token"
    short = asking_of(tokenizer, [ids], before="", after="<think>", ahead=1)
    assert short.obstacle(ids, lead) == INSIDE, "one token ahead, and it is half a character"
    assert asking.obstacle(ids, len(ids) - 1) == END
    found, lost = asking.askable([ids], [Position(0, place, 1.0) for place in range(1, len(ids))])
    assert lost == {END: 1, INSIDE: 1}
    assert len(found) == len(ids) - 3


def test_documents_are_cut_so_that_every_place_leaves_room(tokenizer):
    asking = asking_of(tokenizer, [[0, 9]], before="", after="<think>", ahead=1)
    around = asking.around
    assert room_for(100, 60, asking, None) == 40 - around
    assert room_for(100, 60, asking, 9) == 9
    with pytest.raises(UsageError, match="no room for any text"):
        room_for(64, 63, asking, None)
    with pytest.raises(UsageError, match="no room for texts of 50 tokens"):
        room_for(100, 60, asking, 50)
    assert cut([[1, 2, 3, 4, 5, 6], [1, 7]], 3, 1) == [[1, 2, 3], [1, 4, 5], [1, 6], [1, 7]]
    assert cut([[1]], 3, 1) == []
