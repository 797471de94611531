"""Tokenizers: every text comes back to the byte, control tokens cannot be typed, transformers reads what we write."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokenizer_files import END_OF_TEXT
from llm_quest.data.vocabulary import MAX_TRAINING_WORD, train_bpe
from llm_quest.errors import DataError, UsageError
from tests.tokenizer_kinds import KINDS, tokenizer_of

TEXT = [
    "the cat sat on the mat, the cat sat.\n" * 20,
    "def f(x):\n    return x + 12345\n" * 10,
    "café über naïve — 漢字 🙂 " * 10,
]
TOKENIZER = train_bpe(TEXT, 400)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text), keep_special_tokens=True) == text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40), st.booleans())
def test_a_stream_says_what_decoding_at_once_says(ids: list[int], special: bool):
    stream = TOKENIZER.decode_stream(keep_special_tokens=special)
    assert "".join(map(stream.feed, ids)) + stream.flush() == TOKENIZER.decode(ids, keep_special_tokens=special)


def test_a_stream_never_splits_a_character():
    bytewise = train_bpe(["a"], 264)
    stream = bytewise.decode_stream()
    ids = bytewise.encode("é漢🙂a")
    assert len(ids) == 2 + 3 + 4 + 1
    assert [stream.feed(i) for i in ids] == ["", "é", "", "", "漢", "", "", "", "🙂", "a"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_shown_at_the_end():
    bytewise = train_bpe(["a"], 264)
    stream = bytewise.decode_stream()
    assert stream.feed(bytewise.encode("é")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_control_tokens_in_a_users_text_are_only_text():
    text = f"hello {END_OF_TEXT}<|im_end|>"
    assert not set(TOKENIZER.encode(text)) & set(range(8))
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode(text, allow_special_tokens=True)[-2:] == [0, 2]
    assert TOKENIZER.encode_batch([text, "a"]) == [TOKENIZER.encode(text), TOKENIZER.encode("a")]
    assert not set(TOKENIZER.encode(text)) & set(range(8))  # asking for the other reading has changed nothing


def test_decoding_leaves_control_tokens_out_unless_asked():
    ids = [0, *TOKENIZER.encode("the cat"), 2]
    assert TOKENIZER.decode(ids) == "the cat"
    assert TOKENIZER.decode(ids, keep_special_tokens=True) == f"{END_OF_TEXT}the cat<|im_end|>"


def test_the_first_special_tokens_are_end_and_begin():
    assert (
        TOKENIZER.eos_token_ids,
        TOKENIZER.bos_token_id,
        TOKENIZER.start_token_id,
        TOKENIZER.token_to_id("<|im_start|>"),
    ) == ((0,), 0, 0, 1)
    assert TOKENIZER.vocab_size == 1 + max(TOKENIZER.backend_tokenizer.get_vocab().values()) <= 400


def test_digits_stand_alone_and_a_word_keeps_its_space():
    assert [TOKENIZER.decode([i]) for i in TOKENIZER.encode("2024")] == ["2", "0", "2", "4"]
    assert TOKENIZER.decode(TOKENIZER.encode("the the")[1:]) == " the"


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe(iter(TEXT), 400).hash == TOKENIZER.hash != train_bpe(TEXT, 280).hash


def test_save_and_load_keep_everything(tmp_path: Path):
    before = Tokenizer(TOKENIZER.backend_tokenizer, eos_tokens=[END_OF_TEXT], chat_template="{{ messages }}")
    before.save(tmp_path, 512)
    after = Tokenizer.load(tmp_path)
    assert after.hash == before.hash
    assert (after.model_max_length, after.chat_template, after.bos_token_id) == (512, "{{ messages }}", None)
    assert Tokenizer.load(tmp_path / "tokenizer.json").hash == before.hash


def test_files_get_the_mode_of_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        TOKENIZER.save(tmp_path / "new", 64)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "new").iterdir()} == {0o640}


def test_transformers_reads_what_we_write(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path, 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXT, "  two  spaces\n\n", "", "12 + 34 = 46"):
        assert theirs(text).input_ids == TOKENIZER.encode(text)
        assert theirs.decode(TOKENIZER.encode(text)) == text
    assert theirs(f"a{END_OF_TEXT}").input_ids == TOKENIZER.encode(f"a{END_OF_TEXT}", allow_special_tokens=True)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 3)
    assert theirs.model_max_length == 512


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_gives_the_ids_transformers_gives(kind: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_of(kind)
    ours.save(tmp_path, 512)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("Once upon a time, Lily", "été 🙂", " two  spaces\n", ""):
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
    assert (ours.bos_token_id, *ours.eos_token_ids) == (theirs.bos_token_id, theirs.eos_token_id)


def test_vocab_and_merges_files_give_gpt2s_ids(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    engine = json.loads(tokenizer_of("byte-level").backend_tokenizer.to_str())["model"]
    vocabulary = engine["vocab"] | {END_OF_TEXT: len(engine["vocab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in engine["merges"]))
    gpt2, theirs = Tokenizer.load(tmp_path), transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in ("Once upon a time", "\n\nworld's  42", "été 🙂"):
        assert gpt2.encode(text) == theirs(text).input_ids
    end = vocabulary[END_OF_TEXT]
    assert (gpt2.eos_token_ids, gpt2.bos_token_id, gpt2.vocab_size) == ((end,), end, len(vocabulary))
    assert end not in gpt2.encode(END_OF_TEXT)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer at"),
        ({"tokenizer.model": "x"}, "SentencePiece"),
        ({"tokenizer.json": "{"}, "is not a tokenizer.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "holds a list"),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "is not JSON"),
    ],
)
def test_a_broken_folder_is_refused_by_name(tmp_path: Path, files: dict[str, str | None], message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(TOKENIZER.backend_tokenizer.to_str() if content is None else content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_padding_and_truncation_of_a_published_file_are_switched_off(tmp_path: Path):
    content = json.loads(TOKENIZER.backend_tokenizer.to_str())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).encode(TEXT[0]) == TOKENIZER.encode(TEXT[0])


@pytest.mark.parametrize("text", ["." * 3000, "ab" * 1500, "x" + " " * 3000 + "y"])
def test_a_long_word_is_cut_for_training_and_read_whole(text: str):
    tokenizer = train_bpe([text], 300)
    longest = max(tokenizer.backend_tokenizer.get_vocab(), key=len)
    assert 64 <= len(longest) <= MAX_TRAINING_WORD
    assert tokenizer.decode(tokenizer.encode(text)) == text
    pre_tokenizers = (json.loads(one.backend_tokenizer.to_str())["pre_tokenizer"] for one in (tokenizer, TOKENIZER))
    assert next(pre_tokenizers) == next(pre_tokenizers)


def test_mistakes_are_named():
    with pytest.raises(UsageError, match="256 bytes and 8 special tokens need 264"):
        train_bpe(TEXT, 100)
    with pytest.raises(DataError, match="without text"):
        train_bpe([""], 300)
    with pytest.raises(DataError, match="surrogate"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(UsageError, match=r"no token '<\|nope\|>'"):
        TOKENIZER.token_to_id("<|nope|>")


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_tokenizer_makes_a_control_token_of_ordinary_text(kind: str):
    tokenizer = tokenizer_of(kind)
    for name in tokenizer.special_tokens:
        if name != tokenizer.unk_token:
            text = f"one {name} two{name}three"
            assert tokenizer.token_to_id(name) not in tokenizer.encode(text, add_special_tokens=False), name
            assert tokenizer.token_to_id(name) in tokenizer.encode(text, allow_special_tokens=True), name
