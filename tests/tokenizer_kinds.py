"""A small tokenizer of every kind that published models have, each trained on the same few sentences."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from llm_quest.data.tokenizer import Tokenizer

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "Once upon a time there was a cat, and 12 dogs.\n",
    "### Response:\nUser: Four.  [INST] what is two plus two? [/INST] It is été! ",
)
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
META = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def finish(backend: Backend) -> Tokenizer:
    """The tokenizer with its begin token before every text, as Llama's."""
    backend.add_special_tokens(SPECIALS)
    begin = ("<s>", backend.token_to_id("<s>"))
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[begin])
    backend.post_processor = template
    return Tokenizer(backend, eos_tokens=["</s>"], bos_token="<s>", unk_token="<unk>")


def byte_level(add_prefix_space: bool) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 9, trainer)
    return finish(backend)


def train_sentencepiece_bpe() -> models.BPE:
    """SentencePiece's BPE with byte fallback: words begin with the meta space."""
    first = Backend(models.BPE(unk_token="<unk>"))
    first.normalizer = normalizers.Sequence([normalizers.Prepend(META), normalizers.Replace(" ", META)])
    first.pre_tokenizer = pre_tokenizers.Split(Regex(f"{META}[^{META}]*|[^{META}]+"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=430, special_tokens=SPECIALS + BYTES, show_progress=False)
    first.train_from_iterator(SENTENCES * 9, trainer)
    learned = json.loads(first.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return models.BPE(vocab=learned["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def byte_fallback(*, prepend: bool) -> Tokenizer:
    """Llama 2's with the Prepend normalizer; Gemma's without."""
    backend = Backend(train_sentencepiece_bpe())
    parts = [normalizers.Prepend(META)] if prepend else []
    backend.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", META)])
    steps = [decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    return finish(backend)


def metaspace(scheme: str) -> Tokenizer:
    backend = Backend(train_sentencepiece_bpe())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    steps = [decoders.Replace(META, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if scheme != "never" else steps)
    return finish(backend)


def word_piece() -> Tokenizer:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator(SENTENCES * 9, trainer)
    return finish(backend)


def unigram() -> Tokenizer:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    backend.train_from_iterator(SENTENCES * 9, trainer)
    return finish(backend)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(False),
    "byte-level, prefix space": lambda: byte_level(True),
    "byte fallback, Prepend": lambda: byte_fallback(prepend=True),
    "byte fallback": lambda: byte_fallback(prepend=False),
    "Metaspace always": lambda: metaspace("always"),
    "Metaspace first": lambda: metaspace("first"),
    "Metaspace never": lambda: metaspace("never"),
    "WordPiece": word_piece,
    "Unigram": unigram,
}


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()
