"""The bytes of each token: where a text may be cut so that a token ends there.

Commonly got wrong: decoding a token and encoding what came out. A token that holds half a character decodes to U+FFFD,
whose three bytes are in no text, and every boundary after it is misplaced."""

from __future__ import annotations

import json
from collections.abc import Sequence

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each id, from the vocabulary and never from decoded text; a control token has none. For
    byte-level BPE and for tokens that are plain text; UsageError for other kinds (SentencePiece writes its spaces
    differently)."""
    engine, controls = tokenizer.backend_tokenizer, set(tokenizer.special_tokens)
    added = {number: token.content for number, token in engine.get_added_tokens_decoder().items()}
    kind = (json.loads(engine.to_str())["decoder"] or {}).get("type")
    if kind not in ("ByteLevel", "Fuse"):
        raise UsageError(
            f"the bytes of single tokens are not known for a tokenizer with the decoder {kind}: take ByteLevel "
            "(GPT-2, Llama 3, Qwen) or of whole characters"
        )
    letters = unicode_to_bytes()
    found: list[bytes] = []
    for number in map(int, ids):
        name = engine.id_to_token(number)
        if name is None:
            raise UsageError(f"{number} is no id of this tokenizer, which has {tokenizer.vocab_size}")
        if name in controls:
            found.append(b"")
        else:
            plain = kind == "Fuse" or number in added
            found.append(name.encode() if plain else bytes(letters[letter] for letter in name))
    return found


def unicode_to_bytes() -> dict[str, int]:
    """GPT-2's character for each byte: printable ones map to themselves, the others to code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
