"""T5's tokenizer from its spiece.model alone: the ids of transformers' T5Tokenizer, for texts of every kind."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError
from tests.data.test_tokenizer_files import field
from tests.later import Later

transformers = Later("transformers")

META = "\u2581"
TEXTS = (
    "Translate English to German: That is good.",
    "  two  spaces,\ttab and\nline   ",
    "the ﬁrst oﬃce ﬁnds ﬁve",
    "<extra_id_0> walks in <extra_id_1> park</s> <pad> <unk>",
    "unknown: \u4e2d\u6587 \U0001f642 zq",
    "",
    " ",
    f"a{META}b",
)


def charsmap(key: str, value: str) -> bytes:
    """SentencePiece's compiled map of one character: a double-array trie over the bytes of `key`, whose leaf is a place
    in the values. A unit has its label, or the offset to its children shifted by 10; bit 8 marks that a leaf follows.
    """
    units = [0] * (256 * (len(key.encode()) + 2))
    place, base = 0, 256
    units[place] = (place ^ base) << 10
    for number, byte in enumerate(key.encode()):
        place, base = base ^ byte, base + 256
        is_last = number == len(key.encode()) - 1
        units[place] = byte | is_last << 8 | (place ^ base) << 10
    units[base] = 1 << 31 | 0
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + value.encode() + b"\0"


def pieces() -> list[tuple[str, float, int]]:
    """T5's layout: padding, end and unknown, then pieces with log-probabilities."""
    words = ["the", "first", "of", "fi", "ce", "an", "slate", "En", "glish", "That", "is", "go", "od", "park", "walk"]
    found = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), (META, -2.5, 1)]
    found += [(f"{META}{word}", -3.0 - 0.37 * number, 1) for number, word in enumerate(words)]
    found += [(word, -4.0 - 0.21 * number, 1) for number, word in enumerate(words)]
    letters = "abcdefghijklmnopqrstuvwxyABCDEFGHIJKLMNOPQRSTUVWXYZ.,:<>_/0123456789"
    found += [(letter, -7.0 - 0.1 * number, 1) for number, letter in enumerate(letters)]
    return [*found, ("<tool>", 0.0, 4)]


def write_spiece(folder: Path, kind: int = 1, char_map: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    content = b"".join(field(1, field(1, t.encode()) + field(2, s) + field(3, k)) for t, s, k in pieces())
    training = field(3, kind) + field(40, 2) + field(41, 2**64 - 1) + field(42, 1) + field(43, 0)
    normal = field(1, b"nmt_nfkc") + (field(2, char_map) if char_map else b"")
    (folder / "spiece.model").write_bytes(content + field(2, training) + field(3, normal))
    return folder


def transformers_own(char_map: bytes, extra_ids: int) -> Any:
    """transformers' class from the pieces themselves, as it takes them out of a file. (Reading the file needs the
    package sentencepiece.)"""
    from transformers.convert_slow_tokenizer import T5Converter

    vocab = [(text, score) for text, score, _ in pieces()]
    settings = T5Converter.convert_from_spm(vocab=vocab, extra_ids=extra_ids)
    more = [transformers.AddedToken("<tool>", normalized=False, special=False)]
    settings["additional_special_tokens"] = [*settings["additional_special_tokens"], *more]
    return transformers.T5Tokenizer(**settings, _spm_precompiled_charsmap=char_map or None)


@pytest.mark.parametrize("char_map", [b"", charsmap("\ufb01", "fi")], ids=["plain", "character map"])
@pytest.mark.parametrize("extra_ids", [100, 7])
def test_the_ids_are_those_of_transformers(tmp_path: Path, char_map: bytes, extra_ids: int):
    folder = write_spiece(tmp_path / "t5", char_map=char_map)
    if extra_ids != 100:
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer.load(folder), transformers_own(char_map, extra_ids)
    assert ours.vocab_size == len(theirs) == len(pieces()) + extra_ids
    for text in TEXTS:
        expected = theirs(text).input_ids
        assert ours.encode(text, allow_special_tokens=True) == expected, text
        assert expected[-1] == 1
        assert ours.encode(text, allow_special_tokens=True, add_special_tokens=False) == expected[:-1]
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)


def test_the_character_map_is_applied_and_the_last_token_is_the_first_sentinel(tmp_path: Path):
    plain = Tokenizer.load(write_spiece(tmp_path / "plain"))
    mapped = Tokenizer.load(write_spiece(tmp_path / "mapped", char_map=charsmap("\ufb01", "fi")))
    assert mapped.encode("\ufb01rst") == mapped.encode("first") == plain.encode("first")
    assert plain.encode("\ufb01rst") != plain.encode("first")
    sentinel = plain.encode("<extra_id_0>", add_special_tokens=False, allow_special_tokens=True)
    assert sentinel == [plain.vocab_size - 1]
    assert (plain.eos_token_ids, plain.pad_token_id, plain.bos_token_id) == ((1,), 0, None)
    assert len(pieces()) - 1 in plain.encode("a<tool>b"), "a user's symbol is never cut"


def test_what_is_saved_reads_the_same(tmp_path: Path):
    ours = Tokenizer.load(write_spiece(tmp_path / "t5", char_map=charsmap("\ufb01", "fi")))
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text)


def test_control_tokens_that_are_spelled_out_are_ordinary_text(tmp_path: Path):
    """They are pieces of a Unigram model, the likeliest ones."""
    ours = Tokenizer.load(write_spiece(tmp_path / "t5"))
    for name in ("</s>", "<pad>", "<extra_id_0>", "<extra_id_42>"):
        ids = ours.encode(f"a{name}b", add_special_tokens=False)
        assert ours.token_to_id(name) not in ids
        assert ours.token_to_id(name) in ours.encode(f"a{name}b", allow_special_tokens=True)
        assert ours.decode(ids, keep_special_tokens=True) == f"a{name}b"


@pytest.mark.parametrize("extra_ids", [-1, "a", 10**9])
def test_a_number_of_sentinels_that_is_none_is_refused(tmp_path: Path, extra_ids: object):
    folder = write_spiece(tmp_path / "t5")
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra_ids}))
    with pytest.raises(DataError, match=r"extra_ids is .*0 to 10000, was expected"):
        Tokenizer.load(folder)


def test_a_damaged_character_map_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"spiece\.model is damaged: .*charsmap"):
        Tokenizer.load(write_spiece(tmp_path / "t5", char_map=b"\xff\xff"))


def test_a_bpe_model_under_the_name_of_t5s_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"spiece\.model is a BPE, a T5Tokenizer's model is Unigram"):
        Tokenizer.load(write_spiece(tmp_path / "t5", kind=2))
