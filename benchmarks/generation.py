"""Decoding speed against transformers' own `generate`, in turn, in one process, on the same weights.

Its default cache, same dtype, greedy, forced length; an 11M Llama shape and the 124M GPT-2 shape, batch 1 and 32,
float32 and bfloat16.

python -m benchmarks.generation --all                  every row of docs/benchmarks.md's table, as one table
python -m benchmarks.generation [--pairs 5] [--new 64] [--shape 11m] [--batch 1] [--dtype bfloat16] [--no-compile]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import llm_quest as quest
from benchmarks.pairs import Row, race, table
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models import gpt2, llama

PROMPT = 64
NEW = {("11m", 1): 128, ("11m", 32): 96, ("124m", 1): 24, ("124m", 32): 24}
SHAPES: dict[str, tuple[Any, Any]] = {
    "11m": (
        llama,
        llama.Config(4096, 384, 6, 6, 2, 64, 1024, 1024, RotaryEmbedding(64, 500_000.0), tie_word_embeddings=False),
    ),
    "124m": (gpt2, gpt2.Config(50257, 768, 12, 12, 3072, 1024)),
    "124m-llama": (
        llama,
        llama.Config(50257, 768, 12, 12, 12, 64, 2048, 1024, RotaryEmbedding(64, 500_000.0), tie_word_embeddings=True),
    ),
}


def transformers_model(ours: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Their class with our weights, through a folder, so that both compute the same thing."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        quest.save(ours, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for parameter in theirs.parameters():  # in memory of its own, as ours, and not mapped from the file
        parameter.data = parameter.data.clone()
    return theirs


def contestants(config: Any, batch: int, dtype: torch.dtype, new: int, compiled: bool) -> dict[str, Callable]:
    ours = quest.build(config, dtype=dtype)
    theirs = transformers_model(ours, dtype)
    prompts = torch.randint(0, config.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def peer() -> list[list[int]]:
        return theirs.generate(prompts, attention_mask=mask, **length)[:, PROMPT:].tolist()

    def eager() -> list[list[int]]:
        rows = quest.generate(ours, prompts, max_new_tokens=new, temperature=0.0, eos_token_id=())
        return [row.tokens for row in rows]

    def step() -> list[list[int]]:
        rows = quest.generate(ours, prompts, max_new_tokens=new, temperature=0.0, eos_token_id=(), compile=True)
        return [row.tokens for row in rows]

    if dtype == torch.float32:
        assert peer() == eager(), "the same weights, the same greedy text"
    return {"transformers": peer, "ours, eager": eager} | ({"ours, compiled step": step} if compiled else {})


def measured(shape: str, batch: int, dtype: str, *, new: int, pairs: int, compiled: bool) -> list[Row]:
    """One race: transformers, ours eager, ours compiled."""
    return race(contestants(SHAPES[shape][1], batch, getattr(torch, dtype), new, compiled), pairs=pairs)


def whole_table(pairs: int) -> None:
    """A line as soon as it is measured; as many new tokens as make the prefill small and the whole about 8 minutes."""
    print("| shape, batch, dtype | transformers, tokens/s | ours, eager | ours, compiled step |")
    print("| --- | --- | --- | --- |")
    for (shape, batch), new in NEW.items():
        for dtype in ("float32", "bfloat16"):
            peer, *ours = measured(shape, batch, dtype, new=new, pairs=pairs, compiled=True)
            ratios = " | ".join(f"{row.times_reference:.2f} ({row.low:.2f}-{row.high:.2f})" for row in ours)
            print(f"| {shape}, {batch}, {dtype} | {batch * new / peer.seconds:,.4g} | {ratios} |", flush=True)
            torch.compiler.reset()
            gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.all:
        whole_table(options.pairs)
        return
    results = []
    for shape in [options.shape] if options.shape else ["11m", "124m"]:
        for batch in [options.batch] if options.batch else [1, 32]:
            for dtype in [options.dtype] if options.dtype else ["float32", "bfloat16"]:
                compiled = not options.no_compile
                rows = measured(shape, batch, dtype, new=options.new, pairs=options.pairs, compiled=compiled)
                results.append({"shape": shape, "batch": batch, "dtype": dtype, "rows": [row.__dict__ for row in rows]})
                if not options.json:
                    print(
                        f"\n{shape}, batch {batch}, {dtype}, {PROMPT} tokens in, {options.new} out, one line a form\n"
                    )
                    print(table(rows, batch * options.new, "tokens/s"), flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
