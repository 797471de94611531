"""Tokenizers in a GGUF file: what comes back gives the ids that went in; what llama.cpp lacks is refused."""

from __future__ import annotations

import pytest
from tokenizers import normalizers, pre_tokenizers

import llm_quest as quest
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.gguf import STRING, array, read_gguf, string, uint32, write_gguf
from llm_quest.hub.gguf_export import save_gguf
from llm_quest.hub.gguf_pretokenizers import WORD_SPLITS, build_pre_tokenizer, find_word_split
from llm_quest.hub.gguf_read_tokenizer import read_tokenizer
from llm_quest.hub.gguf_tokenizer import LEADING_SPACE, tokenizer_keys
from llm_quest.models.decoder import GenerationConfig
from tests.gguf_models import tiny
from tests.gguf_texts import differing_texts, sample_texts, sentencepiece_bpe, train_byte_level
from tests.tokenizer_kinds import tokenizer_of


def t5_unigram() -> Tokenizer:
    """Unigram in T5's text form: runs of white space are one."""
    unigram = tokenizer_of("Unigram")
    backend = type(unigram.backend_tokenizer).from_str(unigram.backend_tokenizer.to_str())
    spaces = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    return unigram.with_backend(backend, None)


KINDS = {name: lambda name=name: train_byte_level(name, size=600) for name in WORD_SPLITS} | {
    "sentencepiece": sentencepiece_bpe,
    "sentencepiece, no prefix": lambda: sentencepiece_bpe(prepend=False),
    "T5": t5_unigram,
}


def write_and_read(tokenizer: Tokenizer, rows: int, tmp_path, **options):
    """The keys in a file."""
    keys, notes = tokenizer_keys(tokenizer, rows, **options)
    write_gguf(tmp_path / "t.gguf", keys, {})
    return read_gguf(tmp_path / "t.gguf"), notes


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_gives_the_same_ids_and_texts(kind, tmp_path):
    tokenizer = KINDS[kind]()
    file, _ = write_and_read(tokenizer, tokenizer.vocab_size + 7, tmp_path)
    back = read_tokenizer(file)
    assert differing_texts(tokenizer, lambda text: back.encode(text, add_special_tokens=False)) == []
    texts = [f"<|im_start|>{text}<|im_end|>" for text in sample_texts(60)]
    for text in texts:
        assert back.encode(text, allow_special_tokens=True) == tokenizer.encode(text, allow_special_tokens=True)
        assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (back.vocab_size, back.eos_token_ids) == (tokenizer.vocab_size, tokenizer.eos_token_ids)
    assert back.special_token_ids == tokenizer.special_token_ids


def test_the_splits_differ_on_the_texts():
    """So that a test of one of them would see another."""
    seen = {}
    for name in WORD_SPLITS:
        splitter = build_pre_tokenizer(name)
        words = [[word for word, _ in splitter.pre_tokenize_str(text)] for text in sample_texts()]
        seen[name] = (str(words), WORD_SPLITS[name].ignore_merges)
    assert len(set(seen.values())) == len(WORD_SPLITS)


def test_a_split_is_found_by_its_pattern():
    for name, split in WORD_SPLITS.items():
        tokenizer = train_byte_level(name, size=300)
        import json

        content = json.loads(tokenizer.backend_tokenizer.to_str())
        assert find_word_split(content["pre_tokenizer"], split.ignore_merges) == name
    assert (
        find_word_split({"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}, False)
        is None
    )


def test_types_specials_and_rows_without_a_token(tmp_path):
    tokenizer = sentencepiece_bpe().with_added_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    generation = GenerationConfig(None, (2, 3), None)
    file, notes = write_and_read(tokenizer, tokenizer.vocab_size + 2, tmp_path, generation=generation)
    tokens, types = (file.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    kind = dict(zip(tokens, types, strict=True))
    assert [kind[one] for one in ("<unk>", "<s>", "<0x41>", "<tool>", tokens[-1])] == [2, 3, 6, 4, 5]
    assert tokens[-1] == f"[PAD{tokenizer.vocab_size + 1}]"
    ids = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "unknown")]
    assert ids == [1, 2, 3, 0]
    assert file.get("tokenizer.chat_template") == tokenizer.chat_template
    back = read_tokenizer(file)
    assert back.encode("a <tool> b", add_special_tokens=False) == tokenizer.encode(
        "a <tool> b", add_special_tokens=False
    )
    assert notes == []


def test_begin_and_end_tokens_around_a_text(tmp_path):
    plain, around = train_byte_level("gpt-2", size=300), tokenizer_of("byte-level")
    for tokenizer, add_bos in ((plain, False), (around, True)):
        file, _ = write_and_read(tokenizer, tokenizer.vocab_size, tmp_path)
        assert (file.get("tokenizer.ggml.add_bos_token"), file.get("tokenizer.ggml.add_eos_token")) == (add_bos, False)
        assert read_tokenizer(file).encode("a") == tokenizer.encode("a")
        (tmp_path / "t.gguf").unlink()


def test_nfc_is_kept_and_named(tmp_path):
    tokenizer = train_byte_level("qwen2", nfc=True, size=300)
    file, notes = write_and_read(tokenizer, tokenizer.vocab_size, tmp_path)
    assert "NFC" in notes[0]
    assert read_tokenizer(file).encode("e\u0301") == tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_tokens_beyond_the_embedding_are_left_out(tmp_path):
    tokenizer = train_byte_level("gpt-2", size=300).with_added_tokens(["<image>"])
    file, notes = write_and_read(tokenizer, 300, tmp_path)
    assert len(file.get("tokenizer.ggml.tokens")) == 300
    assert "<image>" in notes[0]


def test_a_space_that_is_put_before_every_text_is_named():
    assert tokenizer_keys(tokenizer_of("Unigram"), 200)[1] == [LEADING_SPACE]


def with_normalizer() -> Tokenizer:
    tokenizer = train_byte_level("gpt-2", size=300)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def without_end() -> Tokenizer:
    return Tokenizer(train_byte_level("gpt-2", size=300).backend_tokenizer)


LACKING = {
    "WordPiece": (lambda: tokenizer_of("WordPiece"), "WordPiece"),
    "prefix space": (lambda: tokenizer_of("byte-level, prefix space"), "no name for how this tokenizer cuts words"),
    "fewer merges than cuts": (lambda: tokenizer_of("byte fallback"), "no merge of this tokenizer"),
    "lower case": (with_normalizer, "Lowercase"),
    "no end": (without_end, "names no end token"),
}


@pytest.mark.parametrize("kind", LACKING)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(kind, tmp_path):
    make, words = LACKING[kind]
    tokenizer = make()
    model = quest.build(tiny("llama3.2", vocab_size=tokenizer.vocab_size))
    with pytest.raises(UsageError, match=words):
        save_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


CHANGED = {
    "no tokenizer": ({"drop": "model"}, "has no tokenizer"),
    "another kind": ({"model": string("rwkv")}, "'rwkv'"),
    "an unknown split": ({"pre": string("new-bpe")}, "'new-bpe'"),
    "no merges": ({"drop": "merges"}, "merges is missing"),
    "a token twice": ({"tokens": array(STRING, ["a", "a"])}, "occurs twice"),
    "tokens of another type": ({"tokens": uint32(3)}, "no list"),
    "merges of what is no token": ({"merges": array(STRING, ["qq zz"])}, "cannot be made"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_damaged_tokenizer_is_refused_in_a_message(kind, tmp_path):
    changes, words = CHANGED[kind]
    tokenizer = train_byte_level("gpt-2", size=300)
    keys, _ = tokenizer_keys(tokenizer, 300)
    dropped = f"tokenizer.ggml.{changes.get('drop')}"
    keys = {key: value for key, value in keys.items() if key != dropped}
    keys |= {f"tokenizer.ggml.{key}": value for key, value in changes.items() if key != "drop"}
    write_gguf(tmp_path / "t.gguf", keys, {})
    with pytest.raises(DataError, match=words):
        read_tokenizer(read_gguf(tmp_path / "t.gguf"))


def test_generate_writes_what_the_folder_writes(tmp_path):
    tokenizer = train_byte_level("qwen2", size=300)
    model = quest.build(tiny("qwen3", vocab_size=300), seed=1)
    save_gguf(model, tokenizer, tmp_path / "m.gguf")
    from llm_quest.hub.load_save import load_model_and_tokenizer

    read, text = load_model_and_tokenizer(tmp_path / "m.gguf")
    ids = text.encode("Hello, world! ")
    ours, theirs = (quest.generate(one, [ids], max_new_tokens=12, temperature=0.0) for one in (model, read))
    assert ours[0].tokens == theirs[0].tokens


def test_a_template_finds_no_begin_token_where_the_tokenizer_has_none(tmp_path):
    tokenizer = Tokenizer(train_byte_level("qwen2", size=400).backend_tokenizer, eos_tokens=["<|endoftext|>"])
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    again = read_tokenizer(write_and_read(tokenizer, tokenizer.vocab_size, tmp_path)[0])
    assert (tokenizer.bos_token, again.bos_token) == (None, "<|endoftext|>")  # llama.cpp's too
    texts = [ChatTemplate(one).render_prompts([[{"role": "user", "content": "Hi"}]]) for one in (tokenizer, again)]
    assert texts == [["Hi"], ["Hi"]]
