"""Proves that llama.cpp computes our GGUF files, for every family: log-probabilities at every position of a random
text, greedy texts, ids of texts, and perplexities of float32, Q8_0 and Q4_0 side by side.

Flash attention off and a float32 cache; norms, biases and sinks random. A difference is allowed up to 1e-5, or three
times what float32 itself loses here against float64. llama.cpp reads GELU from a table with float16 on either side:
such families are compared with our model that does the same, and 2e-3 are allowed, for a number near the middle of two
float16 may be rounded to either; the difference to our own GELU stands beside it.

python -m tests.gguf_proof [--family NAME ...] [--positions 60] [--prompts 50] [--tokens 64]
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llm_quest as quest
from llm_quest.hub.gguf_export import save_gguf
from tests.gguf_judge import (
    LlamaCpp,
    compare_distributions,
    our_log_probs,
    randomize_for_judging,
    with_ggml_gelu,
    word_tokenizer,
)
from tests.gguf_models import GGUF_MODELS, VOCAB

GELU_FAMILIES = ("gpt2", "gpt_neox", "starcoder2", "gemma")
TIGHT, GELU = 1e-5, 2e-3


def limit_of(name: str, model: Any, ids: list[int]) -> float:
    """The allowed difference of log-probabilities."""
    if name.startswith(GELU_FAMILIES):
        return GELU
    wide = our_log_probs(copy.deepcopy(model).double(), ids)
    return max(TIGHT, 3 * float((wide - our_log_probs(model, ids)).abs().max()))


def counterpart(name: str, model: Any) -> Any:
    """The model that llama.cpp computes: with its GELU, where there is one."""
    return with_ggml_gelu(copy.deepcopy(model)) if name.startswith(GELU_FAMILIES) else model


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy_agreement(model: Any, judge: LlamaCpp, prompts: int, tokens: int, limit: float) -> tuple[int, int, int]:
    """Tokens that are our best one, tokens that are as good within the limit, and all. A text is read by both: the
    token that llama.cpp chose is compared with our choice behind the same tokens."""
    same = close = count = 0
    for seed in range(prompts):
        prompt = random_ids(4 + seed % 9, seed + 100)
        ids, _ = judge.complete(prompt, tokens, 1)
        rows = our_log_probs(model, prompt + ids)[len(prompt) - 1 : -1]
        for row, token in zip(rows, ids, strict=True):
            count += 1
            same += int(row.argmax()) == token
            close += int(row.argmax()) != token and bool(row[token] >= row.max() - 2 * limit)
    return same, close, count


def perplexity(judge: LlamaCpp, ids: list[int]) -> float:
    """exp of the mean loss over a text, as llama.cpp sees it."""
    losses = []
    for length in range(1, len(ids)):
        _, steps = judge.complete(ids[:length], 1, VOCAB)
        losses.append(-steps[0].get(ids[length], -50.0))
    return math.exp(sum(losses) / len(losses))


def prove(name: str, positions: int, prompts: int, tokens: int, folder: Path) -> tuple[str, bool]:
    """One row of the table, and whether everything is within its limit."""
    start = time.monotonic()
    model = randomize_for_judging(quest.build(GGUF_MODELS[name](), seed=0))
    length = min(positions, model.config.max_position_embeddings - 1)
    tokenizer, ids = word_tokenizer(VOCAB), random_ids(length, 1)
    files = {kind: folder / f"{kind}.gguf" for kind in ("f32", "q8_0", "q4_0")}
    for kind, file in files.items():
        quantize = None if kind == "f32" else kind
        save_gguf(model, tokenizer, file, quantize=quantize, overwrite=True)
    context = 512 if name != "gpt2" else 256
    judge, limit = LlamaCpp(files["f32"], context), limit_of(name, model, ids)
    worst, plain = (compare_distributions(one, judge, ids) for one in (counterpart(name, model), model))
    same, close, count = greedy_agreement(model, judge, prompts, tokens, limit)
    text = ids[: min(length, 40)]
    ppl = {kind: perplexity(judge if kind == "f32" else LlamaCpp(file, context), text) for kind, file in files.items()}
    passed = worst <= limit and same + close == count
    cells = [name, f"{worst:.1e}", f"{plain:.1e}", f"{limit:.1e}", f"{same} + {close} of {count}"]
    cells += [f"{ppl[kind]:.4g}" for kind in files]
    return f"| {' | '.join(cells)} | {time.monotonic() - start:.0f} s |", passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=list(GGUF_MODELS), default=list(GGUF_MODELS))
    parser.add_argument("--positions", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | difference | to our GELU | allowed | greedy tokens: equal + as good | f32 | q8_0 | q4_0 | time |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    failed = []
    for name in options.family:
        with tempfile.TemporaryDirectory() as folder:
            row, passed = prove(name, options.positions, options.prompts, options.tokens, Path(folder))
        print(row, flush=True)
        failed += [] if passed else [name]
    if failed:
        raise SystemExit(f"beyond the limit: {', '.join(failed)}")


if __name__ == "__main__":
    main()
