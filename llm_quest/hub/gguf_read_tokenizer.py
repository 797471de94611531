"""Reads the tokenizer of a GGUF file (`gguf_tokenizer.py` has the format)."""

from __future__ import annotations

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llm_quest.data.sentencepiece_model import BPE, Piece, SentencePieceModel, begin_and_end_template
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokenizer_files import require_working
from llm_quest.errors import DataError
from llm_quest.hub.gguf import FLOAT32, INT32, STRING, TOKENIZER, GGUFFile
from llm_quest.hub.gguf_pretokenizers import SAME_SPLIT, WORD_SPLITS, build_pre_tokenizer
from llm_quest.hub.gguf_tokenizer import (
    BYTE,
    CONTROL,
    META_SPACE,
    NORMAL,
    NORMALIZER_KEY,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """Read the tokenizer of a file. DataError if it has none, or one of an unknown kind."""
    kind = file.get(f"{TOKENIZER}model")
    if kind not in READERS:
        raise DataError(
            f"{file.file.name}: the tokenizer is {str(kind)[:40]!r}; known: {', '.join(READERS)}"
            if kind
            else f"{file.file.name} has no tokenizer (no {TOKENIZER}model)"
        )
    tokens = read_list(file, "tokens", STRING)
    types = read_list(file, "token_type", INT32, [NORMAL] * len(tokens))
    if len(types) < len(tokens) or len(set(tokens)) != len(tokens):
        raise DataError(f"{file.file.name}: {len(tokens)} tokens have {len(types)} types, or a token occurs twice")
    try:
        backend, add_bos = READERS[kind](file, tokens, types)
    except DataError:
        raise
    except Exception as error:  # `tokenizers` raises bare Exception for a vocabulary that it refuses
        raise DataError(f"{file.file.name}: its tokenizer cannot be made: {str(error)[:200]}") from None
    add_marked_tokens(backend, tokens, types)
    names = {
        key: token_of(file, tokens, f"{key}_token_id") for key in ("bos", "eos", "unknown", "padding", "eot", "eom")
    }
    begin = names["bos"] if read_flag(file, "add_bos_token", add_bos) else None
    end = names["eos"] if read_flag(file, "add_eos_token", False) else None
    backend.post_processor = begin_and_end_template(backend, begin, end)
    require_working(backend, file.file)
    template, context = file.get("tokenizer.chat_template"), file.get(f"{file.architecture}.context_length")
    return Tokenizer(
        backend,
        eos_tokens=[names["eos"]] if names["eos"] else [],
        bos_token=names["bos"],
        pad_token=names["padding"],
        unk_token=names["unknown"],
        chat_template=template if isinstance(template, str) else None,
        model_max_length=context if type(context) is int and 0 < context < 2**31 else None,
    )


def read_list(file: GGUFFile, name: str, element: int, default: list[Any] | None = None) -> list[Any]:
    value = file.metadata.get(TOKENIZER + name)
    if value is None and default is not None:
        return default
    if value is None or value.element != element:
        raise DataError(f"{file.file.name}: {TOKENIZER}{name} is missing, or no list of the expected type")
    return list(value.value)


def read_flag(file: GGUFFile, name: str, default: bool) -> bool:
    value = file.get(TOKENIZER + name, default)
    return value if isinstance(value, bool) else default


def token_of(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    number = file.get(TOKENIZER + name)
    return tokens[number] if type(number) is int and 0 <= number < len(tokens) else None


def read_byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    given = str(file.get(f"{TOKENIZER}pre", "missing"))
    name = SAME_SPLIT.get(given, given)
    if name not in WORD_SPLITS:
        raise DataError(
            f"{file.file.name}: {TOKENIZER}pre is {given[:40]!r}, a way to cut words that is unknown here; known: "
            f"{', '.join((*WORD_SPLITS, *SAME_SPLIT))}"
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in read_list(file, "merges", STRING)]
    split = WORD_SPLITS[name]
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split.ignore_merges)  # type: ignore[arg-type]
    )
    if file.get(NORMALIZER_KEY, "NFC" if split.nfc else "") == "NFC":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer, backend.decoder = build_pre_tokenizer(name), decoders.ByteLevel()
    return backend, split.add_bos


def read_sentencepiece_bpe(file: GGUFFile, tokens: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Read SentencePiece's BPE: every split of a normal token into two is a merge, in the order of the tokens'
    scores."""
    scores = read_list(file, "scores", FLOAT32)
    if len(scores) < len(tokens):
        raise DataError(f"{file.file.name}: {len(tokens)} tokens have {len(scores)} scores")
    normal = tuple(Piece(*one) for one in zip(tokens, scores, types, strict=False) if one[2] == NORMAL)
    merges = SentencePieceModel(normal, BPE, False, -1, -1, -1, charsmap=b"").to_bpe_merges()
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    unknown = token_of(file, tokens, "unknown_token_id") or next(
        (token for token, kind in zip(tokens, types, strict=False) if kind == UNKNOWN), None
    )
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    )
    prepend = read_flag(file, "add_space_prefix", True)
    before = [normalizers.Prepend(META_SPACE)] if prepend else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", META_SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prepend else []
    steps = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *after])
    return backend, True


def read_unigram(file: GGUFFile, tokens: list[str], types: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    scores = read_list(file, "scores", FLOAT32)
    unknown = file.get(f"{TOKENIZER}unknown_token_id", 2)
    pieces = list(zip(tokens, scores, strict=False))
    while pieces and types[len(pieces) - 1] == UNUSED:
        pieces.pop()
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    charsmap = file.get(f"{TOKENIZER}precompiled_charsmap")
    if charsmap:
        backend.normalizer = normalizers.Precompiled(bytes(one & 255 for one in charsmap))
    scheme = "always" if read_flag(file, "add_space_prefix", True) else "never"
    spaces = pre_tokenizers.Metaspace(replacement=META_SPACE, prepend_scheme=scheme, split=True)
    squeeze = [pre_tokenizers.WhitespaceSplit()] if read_flag(file, "remove_extra_whitespaces", False) else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*squeeze, spaces]) if squeeze else spaces
    backend.decoder = decoders.Metaspace(replacement=META_SPACE, prepend_scheme=scheme, split=True)
    return backend, False


def add_marked_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Add the control tokens and the user-defined tokens."""
    control = [
        AddedToken(t, normalized=False, special=True)
        for t, kind in zip(tokens, types, strict=False)
        if kind in (CONTROL, UNKNOWN)
    ]
    own = [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=False) if kind == USER_DEFINED]
    backend.add_special_tokens(control)
    backend.add_tokens(own)


READERS = {"gpt2": read_byte_level, "llama": read_sentencepiece_bpe, "t5": read_unigram}
"""tokenizer.ggml.model -> its reader: the tokenizer, and whether a begin token is put before a text by default."""
