"""Texts on which ways of cutting words differ, and tokenizers whose vocabularies show it."""

from __future__ import annotations

import random
import unicodedata

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llm_quest.data.sentencepiece_model import BPE, Piece, SentencePieceModel
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.hub.gguf_pretokenizers import WORD_SPLITS, build_pre_tokenizer
from tests.tokenizer_kinds import tokenizer_of

WRITTEN = (
    "", " ", "  ", "\n", "\n\n \n", "\t tab", "a\r\nb\r\n\r\nc", "Hello, world!", " leading", "trailing  ", "a  b   c",
    "1", "12", "123", "1234", "12345", "123456", "1234567", "3.14159 and 1,000,000", "2026-11-29T08:00", "x1y22z333",
    "I'm you're THEY'LL He'D we've it's DON'T", "'s 'S 'tis 'Twas", "don’t", "CamelCaseWords HTTPServer iPhone",
    "def f(x):\n    return x ** 2  # comment", "for(int i=0;i<10;++i){\n\ta[i]+=1;\n}\n", "#include <stdio.h>//x",
    "https://example.org/a?b=c&d=%20#e", "Grüße, naïve café", "Ελληνικά русский", "日本語のテキスト。中文，标点！",
    "한국어 문장",
    "العربية עברית", "हिन्दी में", "ภาษาไทย", "e\u0301 combining", "\u00a0nbsp\u2003em", "zero\u200bwidth", "😀😃 🎉",
    "👨\u200d👩\u200d👧 family", "🇩🇪🇫🇷", "½ ² ³ Ⅷ ①", "$5 €10 £3", "a_b__c", "--- *** ===", "...!?…", "“quoted” ‘text’",
    "ǅ ǆ Ǆ ʰ", "İstanbul ıI", "ﬁ ﬂ", "\x07bell", "tab\tseparated\tvalues", "end\n", "\n start", "A\u0301E\u0308",
)  # fmt: skip
ALPHABET = "ab Z09 \n\t'.,-_()é日😀\u0301’sS/"


def sample_texts(count: int = 200) -> list[str]:
    """The written texts, and random ones of characters at which words are cut."""
    rng = random.Random(0)
    drawn = ["".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 24))) for _ in range(count)]
    return [*WRITTEN, *drawn][:count]


def train_byte_level(split: str, *, nfc: bool = False, size: int = 900) -> Tokenizer:
    """Byte-level BPE with one of llama.cpp's ways to cut words, trained on the texts themselves, so that digits, spaces
    and contractions are merged where the split allows it."""
    ignore_merges = WORD_SPLITS[split].ignore_merges
    backend = Backend(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = build_pre_tokenizer(split), decoders.ByteLevel()
    if nfc:
        backend.normalizer = normalizers.NFC()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator([text for text in sample_texts(400) for _ in range(3)], trainer)
    return Tokenizer(backend, eos_tokens=["<|endoftext|>"])


def sentencepiece_bpe(*, prepend: bool = True) -> Tokenizer:
    """SentencePiece's BPE as converted from a model file: every way of cutting a token in two is a merge."""
    trained = tokenizer_of("byte fallback, Prepend")
    names = {number: name for name, number in trained.backend_tokenizer.get_vocab().items()}
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<|im_start|>": 3, "<|im_end|>": 3}
    pieces = tuple(
        Piece(names[number], float(-number), kinds.get(names[number], 6 if names[number].startswith("<0x") else 1))
        for number in range(len(names))
    )
    normal = SentencePieceModel(tuple(p for p in pieces if p.type == 1), BPE, False, -1, -1, -1, b"")
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    merges = normal.to_bpe_merges()
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    before = [normalizers.Prepend("\u2581")] if prepend else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, eos_tokens=["</s>"], bos_token="<s>", unk_token="<unk>")


def has_combining_mark(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


def has_other_space(text: str) -> bool:
    return any(character.isspace() and character != " " for character in text)


def differing_texts(ours: Tokenizer, tokenize: object, count: int = 200) -> list[str]:
    """The texts whose ids differ. tokenize(text): the ids there."""
    return [
        text
        for text in sample_texts(count)
        if ours.encode(text, allow_special_tokens=False, add_special_tokens=False) != tokenize(text)  # type: ignore[operator]
    ]
