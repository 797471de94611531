"""What `auto` means on a machine, each choice with its reason: functions of a profile alone, so the choices for any
machine can be seen from its file.

A choice that decides results in their last bits is written into a run's config and kept when the run is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from llm_quest.machine.compiler import CompilerTrial
from llm_quest.machine.probe import DTYPES, MUON_KERNELS, MUON_SHAPE, MUON_STEPS, ROWS, newton_schulz_flops
from llm_quest.machine.profile import MachineProfile, has_kernel

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Resolved(Generic[ValueT]):
    """What was chosen and why, for the screen and the run's events."""

    value: ValueT
    reason: str


def choose_threads(most: int, cores: int, busy: float) -> Resolved[int]:
    """A thread for each core that other programs leave idle, at least one. most: one for each usable core, within a
    quota; cores: of the machine that this process may use; busy: how many of them other programs keep busy.

    Commonly got wrong: one thread for each core whatever else runs. The threads of a product wait for each other in a
    loop that keeps the core, so a thread that has none holds up the others (docs/benchmarks.md, two runs at once)."""
    threads = max(1, min(most, math.floor(cores - busy + 0.5)))
    return Resolved(threads, f"other programs keep {min(busy, cores):.1f} of {cores} cores busy")


ATTENTION_SHARE = 0.06
"""Of the FLOPs of a training step, at rows of 256 tokens in a model of 11M parameters."""
MIN_GAIN = 1.1
"""How much faster another form must be to be chosen."""
FewRows = dict[str, tuple[int, int]]
"""dtype -> the first number of rows for which a form is taken, and the first that is too many."""


def training_gain(profile: MachineProfile) -> float:
    """How many times as fast a training step is in bfloat16 as in float32, by the rates of products and attention; 0
    where bfloat16 was too slow to be measured."""
    products = profile.ratio("products/bfloat16/large", "products/float32/large")
    attention = profile.ratio("attention/bfloat16", "attention/float32")
    if not products or not attention:
        return 0.0
    seconds = {
        dtype: (1 - ATTENTION_SHARE) / profile.rates[f"products/{dtype}/large"]
        + ATTENTION_SHARE / profile.rates[f"attention/{dtype}"]
        for dtype in ("float32", "bfloat16")
    }
    return seconds["float32"] / seconds["bfloat16"]


def choose_precision(profile: MachineProfile) -> Resolved[str]:
    """fp32 or bf16 (autocast), whichever trains faster."""
    gain = training_gain(profile)
    return Resolved("bf16" if gain >= MIN_GAIN else "fp32", f"measured: {describe_bf16(profile)}")


def describe_bf16(profile: MachineProfile) -> str:
    """The speed of bfloat16 in training, in words."""
    if gain := training_gain(profile):
        return f"bfloat16 trains at {gain:.2f} times the speed of float32"
    slower = 1 / profile.ratio("products/bfloat16/small", "products/float32/small")
    return f"products in bfloat16 take {slower:.0f} times as long as in float32"


def slow_bf16_warning(profile: MachineProfile) -> str:
    """What to say where bfloat16 was asked for and is slower than float32; empty where it is not."""
    if training_gain(profile) >= 1:
        return ""
    return f"bfloat16 was asked for, but on this machine {describe_bf16(profile)}: float32 is faster and more exact"


KERNEL_GAIN = 1.3
"""The same for eigenvalues against Muon's kernel, whose time is measured: by eigenvalues a step takes 1.2 times as long
as its estimate at a short side of 384, and 1.5 times at 192 (docs/LOG.md)."""
MUON_BYTES = 68
"""What the operators of a step besides the iterations read and write for each number: 17 times a float32. The kernel's
rate is that of a whole step."""


def muon_seconds(profile: MachineProfile) -> dict[str, float]:
    """Form of Muon's iterations -> seconds of a step of one matrix, by the rates of small products, of eigenvectors
    (`train/newton_schulz.py`) and of memory."""
    n, m = MUON_SHAPE
    flops = newton_schulz_flops(n, m)
    small = {dtype: profile.rates.get(f"products/{dtype}/small") for dtype in ("float32", "bfloat16")}
    seconds = {dtype: flops / rate / 1e9 for dtype, rate in small.items() if rate}
    seconds["gram"] = 2 * n**2 * (2 * m + 17 * n) / profile.rates["products/float32/small"] / 1e9
    seconds["eigenvalues"] = flops / MUON_STEPS / profile.rates["products/float32/small"] / 1e9
    seconds["eigenvalues"] += n**3 / profile.rates["eigenvalues/float32"] / 1e9
    others = MUON_BYTES * n * m / profile.rates["memory/copy"] / 1e9
    seconds = {form: time + others for form, time in seconds.items()}
    kernels = {name.removeprefix("muon/"): profile.rates.get(name) for name in MUON_KERNELS}
    return seconds | {form: flops / rate / 1e9 for form, rate in kernels.items() if rate}


def choose_muon_form(profile: MachineProfile) -> Resolved[str]:
    """The fastest form of Muon's iterations; that by eigenvalues has to be faster by a margin."""
    seconds = muon_seconds(profile)
    products = min(seconds.keys() - {"eigenvalues"}, key=lambda form: (seconds[form], form))
    gain = KERNEL_GAIN if products.startswith("kernel") else MIN_GAIN
    by_eigenvalues = seconds["eigenvalues"] * gain <= seconds[products]
    words = ", ".join(f"{form} {1e3 * time:.1f} ms" for form, time in seconds.items())
    return Resolved("eigenvalues" if by_eigenvalues else products, f"a matrix of 384 x 1024: {words}")


def choose_few_rows(profile: MachineProfile) -> Resolved[FewRows]:
    """For each dtype the numbers of rows from which and up to which a product is faster the other way round."""
    return _choose_rows({dtype: gains_of_columns(profile, dtype) for dtype in DTYPES}, "no form is faster than plain")


def choose_few_row_kernel(profile: MachineProfile) -> Resolved[FewRows]:
    """The same for the loop in C++, against the faster of the other two."""
    nothing = "nowhere faster" if has_kernel(profile) else "not measured; `quest doctor` does"
    return _choose_rows({dtype: gains_of_kernel(profile, dtype) for dtype in DTYPES}, nothing)


def _choose_rows(gains: Mapping[str, Mapping[int, float]], nothing: str) -> Resolved[FewRows]:
    """dtype -> rows -> the gain of a form, as the ranges in which it is taken."""
    ranges = {dtype: row_range for dtype, of_dtype in gains.items() if (row_range := _longest_range(of_dtype))}
    words = (f"{dtype} {gains[dtype][first]:.1f} times as fast at {first} rows" for dtype, (first, _) in ranges.items())
    return Resolved(ranges, "; ".join(words) or nothing)


def gains_of_columns(profile: MachineProfile, dtype: str) -> dict[int, float]:
    """Rows -> how many times as fast `linear_few_rows` is as `F.linear`."""
    return _gains(profile, dtype, "columns", ["plain"])


def gains_of_kernel(profile: MachineProfile, dtype: str) -> dict[int, float]:
    """Rows -> how many times as fast `linear_by_kernel` is as the faster of the others."""
    return _gains(profile, dtype, "kernel", ["plain", "columns"])


def _gains(profile: MachineProfile, dtype: str, form: str, others: Sequence[str]) -> dict[int, float]:
    gains = {}
    for rows in ROWS:
        mine, *theirs = (profile.rates.get(f"few_rows/{dtype}/{rows}/{name}") for name in (form, *others))
        if mine and all(theirs):
            gains[rows] = mine / max(rate for rate in theirs if rate)
    return gains


def _longest_range(gains: Mapping[int, float]) -> tuple[int, int] | None:
    """The longest run of measured numbers of rows with a gain, as a half-open range."""
    best: list[int] = []
    run: list[int] = []
    for rows, gain in gains.items():
        run = [*run, rows] if gain >= MIN_GAIN else []
        best = max(best, run, key=len)
    return (best[0], best[-1] + 1) if best else None


def choose_weight_kernel(profile: MachineProfile, kind: str) -> Resolved[bool]:
    """Whether products with quantized weights are faster than with float32 ones for one row, as in decoding."""
    ratio = profile.ratio(f"weights/{kind}/1", "weights/float32/1")
    speed = f"are read at {ratio:.2g} times float32's rate" if ratio else "were not measured"
    return Resolved(ratio >= MIN_GAIN, f"{kind} weights {speed}")


MIN_GPU_SECONDS, GPU_FLOPS = 600.0, 1e13
COMPILE_SECONDS = 60.0
"""Of a training step with its backward pass, before a run has measured it (`docs/benchmarks.md`)."""
COMPILE_GAIN = {"fp32": 1.05, "bf16": 1.25}
"""How many times as fast a compiled training step is on a CPU (`docs/benchmarks.md`)."""
UTILIZATION = 0.5


def choose_compile(profile: MachineProfile, compiler: CompilerTrial, flops: float, precision: str) -> Resolved[bool]:
    """Whether a run of so many FLOPs is shorter with the time that compiling takes and the gain that it brings."""
    if not compiler.works:
        return Resolved(False, f"{compiler.problem}; with one, long runs train faster")
    seconds = estimate_run_seconds(profile, flops, precision)
    saved = seconds * (1 - 1 / COMPILE_GAIN[precision])
    cost = profile.compile_seconds or COMPILE_SECONDS
    source = "measured by a run before" if profile.compile_seconds else "estimated"
    text = f"a run of about {rough_duration(seconds)} would be {rough_duration(saved)} shorter"
    return Resolved(saved > cost, f"{text}, and compiling takes {rough_duration(cost)}, {source}")


BUILD_SECONDS, LOAD_SECONDS, TRAINING_KERNEL_GAIN = 40.0, 2.0, 1.13
"""Of compiling our operators on one core (two halve it: the longest file takes two fifths), and of loading those that
are built; how many times as fast a training step in float32 is with them (`docs/benchmarks.md`)."""


def choose_training_kernels(
    profile: MachineProfile, flops: float, precision: str, is_built: Callable[[], bool]
) -> Resolved[bool]:
    """Whether a run of so many FLOPs is shorter with layers in C++ and the time of building or loading them. They read
    and write memory fewer times than the plain forms, on every processor with vectors of 8 numbers or more. is_built:
    whether loading is enough; asked where it matters."""
    if precision != "fp32" or not profile.machine.get("instructions", "").startswith("AVX"):
        return Resolved(False, "")
    seconds = estimate_run_seconds(profile, flops, precision)
    saved = seconds * (1 - 1 / TRAINING_KERNEL_GAIN)
    text = f"a run of about {rough_duration(seconds)} would be {rough_duration(saved)} shorter"
    if saved > LOAD_SECONDS and is_built():
        return Resolved(True, f"{text}, and they are built")
    cost = BUILD_SECONDS / min(profile.threads, 2)
    return Resolved(saved > cost, f"{text}, and building them takes {rough_duration(cost)}")


def estimate_run_seconds(profile: MachineProfile, flops: float, precision: str) -> float:
    """About how long so many FLOPs of training take."""
    dtype = "bfloat16" if precision == "bf16" else "float32"
    rate = profile.rates.get(f"products/{dtype}/large") or profile.rates[f"products/{dtype}/small"]
    return flops / (UTILIZATION * rate * 1e9)


def choose_gpu_compile(flops: float) -> Resolved[bool]:
    """Whether to compile on a GPU, by a cautious guess of its rate."""
    seconds = flops / GPU_FLOPS
    return Resolved(seconds >= MIN_GPU_SECONDS, f"a run of about {rough_duration(seconds)}")


def rough_duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
