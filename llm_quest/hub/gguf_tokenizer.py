"""A tokenizer as GGUF keys, and back.

      tokenizer.ggml.model   what                                     read back as
      gpt2                   byte-level BPE: tokens, merges, `pre`    BPE with the pattern of `pre`
      llama                  SentencePiece's BPE: tokens, scores      BPE with every way of cutting a token as a merge
      t5                     Unigram: tokens, log-probabilities       Unigram

Tokens have a type: normal 1, unknown 2, control 3, user-defined 4, unused 5, byte 6.

Commonly got wrong: a repeated token ends llama.cpp's process; without bos and eos it takes token 11 of a gpt2
vocabulary for both; a score decides which neighbors are merged first, so ranks of merges are written as negative
scores.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.gguf import FLOAT32, INT32, STRING, TOKENIZER, Value, array, boolean, string, uint32
from llm_quest.hub.gguf_pretokenizers import WORD_SPLITS, find_word_split
from llm_quest.models.decoder import GenerationConfig

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
META_SPACE = "\u2581"
LOW_SCORE = -1e6
"""Score of tokens that no merge makes."""
NORMALIZER_KEY = "llm_quest.tokenizer.normalizer"
"""Our own key: the Unicode normalization of text, which llama.cpp leaves out."""


@dataclass(frozen=True)
class Vocabulary:
    """The token and type of every row of the embedding. beyond: the tokens without a row."""

    tokens: list[str]
    types: list[int]
    beyond: list[str]


def tokenizer_keys(
    tokenizer: Tokenizer, rows: int, generation: GenerationConfig | None = None
) -> tuple[dict[str, Value], list[str]]:
    """The keys of a tokenizer for an embedding of `rows` rows, and notes on what is lost. UsageError for a kind that
    llama.cpp lacks."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = list_vocabulary(tokenizer, content, rows)
    kind = content["model"]["type"]
    if kind == "BPE" and is_byte_level(content):
        keys, notes = byte_level_keys(content)
    elif kind == "BPE":
        keys, notes = sentencepiece_keys(content, vocabulary)
    elif kind == "Unigram":
        keys, notes = unigram_keys(content, vocabulary)
    else:
        raise UsageError(f"a GGUF file cannot hold a {kind} tokenizer for a model that writes text; llama.cpp lacks it")
    keys["tokens"] = array(STRING, vocabulary.tokens)
    keys["token_type"] = array(INT32, vocabulary.types)
    keys |= special_keys(tokenizer, rows, generation) | around_keys(tokenizer)
    prefixed = {TOKENIZER + name: value for name, value in keys.items()}
    if (template := file_template(tokenizer)) is not None:
        prefixed["tokenizer.chat_template"] = string(template)
    prefixed[NORMALIZER_KEY] = string("NFC" if normalizes_nfc(content) else "none")
    return prefixed, [*notes, *vocabulary_notes(content, vocabulary.beyond)]


def file_template(tokenizer: Tokenizer) -> str | None:
    """The chat template as the file holds it.

    Commonly got wrong: without a begin token llama.cpp gives the template the end token in its place, and a template
    that writes `bos_token` then begins with an end."""
    template = tokenizer.chat_template
    unset = template is not None and tokenizer.bos_token is None and "bos_token" in template
    return f"{NO_BEGIN_TOKEN}{template}" if unset else template


def is_byte_level(content: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))


def list_vocabulary(tokenizer: Tokenizer, content: Mapping[str, Any], rows: int) -> Vocabulary:
    """Tokens by id, the rows without one under names of their own. UsageError for a token that occurs twice."""
    names = {number: name for name, number in tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    byte_fallback = bool(content["model"].get("byte_fallback"))
    unknown = tokenizer.unk_token if content["model"]["type"] != "BPE" or byte_fallback else None
    taken = set(names.values())
    tokens, types = [], []
    for row in range(rows):
        name = names.get(row)
        if name is None:
            name = f"[PAD{row}]"
            while name in taken:
                name += "_"
            types.append(UNUSED)
        else:
            types.append(token_type(name, added.get(row), unknown, byte_fallback))
        tokens.append(name.replace(META_SPACE, " ") if types[-1] == USER_DEFINED else name)
    if len(set(tokens)) != len(tokens):
        twice = next(name for name in tokens if tokens.count(name) > 1)
        raise UsageError(f"two tokens are {twice!r} in a GGUF file, which ends llama.cpp: rename one of them")
    return Vocabulary(tokens, types, sorted(name for number, name in names.items() if number >= rows))


def token_type(name: str, added: Any, unknown: str | None, byte_fallback: bool) -> int:
    if name == unknown:
        return UNKNOWN
    if added is not None:
        return CONTROL if added.special else USER_DEFINED
    return BYTE if byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">") else NORMAL


def byte_level_keys(content: Mapping[str, Any]) -> tuple[dict[str, Value], list[str]]:
    model = content["model"]
    ignore_merges = bool(model.get("ignore_merges"))
    name = find_word_split(content["pre_tokenizer"], ignore_merges)
    if name is None or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise UsageError(
            "llama.cpp has no name for how this tokenizer cuts words (pre_tokenizer "
            f"{json.dumps(content['pre_tokenizer'])[:300]}), and runs no pattern of a tokenizer.json: export a folder"
        )
    refuse_other_normalizers(content)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    notes = ["text is brought into NFC here, and not by llama.cpp"] if normalizes_nfc(content) else []
    notes += [COMBINING_MARKS] if WORD_SPLITS[name].cuts_marks else []
    return {"model": string("gpt2"), "pre": string(name), "merges": array(STRING, merges)}, notes


COMBINING_MARKS = "llama.cpp cuts words at combining marks (e\u0301), which this tokenizer keeps together"


def normalizes_nfc(content: Mapping[str, Any]) -> bool:
    return list_normalizers(content.get("normalizer")) == [{"type": "NFC"}]


def list_normalizers(normalizer: Any) -> list[Any]:
    if not normalizer:
        return []
    if normalizer["type"] == "Sequence":
        return [inner for one in normalizer["normalizers"] for inner in list_normalizers(one)]
    return [normalizer]


def refuse_other_normalizers(content: Mapping[str, Any]) -> None:
    others = [
        normalizer["type"] for normalizer in list_normalizers(content.get("normalizer")) if normalizer["type"] != "NFC"
    ]
    if others:
        raise UsageError(
            f"this tokenizer normalizes text by {', '.join(others)}, which llama.cpp does not: export a folder"
        )


OTHER_SPACES = "llama.cpp keeps tabs and line ends as characters, which are spaces here"
NO_BEGIN_TOKEN = "{% set bos_token = '' %}"
LEADING_SPACE = "llama.cpp puts a space before every text, here none is put before a text that begins with one"


def space_form(content: Mapping[str, Any]) -> tuple[bool, bool, list[str]]:
    """The treatment of spaces: whether one is put before a text, whether words are split at them, and notes. UsageError
    for another form."""
    steps = list_normalizers(content.get("normalizer"))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE}
    prepend = {"type": "Prepend", "prepend": META_SPACE}
    before = content.get("pre_tokenizer")
    if before is None and steps in ([replace], [prepend, replace]):
        return len(steps) == 2, False, []
    charsmap = [step for step in steps if step["type"] == "Precompiled"]
    pieces = [step for step in pre_tokenizer_steps(before) if step["type"] != "WhitespaceSplit"]
    if len(charsmap) == len(steps) and len(pieces) == 1 and pieces[0]["type"] == "Metaspace":
        scheme, split = pieces[0].get("prepend_scheme", "always"), pieces[0].get("split", True)
        squeezes = len(pieces) < len(pre_tokenizer_steps(before))
        return scheme != "never", split, [] if squeezes or scheme == "never" else [LEADING_SPACE]
    raise UsageError(
        "llama.cpp has no form for how this tokenizer makes spaces (normalizer "
        f"{json.dumps(content.get('normalizer'))[:150]}, pre_tokenizer {json.dumps(before)[:150]}): export a folder"
    )


def pre_tokenizer_steps(step: Any) -> list[Any]:
    if not step:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def sentencepiece_keys(content: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[dict[str, Value], list[str]]:
    """Scores from the ranks of merges. UsageError where merging by scores would give other tokens."""
    prepend, split, notes = space_form(content)
    pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in content["model"]["merges"]]
    refuse_unmergeable(vocabulary, pairs, split)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    scores = [float(-ranks[token]) if token in ranks else LOW_SCORE for token in vocabulary.tokens]
    keys = {"model": string("llama"), "scores": array(FLOAT32, scores), "add_space_prefix": boolean(prepend)}
    return keys, notes


def refuse_unmergeable(vocabulary: Vocabulary, pairs: Sequence[tuple[str, ...]], split: bool) -> None:
    """Raise UsageError if SentencePiece, which merges any two neighbors that make a token, would make other merges."""
    merges = {(left, right): rank for rank, (left, right) in enumerate(pairs)}
    normal = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == NORMAL}
    for token in normal:
        if split and META_SPACE in token[1:]:
            raise UsageError(f"words are cut at spaces, but the token {token!r} spans two, which llama.cpp would make")
        cuts = [
            (token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in normal and token[at:] in normal
        ]
        if missing := [cut for cut in cuts if cut not in merges]:
            raise UsageError(
                f"llama.cpp merges by scores: it would make {token!r} of {missing[0][0]!r} and {missing[0][1]!r}, "
                "which is no merge of this tokenizer; export a folder, or train a byte-level one"
            )


def unigram_keys(content: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[dict[str, Value], list[str]]:
    model = content["model"]
    if model.get("byte_fallback"):
        raise UsageError(
            "llama.cpp has no Unigram tokenizer with bytes for unknown characters: export a folder instead"
        )
    prepend, _, notes = space_form(content)
    scores = [score for _, score in model["vocab"]]
    padded = [*scores, *[0.0] * max(0, len(vocabulary.tokens) - len(scores))][: len(vocabulary.tokens)]
    steps = pre_tokenizer_steps(content.get("pre_tokenizer"))
    squeezes = any(step["type"] == "WhitespaceSplit" for step in steps)
    keys = {
        "model": string("t5"),
        "scores": array(FLOAT32, padded),
        "add_space_prefix": boolean(prepend),
        "remove_extra_whitespaces": boolean(squeezes),
        "unknown_token_id": uint32(model["unk_id"] or 0),
    }
    charsmaps = [normalizer["precompiled_charsmap"] for normalizer in list_normalizers(content.get("normalizer"))]
    if charsmaps and charsmaps[0]:
        keys["precompiled_charsmap"] = array(0, base64.b64decode(charsmaps[0]))
    elif squeezes:
        notes = [*notes, OTHER_SPACES]
    return keys, notes


def special_keys(tokenizer: Tokenizer, rows: int, generation: GenerationConfig | None) -> dict[str, Value]:
    """The ids of begin, end, padding and unknown token; of several ends the second ends a turn."""
    ends = [*tokenizer.eos_token_ids, *(generation.eos_token_ids if generation else ())]
    ends = [number for number in dict.fromkeys(ends) if number < rows]
    if not ends:
        raise UsageError("the tokenizer names no end token, for which llama.cpp would take token 11 or 2: name one")
    ids = {"eos_token_id": ends[0], "bos_token_id": tokenizer.bos_token_id, "padding_token_id": tokenizer.pad_token_id}
    ids["bos_token_id"] = ends[0] if ids["bos_token_id"] is None else ids["bos_token_id"]
    ids |= dict(zip(("eot_token_id", "eom_token_id"), ends[1:], strict=False))
    if tokenizer.unk_token is not None:
        ids["unknown_token_id"] = tokenizer.token_to_id(tokenizer.unk_token)
    return {name: uint32(number) for name, number in ids.items() if number is not None and number < rows}


def around_keys(tokenizer: Tokenizer) -> dict[str, Value]:
    """Whether a begin or an end token is put around a text. UsageError for anything else."""
    bare, whole = (
        tokenizer.encode("a", allow_special_tokens=True, add_special_tokens=around) for around in (False, True)
    )
    add_bos = whole[:1] == [tokenizer.bos_token_id] and whole[1 : 1 + len(bare)] == bare
    add_eos = len(whole) > len(bare) + add_bos and whole[-1] in tokenizer.eos_token_ids
    if len(whole) != len(bare) + add_bos + add_eos:
        raise UsageError(
            f"the tokenizer puts {len(whole) - len(bare)} tokens around a text; llama.cpp begin and end alone"
        )
    return {"add_bos_token": boolean(add_bos), "add_eos_token": boolean(add_eos)}


def vocabulary_notes(content: Mapping[str, Any], beyond: Sequence[str]) -> list[str]:
    notes = (
        [f"{len(beyond)} tokens have no row in the embedding and are left out: {', '.join(beyond[:4])}"]
        if beyond
        else []
    )
    trimmed = [one["content"] for one in content.get("added_tokens", []) if one.get("lstrip") or one.get("single_word")]
    if trimmed:
        notes.append(f"llama.cpp does not take spaces or words into account around {', '.join(map(repr, trimmed[:4]))}")
    return notes
