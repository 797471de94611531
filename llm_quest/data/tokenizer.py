"""Tokenizer: text to ids and back, over the `tokenizers` package; byte-level BPE is trained in `vocabulary.py`.

Byte-level BPE (Radford et al. 2019, section 2.2): text is cut into words by a pattern, each word into its UTF-8 bytes,
and the most frequent neighboring pair is merged, again and again. All 256 bytes are in the vocabulary, so every text
can be written and comes back to the byte.

Commonly got wrong: a user who types `<|endoftext|>` must not end the document. Here text is only text unless
`allow_special_tokens=True`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tokenizers

from llm_quest.data.decode_stream import DecodeStream, decode_continuation
from llm_quest.data.encode_pieces import encode_continuation, encode_pieces
from llm_quest.data.tokenizer_files import (
    END_OF_TEXT,
    read_chat_template,
    read_tokenizer_files,
    token_name,
)
from llm_quest.errors import DataError, UsageError
from llm_quest.files import package_errors, to_json, update_text

SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>", *(f"<|reserved_{i}|>" for i in range(4)))

# Only asked when no file of the folder names an end of text.
KNOWN_EOS_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`. Load one with `Tokenizer.load`, make one with `train_bpe`.

    backend_tokenizer: a `tokenizers.Tokenizer`. eos_tokens: the tokens that end a text, the first one is written
    after each document. bos_token, pad_token, unk_token: names of tokens, or None. model_max_length: the context
    length written into its files."""

    def __init__(
        self,
        backend_tokenizer: tokenizers.Tokenizer,
        *,
        eos_tokens: Sequence[str] = (),
        bos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
        chat_template: str | None = None,
        model_max_length: int | None = None,
    ):
        backend_tokenizer.no_truncation()
        backend_tokenizer.no_padding()
        self.backend_tokenizer = backend_tokenizer
        self.bos_token, self.pad_token, self.unk_token = bos_token, pad_token, unk_token
        self.special_token_names = {
            "eos_token": list(eos_tokens),
            "bos_token": bos_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
        }
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        self.eos_token_ids: tuple[int, ...] = tuple(self.token_to_id(name) for name in eos_tokens)
        self.bos_token_id: int | None = None if bos_token is None else self.token_to_id(bos_token)
        self.pad_token_id: int | None = None if pad_token is None else self.token_to_id(pad_token)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder in one of the Hugging Face layouts (`tokenizer_files.py`), or from a tokenizer.json (the files
        beside it are read too). DataError names the file that is missing or broken."""
        path = Path(path)
        backend, settings = read_tokenizer_files(path)
        end = token_name(settings, "eos_token")
        return cls(
            backend,
            eos_tokens=[end] if end else _guess_eos_tokens(backend),
            bos_token=token_name(settings, "bos_token"),
            pad_token=token_name(settings, "pad_token"),
            unk_token=token_name(settings, "unk_token"),
            chat_template=read_chat_template(path if path.is_dir() else path.parent, settings),
            model_max_length=_read_max_length(settings),
        )

    def encode(self, text: str, *, allow_special_tokens: bool = False, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. allow_special_tokens: whether control tokens can be written out in it (`<|im_end|>`);
        otherwise they are ordinary text. add_special_tokens: add what this tokenizer puts around a text, as
        transformers does (Llama's `<s>`); documents go without."""
        return (
            self._backend_for(allow_special_tokens)
            .encode(require_valid_unicode(text), add_special_tokens=add_special_tokens)
            .ids
        )

    def encode_batch(
        self, texts: Sequence[str], *, allow_special_tokens: bool = False, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        checked = [require_valid_unicode(text) for text in texts]
        return [
            one.ids
            for one in self._backend_for(allow_special_tokens).encode_batch_fast(
                checked, add_special_tokens=add_special_tokens
            )
        ]

    def decode(self, ids: Iterable[int], *, keep_special_tokens: bool = False) -> str:
        """The text of ids, without control tokens unless requested. Bytes that are not UTF-8 become U+FFFD."""
        return self.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=not keep_special_tokens)

    def decode_stream(self, prompt_ids: Sequence[int] = (), *, keep_special_tokens: bool = False) -> DecodeStream:
        """A decoder of one id at a time, behind a prompt, which never splits a character."""
        return DecodeStream(self, prompt_ids, keep_special_tokens=keep_special_tokens)

    def decode_continuation(
        self, prompt_ids: Sequence[int], ids: Sequence[int], *, keep_special_tokens: bool = False
    ) -> str:
        """The text that ids add to the text of their prompt."""
        return decode_continuation(self, prompt_ids, ids, keep_special_tokens=keep_special_tokens)

    def encode_pieces(self, *pieces: str) -> list[list[int]]:
        """The ids of consecutive pieces of one text, a list for each: together those of the whole text, unless a token
        of that lies across a seam (`data/encode_pieces.py`). Nothing is added around the text."""
        encode = partial(self.encode, add_special_tokens=False)
        return encode_pieces(pieces, encode, partial(self.decode, keep_special_tokens=True))

    def encode_continuation(self, text: str, *, allow_special_tokens: bool = False) -> list[int]:
        """The ids of a text that goes on from other text, as an answer or a suffix does."""
        encode = partial(self.encode, allow_special_tokens=allow_special_tokens, add_special_tokens=False)
        return encode_continuation(text, encode)

    def token_to_id(self, token: str) -> int:
        """The id of a token by its name (`<|im_end|>`)."""
        token_id = self.backend_tokenizer.token_to_id(token)
        if token_id is None:
            raise UsageError(
                f"this tokenizer has no token {token!r}; its special tokens: {', '.join(self.special_tokens)}"
            )
        return token_id

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the number of rows of an embedding."""
        return max(self.backend_tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def base_vocab_size(self) -> int:
        """Largest id + 1 of the vocabulary proper, without added tokens: a model of this tokenizer has more rows, but
        perhaps none for a token that was added later."""
        return max(self.backend_tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    def with_added_tokens(self, tokens: Sequence[str], *, special: bool = False) -> Tokenizer:
        """A copy with more tokens, behind all others. special: control tokens, which text does not spell unless
        `allow_special_tokens`; others are found in every text. UsageError for one that it has."""
        if wrong := [token for token in tokens if not token or self.backend_tokenizer.token_to_id(token) is not None]:
            raise UsageError(f"{wrong[0]!r} cannot be added: it is a token of this tokenizer already, or empty")
        backend = copy.deepcopy(self.backend_tokenizer)
        added = [tokenizers.AddedToken(token, normalized=False, special=special) for token in tokens]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
        return self.with_backend(backend, self.pad_token)

    def with_pad_token(self, name: str) -> Tokenizer:
        """A copy whose padding token is this token of its vocabulary."""
        return self.with_backend(copy.deepcopy(self.backend_tokenizer), name)

    def with_backend(self, backend_tokenizer: tokenizers.Tokenizer, pad_token: str | None) -> Tokenizer:
        """The same names, template and length for another backend."""
        return Tokenizer(
            backend_tokenizer,
            eos_tokens=self.special_token_names["eos_token"] or (),
            bos_token=self.bos_token,
            pad_token=pad_token,
            unk_token=self.unk_token,
            chat_template=self.chat_template,
            model_max_length=self.model_max_length,
        )

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids of control tokens, which `decode` leaves out."""
        return frozenset(map(self.token_to_id, self.special_tokens))

    @cached_property
    def byte_token_ids(self) -> frozenset[int]:
        """The ids that stand for single bytes (`<0xE2>`) and are decoded by runs; none without byte fallback."""
        if '"ByteFallback"' not in json.dumps(json.loads(self.backend_tokenizer.to_str())["decoder"]):
            return frozenset()
        ids = (self.backend_tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(number for number in ids if number is not None)

    @property
    def special_tokens(self) -> list[str]:
        """Control tokens, by id."""
        return [
            token.content
            for _, token in sorted(self.backend_tokenizer.get_added_tokens_decoder().items())
            if token.special
        ]

    @property
    def start_token_id(self) -> int:
        """The token that begins a document: the tokenizer's own begin token, otherwise its end (as GPT-2 does)."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    @property
    def eos_token_id(self) -> int:
        """The token that ends a document."""
        if not self.eos_token_ids:
            raise DataError("this tokenizer names no end-of-text token; add eos_token to its tokenizer_config.json")
        return self.eos_token_ids[0]

    @cached_property
    def hash(self) -> str:
        """sha256 of everything that decides which ids a text gets, and of the names of its control tokens."""
        return hashlib.sha256(
            (self.backend_tokenizer.to_str() + json.dumps(self.special_token_names, sort_keys=True)).encode()
        ).hexdigest()

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, chat_template.jinja:
        what transformers' AutoTokenizer reads. model_max_length: the model's context, otherwise what was loaded."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ends = self.special_token_names["eos_token"]
        names = {key: name for key, name in self.special_token_names.items() if name} | (
            {"eos_token": ends[0]} if ends else {}
        )
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= names
        if (limit := model_max_length or self.model_max_length) is not None:
            settings["model_max_length"] = limit
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        texts = {
            "chat_template.jinja": self.chat_template,
            "tokenizer.json": self.backend_tokenizer.to_str(pretty=True),
            "tokenizer_config.json": to_json(settings),
            "special_tokens_map.json": to_json(names),
        }
        for name, text in texts.items():
            if text is not None:
                update_text(folder / name, text)

    def _backend_for(self, special: bool) -> tokenizers.Tokenizer:
        return self.backend_tokenizer if special else self._literal

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        return self.copy_without_controls()

    def copy_without_controls(self) -> tokenizers.Tokenizer:
        """A copy of the backend in which control tokens are text like any other."""
        with package_errors("this tokenizer is read, and cannot be copied (a token in its rules has no id)"):
            literal = copy.deepcopy(self.backend_tokenizer)
        literal.encode_special_tokens = True
        if isinstance(literal.model, tokenizers.models.Unigram):
            literal.model = without_spellings(literal)
        return literal


def without_spellings(backend: tokenizers.Tokenizer) -> tokenizers.models.Unigram:
    """A Unigram model whose control tokens no text spells. They are pieces like others there, often the likeliest, and
    BPE's merges never make them. Their places keep their ids under names that are drawn."""
    model = json.loads(backend.to_str())["model"]
    control = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    drawn = secrets.token_hex(16)
    pieces = [
        (f"{drawn}-{number}" if piece in control and number != model["unk_id"] else piece, score)
        for number, (piece, score) in enumerate(model["vocab"])
    ]
    return tokenizers.models.Unigram(pieces, unk_id=model["unk_id"], byte_fallback=model.get("byte_fallback", False))


def require_valid_unicode(text: str) -> str:
    """The text itself; DataError for half a surrogate pair (from a broken JSON escape), which no tokenizer can
    read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text, {text[error.start]!r}, is half of a surrogate pair alone; remove it"
        ) from None
    return text


def _read_max_length(settings: dict[str, Any]) -> int | None:
    limit = settings.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and limit < 1e9 else None  # 1e30 stands for "not known"


def _guess_eos_tokens(engine: tokenizers.Tokenizer) -> list[str]:
    special = {token.content for token in engine.get_added_tokens_decoder().values() if token.special}
    return [name for name in KNOWN_EOS_TOKENS if name in special][:1]
