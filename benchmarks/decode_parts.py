"""Where a decoded token's time goes: the 124M Llama shape, one row, one thread, CPU time. It answers what binds a step:
the reading of weights, the products' library, or everything between the products.

Each matrix of the model is multiplied with one row, in the model's order, as in a step; the rest of the step is the
difference. Beside it the rate at which this machine reads the same bytes: a sum over all weights in order, from the
pages they lie in and from pages of 2 MB. About two minutes on a machine without other jobs:

OMP_NUM_THREADS=1 python -m benchmarks.decode_parts [--shape 124m-llama] [--new 48] [--rounds 5] [--no-compile]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llm_quest as quest
from benchmarks.generation import PROMPT, SHAPES
from llm_quest.models.decoder import Decoder
from llm_quest.scope import Scope
from llm_quest.techniques.quantize import Quantize
from llm_quest.tensor_files import empty_huge_pages

FORMATS = ("float32", "int8", "int4")


class StepRecord(TorchDispatchMode):
    """Counts the operators of a pass and keeps those that multiply with a matrix of the model."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.places = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() > 1}
        self.operators, self.products = 0, list[tuple[Any, Any, Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        tensors = [one for one in args if isinstance(one, Tensor)]
        reads = any(one.untyped_storage().data_ptr() in self.places for one in tensors)
        if reads and len(tensors) > 1 and not any(word in str(func) for word in ("embedding", "index", "gather")):
            self.products.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def seconds_of(call: Callable[[], object], rounds: int) -> float:
    """The median CPU time of a call."""
    call()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def token_seconds(model: Decoder, new: int, rounds: int, compile: bool) -> float:
    prompt = [torch.arange(PROMPT).tolist()]

    def decode(tokens: int) -> None:
        quest.generate(model, prompt, max_new_tokens=tokens, temperature=0.0, eos_token_id=(), compile=compile)

    def difference() -> float:
        start = time.process_time()
        decode(4)
        middle = time.process_time()
        decode(4 + new)
        return (time.process_time() - middle - (middle - start)) / new

    decode(4)
    return statistics.median(difference() for _ in range(rounds))


@torch.inference_mode()
def record_step(model: Decoder) -> StepRecord:
    """A cached step of one token."""
    cache = model.new_cache(1, 16)
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids[:, :3], Scope.unpadded(ids[:, :3], cache=cache))
    with StepRecord(model) as record:
        model(ids[:, 3:], Scope.unpadded(ids[:, 3:], cache=cache, start=3))
    return record


@torch.inference_mode()
def product_seconds(record: StepRecord, rounds: int) -> float:
    """The products of a step alone, in its order."""
    return seconds_of(lambda: [func(*args, **kwargs) for func, args, kwargs in record.products], rounds)


@torch.inference_mode()
def read_seconds(weights: list[Tensor], rounds: int) -> float:
    """Sums over the weights, one after another: a loop in order that does nothing but read."""
    return seconds_of(lambda: [one.sum() for one in weights], rounds)


def in_huge_pages(weights: list[Tensor]) -> list[Tensor]:
    moved = [empty_huge_pages(one.shape, device="cpu", dtype=one.dtype) for one in weights]
    return [there.copy_(one.detach()) for there, one in zip(moved, weights, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["11m", "124m-llama"], default="124m-llama")
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = SHAPES[options.shape][1]
    print(
        "| weights | token, eager, ms | compiled | products alone | MB | GB/s of the products | operators of a step |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in FORMATS:
        model = quest.build(config, seed=0)
        model = model if name == "float32" else Quantize(name)(model)  # type: ignore[arg-type]
        record, size = record_step(model), sum(p.numel() * p.element_size() for p in model.parameters())
        eager = token_seconds(model, options.new, options.rounds, compile=False)
        step = float("nan") if options.no_compile else token_seconds(model, options.new, options.rounds, compile=True)
        products = product_seconds(record, options.rounds * 3)
        times = " | ".join(f"{1e3 * one:.1f}" for one in (eager, step, products))
        rate = size / products / 1e9
        print(f"| {name} | {times} | {size / 1e6:.0f} | {rate:.1f} | {record.operators} |", flush=True)
    weights = [p.detach() for p in quest.build(config, seed=0).parameters()]
    size = sum(p.numel() * p.element_size() for p in weights)
    for place, held in (("pages of 4 KB", weights), ("pages of 2 MB", in_huge_pages(weights))):
        seconds = read_seconds(held, options.rounds * 3)
        vectors = seconds_of(lambda held=held: [matrix_vector(one) for one in held], options.rounds * 3)  # type: ignore[misc]
        print(f"{place}: a sum reads {size / seconds / 1e9:.1f} GB/s, F.linear with one row {size / vectors / 1e9:.1f}")


def matrix_vector(weight: Tensor) -> Tensor:
    return weight if weight.dim() < 2 else torch.nn.functional.linear(torch.ones(1, weight.shape[1]), weight)


if __name__ == "__main__":
    main()
