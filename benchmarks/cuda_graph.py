"""A decode step as a CUDA graph: the kernels of one step are recorded once and replayed with one launch.

A graph reads and writes fixed addresses. The step replaces some of the cache's tensors (positions in slots, recurrent
states); after each step their new values are copied into the tensors that the graph knows. On the CPU nothing is
recorded, and the step itself runs: the same state, so a test can judge it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llm_quest.layers.kv_cache import Cache
from llm_quest.models.decoder import Decoder

Step = Callable[[Decoder, Tensor, Tensor, Cache], Tensor]
WARM_UP = 3


class StaticDecodeStep:
    """`graph(tokens (R,1), positions (R,1)) -> logits (R,V)`, which the next call overwrites.

    step: compiled, so that it reads no value on the host. The cache has been prefilled; it is advanced as the step
    would advance it."""

    def __init__(self, step: Step, model: Decoder, tokens: Tensor, positions: Tensor, cache: Cache):
        self.step, self.model, self.cache = step, model, cache
        self.tokens, self.positions = tokens.clone(), positions.clone()
        self.state = dict(cache_tensors(cache))
        self.graph = self.record() if tokens.device.type == "cuda" else None

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits

    def run(self) -> None:
        """One step; its new state is copied to the addresses of the old."""
        self.logits = self.step(self.model, self.tokens, self.positions, self.cache)
        for place, new in list(cache_tensors(self.cache)):
            if new is not self.state[place]:
                self.state[place].copy_(new)
        set_cache_tensors(self.cache, self.state)

    def record(self) -> torch.cuda.CUDAGraph:
        """Warm up on a side stream, record, and put the state back to where it was."""
        before = {place: tensor.clone() for place, tensor in self.state.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        for place, tensor in before.items():
            self.state[place].copy_(tensor)
        return graph


Place = tuple[int, str, str]
"""Number of the cache's part, attribute, key in it (empty: the attribute is the tensor)."""


def cache_tensors(cache: Cache) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor of a cache with its place."""
    for number, part in enumerate(cache.row_states()):
        for attribute, value in vars(part).items():
            if isinstance(value, Tensor):
                yield (number, attribute, ""), value
            elif isinstance(value, dict):
                yield from (((number, attribute, key), one) for key, one in value.items() if isinstance(one, Tensor))


def set_cache_tensors(cache: Cache, tensors: dict[Place, Tensor]) -> None:
    parts = cache.row_states()
    for (number, attribute, key), tensor in tensors.items():
        if key:
            getattr(parts[number], attribute)[key] = tensor
        else:
            setattr(parts[number], attribute, tensor)
