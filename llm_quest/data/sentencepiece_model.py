"""SentencePiece models (`tokenizer.model`, `spiece.model`) read without the sentencepiece package, as transformers
converts them.

The file is a protocol buffer (github.com/google/sentencepiece, src/sentencepiece_model.proto): pieces with a score and
a type, and how the model was trained. BPE: of all neighboring pieces whose concatenation is a piece, the one with the
highest score is merged first; so every way of cutting a piece into two is a merge, in the order of scores. Unigram
(Kudo 2018, arXiv:1804.10959): the scores are log-probabilities.

T5's text form differs from Llama's: characters are first replaced by a map (NFKC and more) that the file holds, runs of
white space are one space, an end token is put behind every text, and a hundred sentinels <extra_id_99> .. <extra_id_0>
follow the file's pieces.

Commonly got wrong: user-defined symbols are tokens that are never cut, and no control tokens; T5's first sentinel is
the last token.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llm_quest.errors import DataError

META_SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
CONTROL, USER_DEFINED = 3, 4
"""Values of ModelType, and of a piece's Type."""
FILES = {"tokenizer.model": "LlamaTokenizer", "spiece.model": "T5Tokenizer"}
"""Names of model files, and the tokenizer class where tokenizer_config.json names none."""
Converted = tuple[tokenizers.Tokenizer, dict[str, Any]]
"""A tokenizer, and the settings that its class has where tokenizer_config.json says nothing."""


@dataclass(frozen=True)
class Piece:
    """A token of the model. type: normal 1, unknown 2, control 3, user-defined 4, unused 5, byte 6."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a model file holds, as far as ids depend on it. charsmap: a map of characters, in SentencePiece's form;
    empty without one."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    charsmap: bytes

    @property
    def token_names(self) -> dict[str, str]:
        """The names of the unknown, begin and end token; -1 stands for none."""
        ids = {"unk_token": self.unk_id, "bos_token": self.bos_id, "eos_token": self.eos_id}
        return {key: self.pieces[number].text for key, number in ids.items() if 0 <= number < len(self.pieces)}

    def to_bpe_merges(self) -> list[tuple[str, str]]:
        """The two parts of every piece, by the score of the piece."""
        ids = {piece.text: number for number, piece in enumerate(self.pieces)}
        merges = []
        for piece in self.pieces:
            cuts = [(piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text))]
            known = [(ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids]
            merges += [(-piece.score, number, left, right) for number, (_, _, left, right) in enumerate(sorted(known))]
        return [(left, right) for _, _, left, right in sorted(merges, key=lambda merge: merge[0])]


def convert_sentencepiece(file: Path, settings: Mapping[str, Any]) -> Converted:
    """A SentencePiece model as a tokenizer, and its class's settings. settings: tokenizer_config.json, which names the
    class. DataError for a class whose text form is not known here."""
    name = str(settings.get("tokenizer_class", FILES[file.name])).removesuffix("Fast")
    if name not in CONVERTERS:
        raise DataError(
            f"{file}: a SentencePiece model of the class {name} is not converted here (known: "
            f"{', '.join(CONVERTERS)}): load it with transformers' AutoTokenizer and save_pretrained it, "
            "which writes a tokenizer.json"
        )
    return CONVERTERS[name](file, settings)


def convert_with_prefix_space(file: Path, settings: Mapping[str, Any]) -> Converted:
    """Llama's form: a space stands before every text, unless add_prefix_space is false."""
    return convert_llama(file, prepend=settings.get("add_prefix_space") is not False)


def convert_plain(file: Path, settings: Mapping[str, Any]) -> Converted:
    """Gemma's form: spaces as they are."""
    return convert_llama(file, prepend=False)


def convert_llama(file: Path, *, prepend: bool) -> Converted:
    """Spaces are pieces, bytes stand for characters that the model lacks."""
    model = read_sentencepiece(file)
    if model.charsmap:
        raise DataError(
            f"{file} normalizes text by a character map, which its class does not read: load it with transformers' "
            "AutoTokenizer and save_pretrained it, which writes a tokenizer.json"
        )
    backend = tokenizers.Tokenizer(build_model(model))
    before = [normalizers.Prepend(META_SPACE)] if prepend else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", META_SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prepend else []
    steps = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    backend.decoder = decoders.Sequence(steps)
    add_marked_pieces(backend, model)
    return backend, {"add_bos_token": True} | model.token_names


def convert_t5(file: Path, settings: Mapping[str, Any]) -> Converted:
    """T5's form (Raffel et al. 2020, arXiv:1910.10683)."""
    model = read_sentencepiece(file)
    if model.model_type != UNIGRAM:
        raise DataError(f"{file} is a BPE, a T5Tokenizer's model is Unigram: name its class in tokenizer_config.json")
    count = settings.get("extra_ids", EXTRA_IDS)
    if type(count) is not int or not 0 <= count <= MAX_EXTRA_IDS:
        raise DataError(
            f"{file.parent}: extra_ids is {count!r}; a number of sentinels, 0 to {MAX_EXTRA_IDS}, was expected"
        )
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(count))]
    scores = [(piece.text, piece.score) for piece in model.pieces] + [(name, 0.0) for name in sentinels]
    try:
        backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
        if model.charsmap:
            backend.normalizer = normalizers.Precompiled(model.charsmap)
    except Exception as error:  # the package raises bare Exception for a broken map, or an id beyond the pieces
        raise DataError(f"{file} is damaged: {error}") from error
    spaces = pre_tokenizers.Metaspace(replacement=META_SPACE, prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    backend.decoder = decoders.Metaspace(replacement=META_SPACE, prepend_scheme="always", split=True)
    add_marked_pieces(backend, model)
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in sentinels])
    names = model.token_names | {"pad_token": "<pad>"}
    return backend, {"add_bos_token": False, "add_eos_token": True} | names


EXTRA_IDS, MAX_EXTRA_IDS = 100, 10_000
CONVERTERS: dict[str, Callable[[Path, Mapping[str, Any]], Converted]] = {
    "LlamaTokenizer": convert_with_prefix_space,
    "CodeLlamaTokenizer": convert_with_prefix_space,
    "GemmaTokenizer": convert_plain,
    "T5Tokenizer": convert_t5,
    "MT5Tokenizer": convert_t5,
}
"""Tokenizer classes whose text form is known."""


def add_marked_pieces(backend: tokenizers.Tokenizer, model: SentencePieceModel) -> None:
    """Control tokens, and the symbols that a user defined."""
    special = [tokenizers.AddedToken(p.text, normalized=False, special=True) for p in model.pieces if p.type == CONTROL]
    backend.add_special_tokens(special)
    own = [tokenizers.AddedToken(p.text, normalized=False) for p in model.pieces if p.type == USER_DEFINED]
    backend.add_tokens(own)


def build_model(model: SentencePieceModel) -> models.Model:
    if model.model_type == UNIGRAM:
        scores = [(piece.text, piece.score) for piece in model.pieces]
        return models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    return models.BPE(
        vocab={piece.text: number for number, piece in enumerate(model.pieces)},
        merges=model.to_bpe_merges(),
        unk_token=model.pieces[model.unk_id].text,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def begin_and_end_template(
    backend: tokenizers.Tokenizer, begin: str | None, end: str | None
) -> processors.TemplateProcessing:
    """The post-processor that puts these tokens around a text."""
    around = [*([begin] if begin else []), "$A", *([end] if end else [])]
    pair = [*around, *(part.replace("$A", "$B") for part in around)]
    special = [(name, backend.token_to_id(name)) for name in (begin, end) if name]
    return processors.TemplateProcessing(single=" ".join(around), pair=" ".join(pair), special_tokens=special)


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Read a model file. DataError where it is none, or of a kind that is not BPE or Unigram."""
    try:
        fields = list(parse_protobuf(file.read_bytes()))
        pieces = tuple(read_piece(value) for number, value in fields if number == 1)
        training, normal = ({n: v for number, value in fields if number == key for n, v in parse_protobuf(value)}
                            for key in (2, 3))  # fmt: skip
    except (ValueError, LookupError, struct.error, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a SentencePiece model: {error}{tiktoken_hint(file)}") from None
    kind = training.get(3, UNIGRAM)
    if not pieces or kind not in (UNIGRAM, BPE):
        raise DataError(f"{file} is not a SentencePiece model of the kind BPE or Unigram{tiktoken_hint(file)}")
    unknown, begin, end = (training.get(field, number) for number, field in enumerate((40, 41, 42)))
    return SentencePieceModel(pieces, kind, bool(training.get(35, 0)), unknown, begin, end, charsmap=normal.get(2, b""))


def read_piece(content: bytes) -> Piece:
    values = dict(parse_protobuf(content))
    return Piece(values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, 1))


def parse_protobuf(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: (number, value), an int or bytes. ValueError for what is none."""
    at = 0
    while at < len(content):
        key, at = read_varint(content, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = read_varint(content, at)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"unknown wire type {wire}")
        size, at = read_varint(content, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(content):
            raise ValueError("it ends within a field")
        yield number, content[at : at + size]
        at += size


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first (negative ones in two's complement of 64), and where the next
    field begins."""
    value = shift = 0
    while shift < 70:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return (value - 2**64 if value >= 2**63 else value), at
    raise ValueError("a number does not end")


def tiktoken_hint(file: Path) -> str:
    """What to do about a file of tiktoken's ranks (base64 and a number in each line), which name no word pattern and no
    control tokens; empty for any other."""
    first = file.read_bytes()[:200].split(b"\n")[0].split()
    if len(first) == 2 and first[1].isdigit():
        return (
            "; it holds tiktoken's ranks, which do not say how words are cut: take the repository's tokenizer.json "
            "(Llama 3 has one), or convert it with transformers' TikTokenConverter"
        )
    return ""
