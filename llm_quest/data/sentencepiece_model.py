"""SentencePiece models (`tokenizer.model`) read without the sentencepiece package, as transformers converts them.

The file is a protocol buffer (github.com/google/sentencepiece, src/sentencepiece_model.proto): pieces with a score and
a type, and how the model was trained. BPE: of all neighbouring pieces whose concatenation is a piece, the one with the
highest score is merged first; so every way of cutting a piece into two is a merge, in the order of scores. Unigram
(Kudo 2018, arXiv:1804.10959): the scores are log-probabilities.

Commonly got wrong: user-defined symbols are tokens that are never cut, and no control tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from llm_quest.errors import DataError

META_SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
CONTROL, USER_DEFINED = 3, 4
"""Values of ModelType, and of a piece's Type."""
CONVERTIBLE_CLASSES = {"LlamaTokenizer": True, "CodeLlamaTokenizer": True, "GemmaTokenizer": False}
"""Tokenizer classes whose text form is known: whether they put a space before a text."""


@dataclass(frozen=True)
class Piece:
    """A token of the model. type: normal 1, unknown 2, control 3, user-defined 4, unused 5, byte 6."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model holds, as far as ids depend on it."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    unk_id: int
    bos_id: int
    eos_id: int
    has_charsmap: bool

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


def convert_sentencepiece(file: Path, settings: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """A SentencePiece model as a tokenizer, and the names of its unknown, begin and end token. settings:
    tokenizer_config.json, which names its class. DataError for a class whose text form is not known here."""
    name = str(settings.get("tokenizer_class", "LlamaTokenizer")).removesuffix("Fast")
    if name not in CONVERTIBLE_CLASSES:
        raise DataError(
            f"{file}: a SentencePiece model of the class {name} is not converted here (known: "
            f"{', '.join(CONVERTIBLE_CLASSES)}): load it with transformers' AutoTokenizer and save_pretrained it, "
            "which writes a tokenizer.json"
        )
    model = read_sentencepiece(file)
    if model.has_charsmap:
        raise DataError(
            f"{file} normalises text by a character map, which is not read here: load it with transformers' "
            "AutoTokenizer and save_pretrained it, which writes a tokenizer.json"
        )
    backend = tokenizers.Tokenizer(build_model(model))
    prepend = CONVERTIBLE_CLASSES[name] and settings.get("add_prefix_space") is not False
    before = [normalizers.Prepend(META_SPACE)] if prepend else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", META_SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if prepend else []
    steps = [decoders.Replace(META_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    backend.decoder = decoders.Sequence(steps)
    special = [tokenizers.AddedToken(p.text, normalized=False, special=True) for p in model.pieces if p.type == CONTROL]
    backend.add_special_tokens(special)
    own = [tokenizers.AddedToken(p.text, normalized=False) for p in model.pieces if p.type == USER_DEFINED]
    backend.add_tokens(own)
    return backend, model.token_names


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
        fields = list(parse_message(file.read_bytes()))
        pieces = tuple(read_piece(value) for number, value in fields if number == 1)
        training, normal = ({n: v for number, value in fields if number == key for n, v in parse_message(value)}
                            for key in (2, 3))  # fmt: skip
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise DataError(f"{file} is not a SentencePiece model: {error}{tiktoken_hint(file)}") from None
    kind = training.get(3, UNIGRAM)
    if not pieces or kind not in (UNIGRAM, BPE):
        raise DataError(f"{file} is not a SentencePiece model of the kind BPE or Unigram{tiktoken_hint(file)}")
    unknown, begin, end = (training.get(field, number) for number, field in enumerate((40, 41, 42)))
    return SentencePieceModel(
        pieces, kind, bool(training.get(35, 0)), unknown, begin, end, has_charsmap=bool(normal.get(2))
    )


def read_piece(content: bytes) -> Piece:
    values = dict(parse_message(content))
    return Piece(values[1].decode(), struct.unpack("<f", values.get(2, bytes(4)))[0], values.get(3, 1))


def parse_message(content: bytes) -> Iterator[tuple[int, Any]]:
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
