"""One master seed, and a stream of its own for every use of chance: adding a consumer never shifts the others."""

from __future__ import annotations

import hashlib


def stream(seed: int, name: str) -> int:
    """The seed of one use (`init`, `order`, `dropout`, `sampling`): 63 bits of sha256(seed, name)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
