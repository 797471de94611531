"""Structured output: the tokens that keep a text within a JSON schema (llguidance computes them)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError

MAX_SCHEMA_CHARACTERS = 100_000


class GrammarCompiler:
    """Makes grammars for one tokenizer. eos_token_ids: the tokens that end a text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, list(eos_token_ids)

    @functools.cached_property
    def backend(self) -> Any:
        """llguidance's own view of the tokenizer. It takes a second to make for a large vocabulary."""
        from llguidance import LLTokenizer

        if not self.eos_token_ids:
            raise UsageError("response_format needs a tokenizer that names an end of text, and this model's does not")
        rows = max(self.vocab_size, self.tokenizer.vocab_size)
        try:
            return LLTokenizer(self.tokenizer.backend_tokenizer.to_str(), n_vocab=rows, eos_token=self.eos_token_ids)
        except Exception as error:
            raise UsageError(f"response_format is not possible with this tokenizer: {first_line(error)}") from None

    def compile(self, schema: Mapping[str, Any]) -> str:
        """The grammar of a JSON schema. UsageError for one that cannot be enforced (an unknown keyword, a type that
        does not exist)."""
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise UsageError(f"the schema has {len(text):,} characters; at most {MAX_SCHEMA_CHARACTERS:,} are read")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text)
            problem = LLMatcher.validate_grammar(grammar, self.backend)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise UsageError(f"this JSON schema cannot be enforced: {first_line(problem)}")
        return grammar

    def start(self, grammar: str) -> JsonGrammar:
        """The beginning of a text."""
        from llguidance import LLMatcher

        return JsonGrammar(LLMatcher(self.backend, grammar), self.vocab_size)


class JsonGrammar:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self.matcher, self.vocab_size = matcher, vocab_size

    def token_mask(self) -> Bool[Tensor, " V"]:
        """Which tokens may follow; an end of text where the grammar is complete."""
        words = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(words, bitorder="little")[: self.vocab_size].astype(bool))

    def consume(self, token: int) -> None:
        """Go on behind a token."""
        self.matcher.consume_token(token)


def first_line(error: object) -> str:
    return (str(error).strip().splitlines() or ["unknown"])[0][:300]
