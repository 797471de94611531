"""RPT-1, and the ways in which one might be paid for nothing."""

from __future__ import annotations

import pytest
from tokenizers import decoders

from llm_quest.data.tokenizer_files import END_OF_TEXT
from llm_quest.data.vocabulary import character_tokenizer, token_bytes, train_bpe, unicode_to_bytes
from llm_quest.errors import UsageError
from llm_quest.recipes.rpt.prompts import (
    AnswerFormatReward,
    Continuation,
    PrefixMatchReward,
    extract_tagged_answer,
    prefix_match,
    token_boundaries,
)
from llm_quest.rollouts.sampler import Sample

CAFE = (b" caf", b"\xc3", b"\xa9", b" is")


def sample(text: str, finished: str = "eos") -> Sample:
    return Sample((1,), (2,), (0.0,), finished, text, Continuation("un", CAFE))  # type: ignore[arg-type]


def test_vector_rpt_1():
    assert token_boundaries(CAFE) == {4, 5, 6, 9}
    right = {" caf", " café", " café is"}
    for text in [*right, " ca", " café i", "caf", "", " cafe", " caf ", " café is it"]:
        assert prefix_match(text.encode(), CAFE) == float(text in right), text
    assert prefix_match(b" caf\xc3", CAFE) == 1, "a boundary, though no text ends there"


def test_bytes_come_from_the_vocabulary_where_a_character_is_split():
    tokenizer = train_bpe([" caf is caf is caf"] * 9, 300)
    ids = tokenizer.encode(" café is 日本", add_special_tokens=False)
    pieces = token_bytes(tokenizer, ids)
    assert b"".join(pieces) == " café is 日本".encode()
    assert b"\xc3" in pieces
    assert [len(piece) for piece in pieces] != [len(tokenizer.decode([i]).encode()) for i in ids]
    assert sorted(unicode_to_bytes().values()) == list(range(256))


def test_characters_and_control_tokens_have_their_bytes_too():
    tokenizer = character_tokenizer("aé=")
    ids = tokenizer.encode("é=a", add_special_tokens=False)
    assert token_bytes(tokenizer, [*ids, tokenizer.token_to_id(END_OF_TEXT)]) == [b"\xc3\xa9", b"=", b"a", b""]
    with pytest.raises(UsageError, match="no id of this tokenizer"):
        token_bytes(tokenizer, [99])
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(UsageError, match="decoder Metaspace"):
        token_bytes(tokenizer, ids)


def test_the_next_document_is_no_part_of_the_truth():
    assert token_boundaries((b"a", b"", b"b")) == {1}
    assert prefix_match(b"ab", (b"a", b"", b"b")) == 0
    assert prefix_match(b"", (b"", b"b")) == 0


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("<think>x</think><answer> caf</answer>", 1.0),
        ("<think></think><answer> café is</answer>", 1.0),
        ("<think>x</think><answer>caf</answer>", 0.0),
        ("<think>x</think><answer> caf\n</answer>", 0.0),
        ("<think>x</think><answer></answer>", 0.0),
        ("<think>x</think><answer> </answer>", 0.0),
        ("<think>x</think><answer> caf</answer><answer> café</answer>", 0.0),
        ("<think>x</think><answer>no</answer> <answer> caf</answer>", 0.0),
        ("So: <think>x</think><answer> caf</answer>", 0.0),
        ("<think>x</think><answer> caf</answer>.", 0.0),
        ("<answer> caf</answer>", 0.0),
        (" caf", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_one_answer_counts_and_to_the_letter(text: str, worth: float):
    assert PrefixMatchReward()([sample(text), sample(text, "length")]) == [worth, 0.0]


def test_tags_inside_are_refused():
    assert extract_tagged_answer("<think>a</think><answer>b</think></answer>") is None
    assert extract_tagged_answer("<think><answer>a</think><answer>b</answer>") is None


def test_what_the_prompt_has_opened_is_not_asked_for_again():
    reward = PrefixMatchReward("<think>")
    texts = ["x</think><answer> caf</answer>", "<think>x</think><answer> caf</answer>", "<answer> caf</answer>"]
    assert reward([sample(text) for text in texts]) == [1.0, 0.0, 0.0]
    assert PrefixMatchReward()([sample(texts[0])]) == [0.0], "nothing else of the prompt is read (P31)"
    assert [reward.extract_prediction(sample(text)) for text in texts] == [" caf", None, None]


def test_the_control_pays_for_any_answer():
    texts = ["<think>x</think><answer>no</answer>", "<think>x</think> caf", "<think></think><answer></answer>"]
    assert AnswerFormatReward()([sample(text) for text in texts]) == [1.0, 0.0, 1.0]
    assert AnswerFormatReward()([sample(texts[0], "length")]) == [0.0]
