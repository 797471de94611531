"""What a cache holds at published sizes, measured on a cache that is really made and filed into (shapes and types,
without the memory), beside what the papers' numbers give by hand.

python -m benchmarks.cache
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_quest.cost.flops import ModelCost
from llm_quest.models.build import preset

CONTEXT = 32_768


@dataclass(frozen=True)
class Theory:
    """By hand, bfloat16: bytes that each token adds, bytes that do not grow; and what keys and values of every head of
    every layer would add (multi-head attention without a window, as GPT-2 keeps them)."""

    preset: str
    why: str
    per_token: int
    fixed: int
    plain: int


THEORY = (
    Theory("llama3.1-8b", "32 layers x 8 of 32 heads x (128 + 128)", 32 * 8 * 256 * 2, 0, 32 * 32 * 256 * 2),
    Theory("deepseek-v3", "61 layers x (512 latent + 64 rotary)", 61 * 576 * 2, 0, 61 * 128 * (192 + 128) * 2),
    Theory(
        "gemma3-1b",
        "4 global layers x (256 + 256); 22 rings of 512 and a spare slot",
        4 * 512 * 2,
        22 * (512 + 1) * 512 * 2,
        26 * 4 * 512 * 2,
    ),
    Theory(
        "mimo-v2-flash",
        "9 global layers x 4 x (192 + 128); 39 rings of 129 and a spare slot, x 8 x (192 + 128)",
        9 * 4 * 320 * 2,
        39 * (129 + 1) * 8 * 320 * 2,
        48 * 64 * 320 * 2,
    ),
    Theory(
        "qwen3-next-80b-a3b",
        "12 attention layers x 2 x (256 + 256); 36 states of 32 x 128 x 128 in float32, 3 columns of 8,192",
        12 * 2 * 512 * 2,
        36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2),
        48 * 16 * 512 * 2,
    ),
)


def main() -> None:
    print("| preset | by hand | bytes per token, measured | fixed bytes, measured | at 32,768 tokens | of plain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for theory in THEORY:
        growing, fixed, total = ModelCost.from_config(preset(theory.preset).config).cache_bytes(CONTEXT)
        agrees = "" if (growing, fixed) == (theory.per_token, theory.fixed) else " (by hand otherwise!)"
        share = total / (theory.plain * CONTEXT)
        numbers = f"{growing:,} | {fixed:,}{agrees} | {total / 2**20:,.0f} MB | {100 * share:.1f} %"
        print(f"| {theory.preset} | {theory.why} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
