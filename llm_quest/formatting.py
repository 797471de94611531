"""Numbers as people read them, and columns that line up."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_quest.errors import UsageError


def format_bytes(number_of_bytes: float) -> str:
    """Bytes in powers of ten: 512 bytes, 32.8 kB, 2.47 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number_of_bytes < 999.5 or unit == "TB":
            return f"{number_of_bytes:,.0f} bytes" if unit == "bytes" else f"{number_of_bytes:.3g} {unit}"
        number_of_bytes /= 1000
    raise AssertionError("the last unit takes everything")


def format_quantity(number: float) -> str:
    """950, 12,400, 1.2 M, 3.4 G"""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,.0f}"


def parse_quantity(text: str, option: str) -> float:
    """`50k`, `1.5M`, `4B`, `2e9` -> the number. UsageError for another text, which names the option."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgbt]?)", text.strip().lower())
    if match is None:
        raise UsageError(f"{option} {text!r} is no number; write 50k, 500M or 1.5B")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}[match[2]]


def format_duration(seconds: float) -> str:
    """0.42 s, 42 s, 3 min 20 s, 5 h 12 min, 3.4 days"""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds < 48 * 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{seconds / 86400:.1f} days"


def format_duration_range(least: float, most: float) -> str:
    """`about 42 s`, `about 3 min 20 s to 5 h 12 min`: of two durations that read alike one."""
    shown = [format_duration(one if one >= 100 else round(one)) for one in (least, most)]
    return f"about {' to '.join(dict.fromkeys(shown))}"


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Columns of equal width; `right` names those that are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
