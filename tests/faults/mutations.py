"""Makes hostile variants of a good input: of its bytes, and of the values inside it."""

from __future__ import annotations

import json
import random
from typing import Any

DIGITS = "@@5000 digits@@"
"""Stands for a number of 5,000 digits, which Python would not print: put in after the JSON is written."""
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), DIGITS,
    "", " ", "x", "x" * 5000, "\ud800", "\0", "\x1b[31m", "../../etc/passwd", "null", "1e9", "\u2028", "{{ 1 }}",
    "(" * 300, [], {}, [[]], [None], [{}], {"a": {}}, [1] * 300, ["x"] * 300, {"load": "x"}, {"": ""},
)  # fmt: skip


HOSTILE_BYTES = (b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"]", b"\r\n", b"\xef\xbb\xbf", b"9" * 5000)


def nest_deeply(rng: random.Random) -> Any:
    """Lists or objects in one another."""
    value: Any = 1
    for _ in range(rng.choice((5, 200, 900))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A copy with one or two values, keys or items changed, at any depth."""
    if rng.random() < 0.04:
        return nest_deeply(rng)
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.15:
            return {name: one for name, one in value.items() if name != key}
        if kind < 0.25:
            return {
                ("x" * 200 if rng.random() < 0.5 else key.upper()) if name == key else name: v
                for name, v in value.items()
            }
        return {**value, key: mutate_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        if rng.random() < 0.25:
            return value[:place] + value[place + 1 :]
        return [*value[:place], mutate_value(value[place], rng), *value[place + 1 :]]
    return rng.choice(HOSTILE)


def to_hostile_json(value: Any) -> bytes:
    """JSON with what JSON may hold and Python has limits for: huge numbers, half surrogates, NaN."""
    text = json.dumps(value).replace(json.dumps(DIGITS), "9" * 5000)
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, cut, doubled or put in."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = rng.choice(HOSTILE_BYTES)
        elif kind == 3:
            changed[place : place + rng.randrange(1, 40)] = b""
        elif kind == 4:
            changed[place:place] = changed[place : place + 60] * rng.choice((1, 3))
        else:
            changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    return bytes(changed)
