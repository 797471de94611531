"""Quantized weights against float32: tokens a second at batch 1 (in turn, in one process), and, of a trained model,
perplexity on held-out text.

python -m benchmarks.quantized [--shape 124m-llama] [--pairs 5] [--new 32] [--compile] [--model RUN [--tokens 20000]]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

import llm_quest as quest
from benchmarks.generation import PROMPT, SHAPES
from benchmarks.pairs import race, table
from llm_quest.data.corpus import load_corpus
from llm_quest.data.split import split_corpus
from llm_quest.layers.weight_formats import FORMATS
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.config import load_run_config, parse_config
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.scope import Scope
from llm_quest.techniques.quantize import Quantize

FEW = 8
"""Tokens that one pass reads where the kernel for few rows is measured."""


def speeds(shape: str, pairs: int, new: int, compile: bool) -> None:
    config = SHAPES[shape][1]
    models = {"float32": quest.build(config)}
    models |= {name: Quantize(name)(quest.build(config)) for name in FORMATS}  # type: ignore[arg-type]
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def decoding(model: Decoder):
        return lambda: quest.generate(
            model, prompt, max_new_tokens=new, temperature=0.0, eos_token_id=(), compile=compile
        )

    rows = race({name: decoding(model) for name, model in models.items()}, pairs=pairs)
    how = "compiled" if compile else "eager"
    print(f"\n{shape}, batch 1, {PROMPT} tokens in, {new} out, {how}, {torch.get_num_threads()} threads\n")
    print(table(rows, new, "tokens/s"), flush=True)


@torch.inference_mode()
def nats(model: Decoder, tokens: torch.Tensor, step: int) -> float:
    """-ln p of all but the first token of this row, read `step` tokens at a time."""
    length, total = tokens.shape[1] - 1, 0.0
    cache = model.new_cache(1, length)
    for start in range(0, length, step):
        part = tokens[:, start : min(start + step, length)]
        logits = model(part, Scope.unpadded(part, cache=cache, start=start))
        targets = tokens[0, start + 1 : start + 1 + part.shape[1]]
        total += float(-logits[0].double().log_softmax(-1).gather(1, targets[:, None]).sum())
    return total


def perplexities(where: str, limit: int) -> None:
    data = parse_config(PretrainConfig, load_run_config(Path(where))).data
    documents = split_corpus(load_corpus(data.source), held_out=data.held_out).val
    name = f"the text that {where} held out of {data.source}"
    tokenizer, plain = quest.Tokenizer.load(f"{where}/tokenizer"), quest.load(where, dtype="float32")
    ids = [token for document in documents for token in [*tokenizer.encode(document.text), tokenizer.eos_token_ids[0]]][
        :limit
    ]
    width = plain.config.max_position_embeddings
    rows = [torch.tensor([ids[start : start + width]]) for start in range(0, len(ids) - 1, width)]
    forms = {"float32": (plain, width)}
    for kind in FORMATS:
        small = Quantize(kind)(quest.load(where, dtype="float32"))  # type: ignore[arg-type]
        forms |= {f"{kind}, all at once": (small, width), f"{kind}, {FEW} tokens a pass": (small, FEW)}
    print(f"\nperplexity on {len(ids):,} tokens of {name}\n\n| form | perplexity | to float32 |\n| --- | --- | --- |")
    first = None
    for form, (model, step) in forms.items():
        perplexity = math.exp(sum(nats(model, row, step) for row in rows) / sum(row.shape[1] - 1 for row in rows))
        first = first or perplexity
        print(f"| {form} | {perplexity:.4f} | {perplexity / first - 1:+.3%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=20_000)
    options = parser.parse_args()
    for shape in [options.shape] if options.shape else ["11m", "124m-llama"]:
        speeds(shape, options.pairs, options.new, options.compile)
    if options.model:
        perplexities(options.model, options.tokens)


if __name__ == "__main__":
    main()
