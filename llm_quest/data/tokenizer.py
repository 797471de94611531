"""Tokenizer: text to ids and back, over the `tokenizers` package; byte-level BPE is trained here.

Byte-level BPE (Radford et al. 2019, section 2.2): text is cut into words by a pattern, each word into its UTF-8 bytes,
and the most frequent neighbouring pair is merged, again and again. All 256 bytes are in the vocabulary, so every text
can be written and comes back to the byte.

Commonly got wrong: a user who types `<|endoftext|>` must not thereby end the document. Here text is only text unless
`special=True` says that it is a template.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llm_quest.errors import DataError, UsageError

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>", *(f"<|reserved_{i}|>" for i in range(4)))

# Qwen2's pattern (llama.cpp calls it "qwen2"): contractions, words with one leading sign or space, single digits,
# signs, line ends, spaces. Single digits give numbers one spelling each.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Only asked when no file of the folder names an end of text.
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`. Load one with `Tokenizer.load`, make one with `train_bpe`.

    engine: a `tokenizers.Tokenizer`. ends: the tokens that end a text, the first one is written after each document.
    begin, pad, unknown: names of tokens, or None. limit: the context length written into its files."""

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        *,
        ends: Sequence[str] = (),
        begin: str | None = None,
        pad: str | None = None,
        unknown: str | None = None,
        chat_template: str | None = None,
        limit: int | None = None,
    ):
        engine.no_truncation()
        engine.no_padding()
        self.engine = engine
        self.names = {"eos_token": list(ends), "bos_token": begin, "pad_token": pad, "unk_token": unknown}
        self.chat_template = chat_template
        self.limit = limit
        self.eos_ids: tuple[int, ...] = tuple(self.id(name) for name in ends)
        self.bos_id: int | None = None if begin is None else self.id(begin)
        self.pad_id: int | None = None if pad is None else self.id(pad)

    @classmethod
    def load(cls, where: str | Path) -> Tokenizer:
        """From a folder in the Hugging Face layout, from a tokenizer.json (the files beside it are read too), or from a
        folder with GPT-2's vocab.json and merges.txt. DataError names the file that is missing or broken."""
        where = Path(where)
        folder = where if where.is_dir() else where.parent
        file = where / "tokenizer.json" if where.is_dir() else where
        if not file.exists() and (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return cls.from_gpt2(folder / "vocab.json", folder / "merges.txt")
        if not file.exists():
            raise DataError(
                f"no tokenizer at {where}: expected a tokenizer.json, or vocab.json with merges.txt{_hint(folder)}"
            )
        engine = _parsed(file)
        settings = _object(folder / "special_tokens_map.json") | _object(folder / "tokenizer_config.json")
        end, begin = _named(settings, "eos_token"), _named(settings, "bos_token")
        for name in (end, begin):
            if name and engine.token_to_id(name) is None:
                raise DataError(f"{file} has no token {name!r}, which tokenizer_config.json names; mend one of the two")
        pad, unknown = (
            name if name and engine.token_to_id(name) is not None else None
            for name in (_named(settings, "pad_token"), _named(settings, "unk_token"))
        )
        return cls(
            engine,
            ends=[end] if end else _known_ends(engine),
            begin=begin,
            pad=pad,
            unknown=unknown,
            chat_template=_chat_template(folder, settings),
            limit=_limit(settings),
        )

    @classmethod
    def from_gpt2(cls, vocabulary: str | Path, merges: str | Path) -> Tokenizer:
        """From GPT-2's two files: a JSON of token to id and a list of merges, best first."""
        try:
            engine = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
        except Exception as error:  # the package raises bare Exception for every broken file
            raise DataError(f"{vocabulary} and {merges} are not a GPT-2 tokenizer: {error}") from error
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        engine.post_processor = processors.ByteLevel(trim_offsets=False)
        engine.add_special_tokens([END_OF_TEXT])
        return cls(engine, ends=(END_OF_TEXT,), begin=END_OF_TEXT)

    def encode(self, text: str, *, special: bool = False, template: bool = True) -> list[int]:
        """The ids of a text. special: may control tokens be written out in it (`<|im_end|>`)? Off, they are ordinary
        text. template: add what this tokenizer puts around a text, as transformers does (Llama's `<s>`); documents go
        without."""
        return self._reader(special).encode(_checked(text), add_special_tokens=template).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = False, template: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        checked = [_checked(text) for text in texts]
        return [one.ids for one in self._reader(special).encode_batch_fast(checked, add_special_tokens=template)]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids; control tokens are left out unless asked for. Bytes that are not UTF-8 become U+FFFD."""
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=not special)

    def stream(self, *, special: bool = False) -> TextStream:
        """Decodes one id at a time without ever splitting a character."""
        return TextStream(self, special=special)

    def id(self, token: str) -> int:
        """The id of a token by its name (`<|im_end|>`)."""
        found = self.engine.token_to_id(token)
        if found is None:
            raise UsageError(
                f"this tokenizer has no token {token!r}; its special tokens: {', '.join(self.special_tokens)}"
            )
        return found

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1: the rows an embedding needs."""
        return max(self.engine.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special_tokens(self) -> list[str]:
        """Control tokens, by id."""
        return [token.content for _, token in sorted(self.engine.get_added_tokens_decoder().items()) if token.special]

    @property
    def start_id(self) -> int:
        """What a document begins with: the tokenizer's own begin token, otherwise its end (GPT-2's custom)."""
        return self.end_id if self.bos_id is None else self.bos_id

    @property
    def end_id(self) -> int:
        """What a document ends with."""
        if not self.eos_ids:
            raise DataError("this tokenizer names no end-of-text token; add eos_token to its tokenizer_config.json")
        return self.eos_ids[0]

    @cached_property
    def hash(self) -> str:
        """sha256 of everything that decides which ids a text gets, and of the names of its control tokens."""
        return hashlib.sha256((self.engine.to_str() + json.dumps(self.names, sort_keys=True)).encode()).hexdigest()

    def save(self, folder: str | Path, model_max_length: int | None = None) -> None:
        """tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if there is one, chat_template.jinja:
        what transformers' AutoTokenizer reads. model_max_length: the model's context, otherwise what was loaded."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ends = self.names["eos_token"]
        names = {key: name for key, name in self.names.items() if name} | ({"eos_token": ends[0]} if ends else {})
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings |= names
        if (limit := model_max_length or self.limit) is not None:
            settings["model_max_length"] = limit
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        (folder / "tokenizer.json").write_text(self.engine.to_str(pretty=True), encoding="utf-8")
        for file, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", names)):
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _reader(self, special: bool) -> tokenizers.Tokenizer:
        return self.engine if special else self._literal

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        literal = copy.deepcopy(self.engine)
        literal.encode_special_tokens = True
        return literal


class TextStream:
    """`feed(id) -> str` gives the text that has become certain, `flush() -> str` the rest. Their concatenation is the
    text that `decode` gives for all ids at once. A character whose bytes are spread over tokens is held back until
    complete."""

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False):
        self.tokenizer = tokenizer
        self.special = special
        self.said: list[int] = []  # the ids given out last: some decoders treat a text's first word differently
        self.held: list[int] = []

    def feed(self, token: int) -> str:
        self.held.append(int(token))
        text = self._fresh()
        if not text or text.endswith("\ufffd"):
            return ""
        self.said, self.held = self.held, []
        return text

    def flush(self) -> str:
        """What was held back, U+FFFD for characters that were never completed. The stream may be used again."""
        text = self._fresh()
        self.said, self.held = [], []
        return text

    def _fresh(self) -> str:
        before = self.tokenizer.decode(self.said, special=self.special)
        text = self.tokenizer.decode(self.said + self.held, special=self.special)
        # Byte-fallback decoders re-read a run of byte tokens: text already given out may have changed, and stays given.
        if text.startswith(before):
            return text[len(before) :]
        return self.tokenizer.decode(self.held, special=self.special)


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """A byte-level BPE trained on texts. The first special token ends (and begins) a document; they get the ids 0, 1,
    ...

    A pair is merged only if it was seen twice: little text gives fewer tokens than asked for, `tokenizer.vocab_size`
    says how many. UsageError below 256 + special tokens; DataError without text. The same texts give the same
    tokenizer."""
    smallest = 256 + len(special_tokens)
    if not special_tokens or len(set(special_tokens)) < len(special_tokens) or not all(special_tokens):
        raise UsageError(f"special tokens must be distinct, not empty, and at least one; got {list(special_tokens)}")
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need {smallest}"
        )
    engine = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated")
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _Counted(texts)
    engine.train_from_iterator(seen, trainer=trainer)
    if not seen.characters:
        raise DataError("a tokenizer cannot be trained without text: every document is empty")
    pad = "<|pad|>" if "<|pad|>" in special_tokens else None
    return Tokenizer(engine, ends=special_tokens[:1], begin=special_tokens[0], pad=pad)


class _Counted:
    """Passes texts on and counts their characters."""

    def __init__(self, texts: Iterable[str]):
        self.texts = texts
        self.characters = 0

    def __iter__(self) -> Iterable[str]:  # type: ignore[override]
        for text in self.texts:
            self.characters += len(text)
            yield _checked(text)


def _checked(text: str) -> str:
    """The text itself; ValueError for what no tokenizer can read: half a surrogate pair (from a broken JSON escape)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text, {text[error.start]!r}, is half of a surrogate pair alone; remove it"
        ) from None
    return text


def _parsed(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception for every broken file
        raise DataError(f"{file} is not a tokenizer.json that this version of `tokenizers` reads: {error}") from error


def _named(settings: dict[str, Any], key: str) -> str | None:
    """The name of a token: the files write it bare or as an object with `content`."""
    value = settings.get(key)
    return value.get("content") if isinstance(value, dict) else value


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several templates by name
        return next((one["template"] for one in template if one.get("name") == "default"), None)
    return template


def _limit(settings: dict[str, Any]) -> int | None:
    limit = settings.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and limit < 1e9 else None  # 1e30 stands for "not known"


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, expected a JSON object")
    return content


def _known_ends(engine: tokenizers.Tokenizer) -> list[str]:
    special = {token.content for token in engine.get_added_tokens_decoder().values() if token.special}
    return [name for name in KNOWN_ENDS if name in special][:1]


def _hint(folder: Path) -> str:
    if (folder / "tokenizer.model").exists():
        return "; tokenizer.model (SentencePiece) is not read: transformers can load it and save a tokenizer.json"
    return ""
