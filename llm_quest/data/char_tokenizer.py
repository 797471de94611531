"""A tokenizer of single characters, for tasks with small alphabets."""

from __future__ import annotations

import re
from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from llm_quest.data.tokenizer import END_OF_TEXT, Tokenizer
from llm_quest.errors import UsageError

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
