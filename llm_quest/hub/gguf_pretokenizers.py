"""Pre-tokenizers of byte-level BPE by llama.cpp's names (`tokenizer.ggml.pre`).

llama.cpp runs no pattern of a tokenizer.json: it has a list of names. Here the name is found by the pattern, so that a
newly trained tokenizer has one too.

Commonly got wrong: a file without the name, or with another one, loads and cuts words differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers import Regex, pre_tokenizers

from llm_quest.data.tokenizer_files import PRETOKENIZER_PATTERN

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|" + SPACES
)


class WordSplit(NamedTuple):
    """A pre-tokenizer of byte-level BPE, as llama.cpp knows it. patterns: applied one after the other. ignore_merges: a
    whole word of the vocabulary is taken as it is. add_bos: what llama.cpp assumes where a file does not say. nfc: the
    published tokenizers normalize text by NFC first, which llama.cpp leaves out. cuts_marks: llama.cpp cuts words at
    combining marks, which the pattern keeps together."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False
    cuts_marks: bool = False


LLAMA3 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
WORD_SPLITS: dict[str, WordSplit] = {
    "gpt-2": WordSplit((GPT2_PATTERN,)),
    "qwen2": WordSplit((PRETOKENIZER_PATTERN,), nfc=True),
    "llama-bpe": WordSplit((LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx": WordSplit((LLAMA3,)),
    "smollm": WordSplit((r"\p{N}", GPT2_PATTERN)),
    "gpt-4o": WordSplit((
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{SHORT}?|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{SHORT}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,
    ), cuts_marks=True),
    "tekken": WordSplit((
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,
    ), ignore_merges=True, add_bos=True, cuts_marks=True),
    "qwen35": WordSplit((
        SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES,
    ), nfc=True),
    "deepseek-v3": WordSplit((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_WORDS)),
}  # fmt: skip
SAME_SPLIT = {
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "smaug-bpe": "dbrx", "llama3": "llama-bpe",
    "llama-v3": "llama-bpe", "phi-2": "gpt-2", "jina-es": "gpt-2", "jina-de": "gpt-2", "roberta-bpe": "gpt-2",
    "megrez": "qwen2", "deepseek-r1-qwen": "qwen2", "gpt-neox": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2",
    "falcon3": "llama-bpe", "falcon-h1": "llama-bpe", "pixtral": "llama-bpe",
}  # fmt: skip
"""Other names of the same split."""


def find_word_split(pre_tokenizer: Any, ignore_merges: bool) -> str | None:
    """llama.cpp's name for a pre-tokenizer (the JSON of `tokenizers`); None where it has none."""
    patterns = list_patterns(pre_tokenizer)
    if patterns is None:
        return None
    names = [name for name, split in WORD_SPLITS.items() if split.patterns == tuple(patterns)]
    exact = [name for name in names if WORD_SPLITS[name].ignore_merges == ignore_merges]
    return next(iter(exact), None)


def list_patterns(pre_tokenizer: Any) -> list[str] | None:
    """The patterns by which a byte-level pre-tokenizer cuts, in order; None where it does more."""
    steps = list(flatten(pre_tokenizer or {}))
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    patterns = [step_pattern(step) for step in steps[:-1]]
    patterns += [GPT2_PATTERN] if steps[-1].get("use_regex", True) else []
    return None if None in patterns else [pattern for pattern in patterns if pattern is not None]


def flatten(step: Any) -> Iterator[Any]:
    if step.get("type") == "Sequence":
        for inner in step["pretokenizers"]:
            yield from flatten(inner)
    else:
        yield step


def step_pattern(step: Any) -> str | None:
    """A step as a pattern whose matches are words of their own."""
    if step.get("type") == "Digits":
        return r"\p{N}" if step.get("individual_digits") else None
    if step.get("type") != "Split":
        return None
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    kept = step.get("behavior") == "Removed" and step.get("invert")
    pattern = step.get("pattern", {}).get("Regex")
    return pattern if isolated or kept else None


def build_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of one of these names."""
    patterns = WORD_SPLITS[name].patterns
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == r"\p{N}"
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in patterns
        if pattern != GPT2_PATTERN
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=patterns[-1] == GPT2_PATTERN)
    return pre_tokenizers.Sequence([*steps, byte_level])
