"""Int8 weights against float32: tokens a second at batch 1 (in turn, in one process), and, of a trained model,
perplexity on held-out text, by the definition and by the kernel that decoding uses.

python -m benchmarks.int8 [--shape 124m] [--pairs 5] [--new 32] [--model RUN [--tokens 20000]]
"""

from __future__ import annotations

import argparse
import math

import torch

import llm_quest as quest
from benchmarks.generation import PROMPT, SHAPES
from benchmarks.pairs import race, table
from llm_quest.cli.evaluate import load_eval_documents
from llm_quest.layers.int8 import MAX_KERNEL_ROWS
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.techniques.int8 import Int8Weights


def speeds(shape: str, pairs: int, new: int) -> None:
    config = SHAPES[shape][1]
    models = {"float32": quest.build(config), "int8 weights": Int8Weights()(quest.build(config))}
    prompt = torch.randint(0, config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def decoding(model: Decoder):
        return lambda: quest.generate(model, prompt, max_new_tokens=new, temperature=0.0, eos_token_id=())

    rows = race({name: decoding(model) for name, model in models.items()}, pairs=pairs)
    print(f"\n{shape}, batch 1, {PROMPT} tokens in, {new} out, {torch.get_num_threads()} threads\n")
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
    _, documents, name = load_eval_documents(where, "")
    tokenizer, plain = quest.Tokenizer.load(f"{where}/tokenizer"), quest.load(where, dtype="float32")
    small = Int8Weights()(quest.load(where, dtype="float32"))
    ids = [token for document in documents for token in [*tokenizer.encode(document.text), tokenizer.eos_token_ids[0]]][
        :limit
    ]
    width = plain.config.max_position_embeddings
    rows = [torch.tensor([ids[start : start + width]]) for start in range(0, len(ids) - 1, width)]
    forms = {
        "float32": (plain, width),
        "int8, by the definition": (small, width),
        f"int8, by the kernel ({MAX_KERNEL_ROWS} tokens a pass)": (small, MAX_KERNEL_ROWS),
    }
    print(f"\nperplexity on {len(ids):,} tokens of {name}\n\n| form | perplexity | to float32 |\n| --- | --- | --- |")
    first = None
    for form, (model, step) in forms.items():
        perplexity = math.exp(sum(nats(model, row, step) for row in rows) / sum(row.shape[1] - 1 for row in rows))
        first = first or perplexity
        print(f"| {form} | {perplexity:.4f} | {perplexity / first - 1:+.3%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["124m", "124m-llama"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=20_000)
    options = parser.parse_args()
    for shape in [options.shape] if options.shape else ["124m", "124m-llama"]:
        speeds(shape, options.pairs, options.new)
    if options.model:
        perplexities(options.model, options.tokens)


if __name__ == "__main__":
    main()
