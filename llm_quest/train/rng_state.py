"""Random-number generators: the seed of each consumer, their states as JSON, and contexts that restore them."""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def derive_seed(seed: int, *names: object) -> int:
    """The seed of one consumer of random numbers ("init", "order", "dropout", "sampling"): 63 bits of
    sha256(seed/names). Adding a consumer does not change the others."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def set_seed(seed: int) -> None:
    """Seed the process's generators (dropout draws from torch's)."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@dataclass(frozen=True)
class GeneratorStates:
    """The states of the generators of this process; None without the accelerator."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None
    mps: Tensor | None

    def restore(self) -> None:
        """Restore these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        if self.mps is not None:
            torch.mps.set_rng_state(self.mps)


def capture_generators() -> GeneratorStates:
    """Capture the states of the generators of this process (about 50 microseconds)."""
    return GeneratorStates(
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    )


def get_rng_state() -> dict[str, Any]:
    """The process's generators as JSON: python, numpy, torch, cuda."""
    now = capture_generators()
    kind, keys, position, has_gauss, gauss = now.numpy
    state = {
        "python": now.python,
        "numpy": [kind, _encode_base64(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(gauss)],
        "torch": _encode_base64(now.torch.numpy().tobytes()),
    }
    for name, states in (("cuda", now.cuda), ("mps", now.mps)):
        if states is not None:
            state[name] = _encode_base64(states.numpy().tobytes())
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `get_rng_state` returned, also after a conversion to JSON and back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, last = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), dtype=np.uint32), position, has_gauss, last))
    torch.set_rng_state(_decode_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode_tensor(state["cuda"]))
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_decode_tensor(state["mps"]))


class RNGState:
    """The random-number generators of one process: Python's, NumPy's, torch's and the accelerator's."""

    def __init__(self, seed: int, rank: int = 0):
        self.initial_seed, self.rank = seed, rank

    def seed(self, *names: object) -> None:
        """Seed all generators, differently on each rank. names: what else the seed depends on."""
        set_seed(derive_seed(self.initial_seed, "train", self.rank, *names))

    def state_dict(self) -> dict[str, Any]:
        return get_rng_state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        set_rng_state(state_dict)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside. Afterwards every module has its mode, and every generator its state,
    from before."""
    modes = [(module, module.training) for module in model.modules()]
    before = capture_generators()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        before.restore()
        for module, training in modes:
            module.training = training


def _encode_base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _decode_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
