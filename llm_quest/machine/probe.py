"""Measures in about half a second what a machine's choices depend on: its rate at each kind of work, by name.

    products/float32/large        GFLOP/s of a product of two 768 x 768 matrices
    products/float32/small        the same of 384 x 384, the size of Muon's iterations in a small model
    eigenvalues/float32           n^3 per nanosecond of the eigenvectors of a symmetric 384 x 384 matrix
    few_rows/float32/8/plain      GFLOP/s of `F.linear` on 8 rows, over the matrices of a small model one after another
    few_rows/float32/8/columns    the same by `linear_few_rows`
    few_rows/float32/8/kernel     the same by `linear_by_kernel` (`measure_kernel_rates`)
    attention/float32             GFLOP/s of causal attention, forward and backward, at rows of 128 tokens
    muon/kernel_float32           GFLOP/s, as published, of Muon's kernel on 384 x 1024 (`measure_muon_rates`)
    weights/int8/1                billion weights per second of an 8-bit matrix, times one row (`measure_kernel_rates`)
    memory/copy                   GB/s read and written by a large copy

Commonly got wrong: other programs slow a machine for moments, and where several threads wait for one another by a
hundred times, so the mean of a few calls says little. Here calls are short, many are made in a fixed time, and the
fastest quarter counts. If the system nevertheless took the cores away too often, everything is measured again on one
thread, whose own CPU time others hardly disturb, and multiplied by the number of threads. Without bfloat16 instructions
a product takes up to 200 times as long as in float32; after the small product has shown that, nothing else is measured
in that dtype.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_quest.layers import native
from llm_quest.layers.linear import linear_by_kernel, linear_few_rows
from llm_quest.layers.muon_kernel import missing_kernel, orthogonalize_by_kernel
from llm_quest.layers.quantized_kernels import quantized_linear
from llm_quest.layers.weight_formats import FORMATS, quantize

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Clock = Callable[[], float]
PREEMPTIONS, PREEMPTIONS_PER_SECOND = 8, 30.0
"""More of them than this mean that other programs use the cores."""
RUNNING_SHARE = 0.85
"""So does a thread that runs for less of the time than this."""
LARGE, SMALL = 768, 384
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows for which the forms of a product are measured."""
FORMS = {"plain": F.linear, "columns": linear_few_rows}
WITH_KERNEL = FORMS | {"kernel": linear_by_kernel}
WEIGHT_ROWS = (1, 8)
WEIGHT_KINDS = ("float32", *FORMATS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HOPELESS = 0.25
"""Below this share of float32's rate nothing more is measured in a dtype."""
MATRICES, OUT, IN = 16, 1024, 384
SECONDS = 0.012
"""The time for calls of one kind; a call that takes longer is made once."""
BATCH, HEADS, LENGTH, HEAD_DIM = 2, 6, 128, 64
COPY_BYTES = 48 << 20
MUON_SHAPE, MUON_STEPS = (384, 1024), 5
"""For which Muon's forms are compared: the matrices of the MLP in a model of 11M parameters."""
MUON_KERNELS = {f"muon/kernel_{name}": dtype for name, dtype in DTYPES.items()}

RATES = {
    **{f"products/{dtype}/{size}": "GFLOP/s" for dtype in DTYPES for size in ("small", "large")},
    **{f"few_rows/{dtype}/{rows}/{form}": "GFLOP/s" for dtype in DTYPES for rows in ROWS for form in WITH_KERNEL},
    **{f"attention/{dtype}": "GFLOP/s" for dtype in DTYPES},
    **{f"weights/{kind}/{rows}": "billion/s" for kind in WEIGHT_KINDS for rows in WEIGHT_ROWS},
    **dict.fromkeys(MUON_KERNELS, "GFLOP/s"),
    "eigenvalues/float32": "n^3/ns",
    "memory/copy": "GB/s",
}
"""The unit of each rate that a profile can hold."""
NOT_SCALED = ("memory/copy", "eigenvalues/float32")
"""What several threads share, or hardly divide among themselves."""
REQUIRED = tuple(name for name in RATES if not any(word in name for word in ("bfloat16", "weights", "kernel")))


@dataclass(frozen=True)
class Measurement:
    """Measured rates of this machine. rates: by name (`RATES`). busy: whether other programs took the cores away, so
    that the rates are those of one thread, multiplied by the number of threads."""

    rates: dict[str, float]
    busy: bool


def measure_rates() -> Measurement:
    """The rates of this machine with the present number of threads, which is left as it is."""
    return measure_undisturbed_or_alone(_measure_all)


RatesOf = Callable[[Clock, torch.Generator], Iterator[tuple[str, float]]]


def measure_undisturbed_or_alone(rates_of: RatesOf) -> Measurement:
    """Some rates on all threads, or on one if other programs use the cores. One thread is always measured by its own
    CPU time."""
    threads = torch.get_num_threads()
    if threads > 1 and (rates := measure_undisturbed(rates_of)) is not None:
        return Measurement(rates, busy=False)
    torch.set_num_threads(1)
    try:
        rates = dict(measure_with(time.thread_time, rates_of))
    finally:
        torch.set_num_threads(threads)
    scaled = {name: rate * (1 if name in NOT_SCALED else threads) for name, rate in rates.items()}
    return Measurement(scaled, busy=threads > 1)


def measure_kernel_rates() -> dict[str, float]:
    """The rates of the package's own kernels in C++, and of what they are compared with at the same time. The first
    call may build them, for up to two minutes, so these are measured when they are needed."""
    few_rows = measure_undisturbed_or_alone(_measure_few_rows).rates if native.is_loaded() else {}
    return few_rows | measure_weight_rates() | measure_muon_rates()


def _measure_few_rows(clock: Clock, generator: torch.Generator) -> Iterator[tuple[str, float]]:
    for name in DTYPES:
        yield from few_row_rates(clock, name, generator, WITH_KERNEL)


def measure_weight_rates() -> dict[str, float]:
    """The rates of quantized weights and of float32's on one row and on eight, on one thread by its own CPU time."""
    return measure_on_one_thread(_measure_weights)


def measure_muon_rates() -> dict[str, float]:
    """The rates of Muon's kernel in the dtypes that it can be had in, on one thread by its own CPU time: its threads
    share no matrix."""
    return measure_on_one_thread(_measure_muon)


def measure_on_one_thread(rates_of: Callable[[torch.Generator], Iterator[tuple[str, float]]]) -> dict[str, float]:
    """Rates of one thread, multiplied by the number of threads."""
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            return {name: threads * rate for name, rate in rates_of(generator)}
    finally:
        torch.set_num_threads(threads)


def _measure_muon(generator: torch.Generator) -> Iterator[tuple[str, float]]:
    x = random_matrix(*MUON_SHAPE, torch.float32, generator)
    for name, dtype in MUON_KERNELS.items():
        if not missing_kernel(x.device, dtype):
            seconds = fast_seconds(
                time.thread_time, [partial(orthogonalize_by_kernel, x, MUON_STEPS, dtype)], 4 * SECONDS
            )
            yield name, newton_schulz_flops(*MUON_SHAPE) / seconds / 1e9


def newton_schulz_flops(short: int, long: int) -> int:
    """FLOPs of Muon's five steps as they are published."""
    return MUON_STEPS * 2 * short**2 * (2 * long + short)


def _measure_weights(generator: torch.Generator) -> Iterator[tuple[str, float]]:
    weights = [random_matrix(OUT, IN, torch.float32, generator) for _ in range(MATRICES)]
    quantized = {name: [(*quantize(weight, form), form) for weight in weights] for name, form in FORMATS.items()}
    for rows in WEIGHT_ROWS:
        x = random_matrix(rows, IN, torch.float32, generator)
        calls = {"float32": [partial(F.linear, x, weight) for weight in weights]}
        calls |= {name: [partial(quantized_linear, x, *matrix) for matrix in ms] for name, ms in quantized.items()}
        for kind, products in calls.items():
            yield f"weights/{kind}/{rows}", OUT * IN / fast_seconds(time.thread_time, products) / 1e9


def measure_undisturbed(rates_of: RatesOf) -> dict[str, float] | None:
    """Rates on all threads; None, and soon, if other programs take the cores away: too often, or for so long that
    this thread runs for less than most of the time."""
    wall, own, before = time.perf_counter(), time.thread_time(), count_preemptions()
    rates: dict[str, float] = {}
    for name, rate in measure_with(time.perf_counter, rates_of):
        rates[name] = rate
        seconds = time.perf_counter() - wall
        too_often = count_preemptions() - before > PREEMPTIONS + PREEMPTIONS_PER_SECOND * seconds
        if too_often or time.thread_time() - own < RUNNING_SHARE * seconds:
            return None
    return rates


def count_preemptions() -> int:
    """How often the system has taken a core away from this process for another one; 0 where it does not say."""
    try:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    except (AttributeError, OSError):  # Windows has no such module
        return 0


def measure_with(clock: Clock, rates_of: RatesOf) -> Iterator[tuple[str, float]]:
    """Rates by this clock, each with its name. Nothing of torch's global state changes."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        yield from rates_of(clock, torch.Generator().manual_seed(0))


def _measure_all(clock: Clock, generator: torch.Generator) -> Iterator[tuple[str, float]]:
    small: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        small[name] = product_rate(clock, SMALL, dtype, generator)
        yield f"products/{name}/small", small[name]
        if small[name] < HOPELESS * small["float32"]:
            continue
        yield f"products/{name}/large", product_rate(clock, LARGE, dtype, generator)
        yield f"attention/{name}", attention_rate(clock, dtype, generator)
        yield from few_row_rates(clock, name, generator, FORMS)
    yield "eigenvalues/float32", eigenvalue_rate(clock, generator)
    yield "memory/copy", copy_rate(clock)


def product_rate(clock: Clock, size: int, dtype: torch.dtype, generator: torch.Generator) -> float:
    """GFLOP/s of one product of square matrices."""
    a, b = random_matrix(size, size, dtype, generator), random_matrix(size, size, dtype, generator)
    return 2 * size**3 / fast_seconds(clock, [lambda: a @ b], 2 * SECONDS) / 1e9


def few_row_rates(
    clock: Clock, name: str, generator: torch.Generator, forms: Mapping[str, Callable[..., Tensor]]
) -> Iterator[tuple[str, float]]:
    """These forms of a product with few rows, over more weights than a processor's nearest caches hold."""
    dtype = DTYPES[name]
    weights = [random_matrix(OUT, IN, dtype, generator) for _ in range(MATRICES)]
    with torch.no_grad():
        for rows in ROWS:
            x = random_matrix(rows, IN, dtype, generator)
            for form, product in forms.items():
                seconds = fast_seconds(clock, [partial(product, x, weight) for weight in weights])
                yield f"few_rows/{name}/{rows}/{form}", 2 * rows * OUT * IN / seconds / 1e9


def attention_rate(clock: Clock, dtype: torch.dtype, generator: torch.Generator) -> float:
    """GFLOP/s of attention at short rows: four products of which a causal mask needs half, in the forward pass, and
    two and a half times as many in the backward pass."""
    shape = (BATCH, HEADS, LENGTH, HEAD_DIM)
    q, k, v = (
        random_matrix(BATCH * HEADS * LENGTH, HEAD_DIM, dtype, generator).view(shape).requires_grad_() for _ in range(3)
    )

    def run() -> None:
        with torch.enable_grad():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), torch.ones_like(y))

    return 3.5 * 2 * BATCH * HEADS * LENGTH**2 * HEAD_DIM / fast_seconds(clock, [run], 2 * SECONDS) / 1e9


def eigenvalue_rate(clock: Clock, generator: torch.Generator) -> float:
    """The rate of one eigenvalue decomposition, which Muon may take in place of its iterations."""
    x = random_matrix(SMALL, 2 * SMALL, torch.float32, generator)
    gram = x @ x.mT
    return SMALL**3 / fast_seconds(clock, [lambda: torch.linalg.eigh(gram)], 2 * SECONDS) / 1e9


def copy_rate(clock: Clock) -> float:
    """GB/s of a copy that no cache holds, read and written bytes together."""
    source, target = (torch.zeros(COPY_BYTES, dtype=torch.uint8) for _ in range(2))
    return 2 * COPY_BYTES / fast_seconds(clock, [lambda: target.copy_(source)]) / 1e9


def random_matrix(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float32, device="cpu", generator=generator).to(dtype)


def fast_seconds(clock: Clock, calls: Sequence[Callable[[], object]], limit: float = SECONDS) -> float:
    """Seconds of a call, the mean of the fastest quarter of those that `limit` seconds allow, made in turn after a
    warm-up."""
    calls[0]()
    seconds: list[float] = []
    began = end = clock()
    for call in itertools.cycle(calls):
        start, _ = end, call()
        end = clock()
        seconds.append(max(end - start, 1e-9))
        if end - began > limit:
            break
    fastest = sorted(seconds)[: max(1, len(seconds) // 4)]
    return sum(fastest) / len(fastest)
