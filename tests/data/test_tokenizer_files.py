"""Every layout of tokenizer files gives the ids that transformers gives, and what cannot be read is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from llm_quest.data.sentencepiece_model import read_sentencepiece
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError
from tests.later import Later
from tests.tokenizer_kinds import META, SENTENCES, tokenizer_of, train_sentencepiece_bpe

transformers = Later("transformers")

TEXTS = ["in 1999 and 12345 we said hello", "The quick\n\n brown  fox's", "été 🙂", "a<|im_end|>b<tool>c<s>", "", " x"]


def write_slow(folder: Path, **settings) -> int:
    """vocab.json, merges.txt and tokenizer_config.json; the size of the vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [*SENTENCES * 9, *["in 1999 and 2024 and 12345 we said hello "] * 9]
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def token_entries(size: int, *names: str, special: bool = True) -> dict:
    return {str(size + number): {"content": name, "special": special} for number, name in enumerate(names)}


def check_equal(folder: Path) -> None:
    """Ids, names and text as transformers reads this folder."""
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, allow_special_tokens=True, add_special_tokens=special) == expected
    expected_end = () if theirs.eos_token_id is None else (theirs.eos_token_id,)
    assert (ours.eos_token_ids, ours.bos_token_id) == (expected_end, theirs.bos_token_id)
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.chat_template == theirs.chat_template
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer"])
def test_slow_files_are_read_as_their_class_reads_them(tmp_path: Path, name: str):
    size = write_slow(tmp_path)
    more = token_entries(size, "<|endoftext|>", "<|im_start|>", "<|im_end|>") | token_entries(
        size + 3, "<tool>", special=False
    )
    settings = {
        "tokenizer_class": name,
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": more,
        "model_max_length": 64,
    }
    settings["chat_template"] = "{{ messages[0].content }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check_equal(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("<|im_end|>", allow_special_tokens=True) == [size + 2]
    assert ours.encode("<tool>") == [size + 3]


def test_added_tokens_of_the_old_file_are_tokens(tmp_path: Path):
    size = write_slow(tmp_path, tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>")
    names = {"<|endoftext|>": size, "<|im_end|>": size + 1, "<tool>": size + 2}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    ours = Tokenizer.load(tmp_path)
    assert {name: ours.token_to_id(name) for name in names} == names
    assert ours.eos_token_ids == (size + 1,)
    assert ours.encode("a<tool>b") == [*ours.encode("a"), size + 2, *ours.encode("b")]
    assert "<tool>" not in ours.special_tokens


def test_a_token_beside_tokenizer_json_is_added_under_its_id(tmp_path: Path):
    ours = tokenizer_of("byte-level")
    ours.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    size = ours.vocab_size
    settings |= {"eos_token": "<|eot|>", "pad_token": "[PAD]", "added_tokens_decoder": token_entries(size, "<|call|>")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").unlink()
    check_equal(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert [again.token_to_id(name) for name in ("<|call|>", "<|eot|>", "[PAD]")] == [size, size + 1, size + 2]
    settings["added_tokens_decoder"] = token_entries(size + 7, "<|call|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"'<\|call\|>' has id \d+ in its files and would get"):
        Tokenizer.load(tmp_path)


def varint(value: int) -> bytes:
    parts = b""
    while value > 127:
        parts, value = parts + bytes([value & 127 | 128]), value >> 7
    return parts + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def write_sentencepiece(file: Path, pieces: list[tuple[str, float, int]], *, kind: int = 2) -> None:
    content = b"".join(field(1, field(1, t.encode()) + field(2, s) + field(3, k)) for t, s, k in pieces)
    training = field(3, kind) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    file.write_bytes(content + field(2, training) + field(3, field(1, b"identity")))


def llama_pieces() -> list[tuple[str, float, int]]:
    """Llama's layout: unknown, begin, end, 256 bytes, one user-defined symbol, characters and merges by rank."""
    vocabulary = sorted(
        json.loads(Backend(train_sentencepiece_bpe()).to_str())["model"]["vocab"].items(), key=lambda one: one[1]
    )
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    some = [name for name, _ in vocabulary if name not in ("<|im_start|>", "<|im_end|>")]
    order = sorted(some, key=lambda name: list(kinds).index(name) if name in kinds else len(kinds))
    order.insert(259, "<tool>")
    kinds["<tool>"] = 4
    return [(name, -float(place), kinds.get(name, 1)) for place, name in enumerate(order)]


def merge_by_score(text: str, pieces: list[tuple[str, float, int]]) -> list[int]:
    """SentencePiece's BPE by its definition: the neighbors whose piece has the highest score are merged first."""
    scores = {name: score for name, score, kind in pieces if kind == 1}
    ids, symbols = {name: number for number, (name, _, _) in enumerate(pieces)}, list(META + text.replace(" ", META))
    while True:
        found = [(scores[a + b], -at) for at, (a, b) in enumerate(zip(symbols, symbols[1:])) if a + b in scores]  # noqa: B905, RUF007
        if not found:
            break
        at = -max(found)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        number
        for one in symbols
        for number in ([ids[one]] if one in ids else [ids[f"<0x{byte:02X}>"] for byte in one.encode()])
    ]


def test_a_sentencepiece_model_is_converted(tmp_path: Path):
    pieces = llama_pieces()
    write_sentencepiece(tmp_path / "tokenizer.model", pieces)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    ours = Tokenizer.load(tmp_path)
    for text in ("The quick brown fox jumps over", "été 🙂 zq", "Once upon a time,  12"):
        assert ours.encode(text, add_special_tokens=False) == merge_by_score(text, pieces)
        assert ours.encode(text) == [1, *merge_by_score(text, pieces)]
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_token_id, ours.eos_token_ids, ours.vocab_size) == (1, (2,), len(pieces))
    assert 259 in ours.encode("a<tool>b")
    assert set(ours.special_tokens) == {"<unk>", "<s>", "</s>"}
    assert read_sentencepiece(tmp_path / "tokenizer.model").byte_fallback


def test_what_does_not_convert_says_what_would(tmp_path: Path):
    write_sentencepiece(tmp_path / "tokenizer.model", llama_pieces()[:300])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLNetTokenizer"}))
    with pytest.raises(DataError, match=r"class XLNetTokenizer is not converted.*AutoTokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match=r"tiktoken's ranks.*TikTokenConverter"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "qwen.tiktoken")
    with pytest.raises(DataError, match=r"no tokenizer at .*qwen\.tiktoken is of another format"):
        Tokenizer.load(tmp_path)
    write_slow(tmp_path, tokenizer_class="WhisperTokenizer")
    with pytest.raises(DataError, match=r"names the class WhisperTokenizer.*GPT2Tokenizer, Qwen2Tokenizer"):
        Tokenizer.load(tmp_path)


def test_the_piece_with_the_highest_score_is_merged_first(tmp_path: Path):
    """By hand: "bc" before "ab", whatever their order in the file."""
    letters = [(letter, -9.0, 1) for letter in f"abc{META}"]
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *letters, ("ab", -5.0, 1), ("bc", -1.0, 1)]
    write_sentencepiece(tmp_path / "tokenizer.model", pieces)
    ours = Tokenizer.load(tmp_path)
    assert ours.encode("abc", add_special_tokens=False) == [6, 3, 8] == merge_by_score("abc", pieces)
