"""The files of a tokenizer, in the layouts that transformers writes and reads.

    tokenizer.json                          the whole tokenizer                      (fast)
    vocab.json + merges.txt                 byte-level BPE, cut into words by the class of tokenizer_config.json (slow)
    tokenizer.model, T5's spiece.model      SentencePiece (`sentencepiece_model.py`)
    tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja        beside any of them

As in transformers, added tokens of these files that the tokenizer lacks are added under their ids, and a named begin,
end, padding or unknown token that it lacks is added behind all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llm_quest.data.documents import decode_utf8, read_file_bytes, require_regular_file
from llm_quest.data.sentencepiece_model import FILES as SENTENCEPIECE_FILES
from llm_quest.data.sentencepiece_model import begin_and_end_template, convert_sentencepiece, tiktoken_hint
from llm_quest.errors import DataError
from llm_quest.files import load_json, package_errors, parse_digits

END_OF_TEXT = "<|endoftext|>"
MAX_TOKENIZER_BYTES, MAX_TOKEN_ID = 200_000_000, 2**24

# Qwen2's pattern (llama.cpp calls it "qwen2"): contractions, words with one leading sign or space, single digits,
# signs, line ends, spaces. Single digits give numbers one spelling each.
PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Settings = dict[str, Any]


def pre_tokenize_as_gpt2(backend: tokenizers.Tokenizer, add_prefix_space: bool) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)


def pre_tokenize_as_qwen2(backend: tokenizers.Tokenizer, add_prefix_space: bool) -> None:
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZER_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])


SLOW_CLASSES: Mapping[str, tuple[Callable[[tokenizers.Tokenizer, bool], None], Settings]] = {
    "GPT2Tokenizer": (
        pre_tokenize_as_gpt2, {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    ),
    "Qwen2Tokenizer": (
        pre_tokenize_as_qwen2, {"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    ),
}  # fmt: skip
"""Classes with vocab.json and merges.txt: how each cuts words, and the tokens that it names by itself."""


def read_tokenizer_files(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """The tokenizer of a folder, or of a tokenizer.json with the files beside it, and its settings. DataError names the
    file that is missing or broken."""
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    settings = read_tokenizer_settings(folder / "special_tokens_map.json") | read_tokenizer_settings(
        folder / "tokenizer_config.json"
    )
    if file.exists():
        backend = read_tokenizer_json(file)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        backend, settings = read_slow_files(folder, settings)
    elif (model := next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).exists()), None)) is not None:
        backend, defaults = convert_sentencepiece(model, settings)
        settings = defaults | settings
    else:
        raise DataError(
            f"no tokenizer at {path}: expected a tokenizer.json, vocab.json with merges.txt, tokenizer.model or "
            f"spiece.model{other_format_hint(folder)}"
        )
    add_listed_tokens(backend, folder, settings)
    add_named_tokens(backend, settings)
    if not file.exists():
        begin = token_name(settings, "bos_token") if settings.get("add_bos_token") else None
        end = token_name(settings, "eos_token") if settings.get("add_eos_token") else None
        backend.post_processor = begin_and_end_template(backend, begin, end)
    require_working(backend, path)
    return backend, settings


PROBE_TEXT = "Once upon a time, 12 cats;\n\tété  \U0001f642 <s>"


def require_working(backend: tokenizers.Tokenizer, path: Path) -> None:
    """DataError for a tokenizer that cannot encode or decode a short text: the package panics, in an exception that is
    no Exception, over what it did not check on reading (a template with a token that is not there, some patterns)."""
    with package_errors(f"{path} is read, and cannot encode a text (its files are damaged)"):
        backend.decode(backend.encode(PROBE_TEXT).ids)


def read_slow_files(folder: Path, settings: Settings) -> tuple[tokenizers.Tokenizer, Settings]:
    """Byte-level BPE from a JSON of token to id and a list of merges, best first. Without a class it is GPT-2's."""
    name = str(settings.get("tokenizer_class", "GPT2Tokenizer")).removesuffix("Fast")
    if name not in SLOW_CLASSES:
        raise DataError(
            f"{folder / 'tokenizer_config.json'} names the class {name}: how it cuts words is known from a "
            f"tokenizer.json alone (with vocab.json and merges.txt: {', '.join(SLOW_CLASSES)}); load it with "
            "transformers' AutoTokenizer and save_pretrained it, which writes one"
        )
    vocabulary, merges = (str(require_plausible_size(folder / one)) for one in ("vocab.json", "merges.txt"))
    with package_errors(f"{folder / 'vocab.json'} and merges.txt are not a byte-level BPE"):
        model = models.BPE.from_file(vocabulary, merges)
    cut_words, defaults = SLOW_CLASSES[name]
    backend = require_plausible_ids(tokenizers.Tokenizer(model), folder / "vocab.json")
    cut_words(backend, bool(settings.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    return backend, defaults | settings


def add_listed_tokens(backend: tokenizers.Tokenizer, folder: Path, settings: Settings) -> None:
    """Add the tokens of added_tokens_decoder and added_tokens.json that the tokenizer lacks. DataError where one would
    get another id."""
    listed = {}
    for name, number in read_tokenizer_settings(folder / "added_tokens.json").items():
        if type(number) is not int or not is_encodable_text(name) or not 0 <= number < MAX_TOKEN_ID:
            raise DataError(
                f"{folder / 'added_tokens.json'}: {name!r:.40} has the id {number!r:.40}, expected a number"
            )
        listed[number] = AddedToken(name, normalized=False, special=is_named(name, settings))
    for number, one in (settings.get("added_tokens_decoder") or {}).items():
        listed[int(number)] = AddedToken(one["content"], **{key: bool(one[key]) for key in TOKEN_FLAGS if key in one})
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for number, token in sorted(listed.items()):
        if token.content in present:
            continue
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if (token_id := backend.token_to_id(token.content)) != number:
            raise DataError(
                f"{folder}: the added token {token.content!r} has id {number} in its files and would get {token_id}: "
                "its vocabulary is not complete"
            )


def add_named_tokens(backend: tokenizers.Tokenizer, settings: Settings) -> None:
    """Add the tokens that the settings name and the vocabulary lacks, and make control tokens of those it has."""
    more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    names = [token_name(settings, key) for key in NAMED_TOKENS]
    names += [one.get("content") if isinstance(one, dict) else one for one in more]
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    lacking = [name for name in dict.fromkeys(names) if isinstance(name, str) and name and name not in present]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in lacking])


def is_named(name: str, settings: Settings) -> bool:
    """Whether the settings name this token as a control token."""
    more = settings.get("additional_special_tokens") or []
    return name in [token_name(settings, key) for key in NAMED_TOKENS] or name in more


def read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    with package_errors(f"{file} is not a tokenizer.json that this version of `tokenizers` reads"):
        backend = tokenizers.Tokenizer.from_file(str(require_plausible_size(file)))
    backend.no_truncation()
    backend.no_padding()  # to a length that the file names
    return require_plausible_ids(backend, file)


def require_plausible_ids(backend: tokenizers.Tokenizer, file: Path) -> tokenizers.Tokenizer:
    """The tokenizer; DataError for an id that no vocabulary reaches: the package takes memory for all ids below it."""
    most = max(backend.get_vocab(with_added_tokens=False).values(), default=0)
    if most > MAX_TOKEN_ID:
        raise DataError(f"{file}: a token has the id {most:,}; a vocabulary's ids end at {MAX_TOKEN_ID:,}")
    return backend


def require_plausible_size(file: Path) -> Path:
    """The file; DataError for one that no tokenizer fills."""
    if (size := require_regular_file(file).stat().st_size) > MAX_TOKENIZER_BYTES:
        raise DataError(f"{file} has {size:,} bytes; a tokenizer's files have at most {MAX_TOKENIZER_BYTES:,}")
    return file


def token_name(settings: Mapping[str, Any], key: str) -> str | None:
    """The name of a token: the files write it bare or as an object with `content`."""
    value = settings.get(key)
    return value.get("content") if isinstance(value, dict) else value


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return decode_utf8(read_file_bytes(file), file)
    template = settings.get("chat_template") or read_tokenizer_settings(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(template, list):  # several templates by name
        return next((one["template"] for one in template if one.get("name") == "default"), None)
    return template


def is_encodable_text(value: Any) -> bool:
    """Text that has bytes: half of a surrogate pair, as a JSON escape can write it, has none."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def is_token(value: Any) -> bool:
    """A token's name, bare or as an object with `content`."""
    return is_encodable_text(value.get("content") if isinstance(value, dict) else value)


def are_tokens(value: Any) -> bool:
    return isinstance(value, list | dict) and all(map(is_token, value.values() if isinstance(value, dict) else value))


def are_numbered_tokens(value: Any) -> bool:
    """Ids, as text, with their tokens."""
    return isinstance(value, dict) and all(
        isinstance(one, dict) and is_token(one) and parse_digits(number) is not None and len(number) < 10
        for number, one in value.items()
    )


def is_template(value: Any) -> bool:
    """A chat template, or several with their names."""
    return is_encodable_text(value) or (
        isinstance(value, list)
        and all(isinstance(one, dict) and is_encodable_text(one.get("template")) for one in value)
    )


SETTING_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(NAMED_TOKENS, (is_token, 'a token ("</s>" or {"content": "</s>"})')),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), (are_tokens, "a list of tokens")),
    "added_tokens_decoder": (are_numbered_tokens, 'ids with their tokens ({"5": {"content": "<x>"}})'),
    "chat_template": (is_template, "a template, or a list of {name, template}"),
    "tokenizer_class": (is_encodable_text, "the name of a class"),
}
"""Key of tokenizer_config.json and special_tokens_map.json -> whether a value is of its type, and the type in words.
null is every key's absence."""


def read_tokenizer_settings(file: Path) -> Settings:
    """The object of a JSON file, empty without the file. DataError names the file and the key that is of another type
    than it is read as."""
    if not file.exists():
        return {}
    content: Settings = load_json(file, limit=MAX_TOKENIZER_BYTES, remedy="bring the published file back")
    for key, (is_of_type, expected) in SETTING_TYPES.items():
        if content.get(key) is not None and not is_of_type(content[key]):
            raise DataError(f"{file}: {key} is {content[key]!r:.80}, expected {expected}")
    return content


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has files that `read_tokenizer_files` reads."""
    return any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", *SENTENCEPIECE_FILES))


def other_format_hint(folder: Path) -> str:
    """What to do about a folder whose only tokenizer is of another format; empty without one."""
    for file in sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")]) if folder.is_dir() else []:
        return f"; {file.name} is of another format{tiktoken_hint(file)}"
    return ""
