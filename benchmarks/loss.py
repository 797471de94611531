"""Time and peak memory of one training step's loss at a large vocabulary, each form in a process of its own.

python -m benchmarks.loss            # V 128,256, D 256, 1,024 tokens; every form, then a whole step against
transformers
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

VOCAB, WIDTH, LAYERS, TOKENS = 128_256, 256, 4, 1024


def peak() -> float:
    """Peak resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_loss(form: str) -> dict[str, float]:
    from llm_quest.objectives.cross_entropy import linear_cross_entropy

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,))
    weight.grad = torch.zeros_like(weight)
    before, seconds = peak(), []
    for _ in range(3):
        start = time.perf_counter()
        (linear_cross_entropy(x, weight, targets, form) / TOKENS).backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "extra_mb": peak() - before}


def model_config():
    from llm_quest.layers.rotary import RotaryEmbedding
    from llm_quest.models.llama import Config

    return Config(VOCAB, WIDTH, LAYERS, 4, 2, 64, 704, TOKENS, RotaryEmbedding(64, 500_000.0), tie_word_embeddings=True)


def one_step(who: str) -> dict[str, float]:
    """Peak memory above the resting model of forward and backward, B 1, T 1024."""
    tokens = torch.randint(0, VOCAB, (1, TOKENS + 1))
    import llm_quest as quest
    from llm_quest.models.llama import FAMILY

    if who == "transformers":
        import transformers

        config = transformers.LlamaConfig(
            **{k: v for k, v in FAMILY.publish(model_config()).items() if k != "rope_scaling"}
        )
        model = transformers.LlamaForCausalLM(config).float()

        def step() -> None:
            model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()

    else:
        from llm_quest.data.batch import TokenBatch
        from llm_quest.objectives.next_token import NextTokenLoss

        objective = NextTokenLoss(quest.build(model_config()).train(), form=who)
        batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], None, None)

        def step() -> None:
            loss = objective(batch)
            (loss.total / loss.count).backward()

        model = objective
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before, seconds = peak(), []
    for _ in range(3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "extra_mb": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="")
    part = parser.parse_args().part
    if part:
        kind, name = part.split(":")
        print(json.dumps(one_loss(name) if kind == "loss" else one_step(name)))
        return
    print("| what | seconds | extra MB |\n| --- | --- | --- |")
    for part in ("loss:full", "loss:chunked", "loss:fused", "step:transformers", "step:full", "step:auto"):
        run = subprocess.run([sys.executable, "-m", "benchmarks.loss", "--part", part], capture_output=True, text=True)
        if run.returncode:
            print(part, "failed:", run.stderr.strip().splitlines()[-1])
            continue
        result = json.loads(run.stdout.splitlines()[-1])
        print(f"| {part} | {result['seconds']:.2f} | {result['extra_mb']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
