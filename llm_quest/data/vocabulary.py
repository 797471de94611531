"""Builds tokenizers (a byte-level BPE trained on text, one of single characters), and says which bytes each token has:
where a text may be cut so that a token ends there.

Commonly got wrong: decoding a token and encoding what came out. A token that holds half a character decodes to U+FFFD,
whose three bytes are in no text, and every boundary after it is misplaced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer, require_valid_unicode
from llm_quest.data.tokenizer_files import END_OF_TEXT, PRETOKENIZER_PATTERN
from llm_quest.errors import DataError, UsageError

MAX_TRAINING_WORD = 256  # characters; training compares all pairs of a word again for each merge


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Train a byte-level BPE on texts. The first special token ends (and begins) a document; they get the ids 0, 1,
    ...

    A pair is merged only if it occurred twice: little text gives fewer tokens than requested, as
    `tokenizer.vocab_size` says. A word of more than MAX_TRAINING_WORD characters (a text without spaces, a data URL) is
    cut for training, whose time grows with the square of a word. UsageError below 256 + special tokens; DataError
    without text. The same texts give the same tokenizer."""
    smallest = 256 + len(special_tokens)
    if not special_tokens or len(set(special_tokens)) < len(special_tokens) or not all(special_tokens):
        raise UsageError(f"special tokens must be distinct, not empty, and at least one; got {list(special_tokens)}")
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need {smallest}"
        )
    engine = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZER_PATTERN), "isolated")
    pieces = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{1,{MAX_TRAINING_WORD}}}"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, to_bytes])
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _CharacterCounter(texts)
    engine.train_from_iterator(seen, trainer=trainer)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    if not seen.characters:
        raise DataError("a tokenizer cannot be trained without text: every document is empty")
    pad = "<|pad|>" if "<|pad|>" in special_tokens else None
    return Tokenizer(engine, eos_tokens=special_tokens[:1], bos_token=special_tokens[0], pad_token=pad)


class _CharacterCounter:
    """Passes texts on and counts their characters."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterable[str]:  # type: ignore[override]
        for text in self.texts:
            self.characters += len(text)
            yield require_valid_unicode(text)


PAD_TOKEN, UNK_TOKEN = "<|pad|>", "<|unknown|>"


def character_tokenizer(alphabet: str, words: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer with one token per character. Ids: end of text 0, padding 1, unknown 2, then the characters in
    order of their code points, then the words, each of which is one token (and text like any other)."""
    if not alphabet:
        raise UsageError("an alphabet has at least one character")
    specials = [END_OF_TEXT, PAD_TOKEN, UNK_TOKEN]
    vocabulary = {token: number for number, token in enumerate([*specials, *sorted(set(alphabet)), *words])}
    engine = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*map(re.escape, words), r"[\s\S]"])), "isolated")
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens(specials)
    return Tokenizer(engine, eos_tokens=(END_OF_TEXT,), bos_token=END_OF_TEXT, pad_token=PAD_TOKEN, unk_token=UNK_TOKEN)


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each id, from the vocabulary and never from decoded text; a control token has none. For
    byte-level BPE and for tokens that are plain text; UsageError for other kinds (SentencePiece writes its spaces
    differently)."""
    engine, controls = tokenizer.backend_tokenizer, set(tokenizer.special_tokens)
    added = {number: token.content for number, token in engine.get_added_tokens_decoder().items()}
    kind = (json.loads(engine.to_str())["decoder"] or {}).get("type")
    if kind not in ("ByteLevel", "Fuse"):
        raise UsageError(
            f"the bytes of single tokens are not known for a tokenizer with the decoder {kind}: take ByteLevel "
            "(GPT-2, Llama 3, Qwen) or of whole characters"
        )
    letters = unicode_to_bytes()
    pieces: list[bytes] = []
    for number in map(int, ids):
        name = engine.id_to_token(number)
        if name is None:
            raise UsageError(f"{number} is no id of this tokenizer, which has {tokenizer.vocab_size}")
        if name in controls:
            pieces.append(b"")
        else:
            plain = kind == "Fuse" or number in added
            pieces.append(name.encode() if plain else bytes(letters[letter] for letter in name))
    return pieces


def unicode_to_bytes() -> dict[str, int]:
    """GPT-2's character for each byte: printable ones map to themselves, the others to code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
