"""Resolves every `auto` of a run: once, on the main process, from the machine's profile.

The choices decide the last bits of what a run computes. They are written to its config.yaml, and a run that is resumed
keeps them, on another machine too; what cannot be kept there is logged."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_quest.contracts import LogFn
from llm_quest.layers import native
from llm_quest.layers.linear import set_few_row_products
from llm_quest.layers.muon_kernel import missing_kernel
from llm_quest.layers.training_kernels import set_training_kernels
from llm_quest.machine import choices
from llm_quest.machine.choices import Resolved
from llm_quest.machine.hardware import (
    affinity,
    are_threads_automatic,
    bf16_support,
    count_busy_cores,
    describe_threads,
    read_cpu_seconds,
    usable_cores,
)
from llm_quest.machine.profile import (
    MachineProfile,
    load_compiler,
    load_muon_rates,
    load_profile,
    record_compile_seconds,
)
from llm_quest.recipes.config import load_raw_config, parse_recorded_config
from llm_quest.recipes.config_schema import RunConfig
from llm_quest.recipes.recipe import Context
from llm_quest.train.checkpoint import list_checkpoints
from llm_quest.train.newton_schulz import KERNEL_FORMS

ConfigT = TypeVar("ConfigT", bound=RunConfig)

PRECISION_ALIASES = {"float32": "fp32", "bfloat16": "bf16"}
"""Other name of a precision -> ours."""
KEPT = "as when this run began"
MUON_KERNEL_SECONDS = 600.0
"""Of a run that builds Muon's kernel where it has not been measured, which takes half a minute."""


@dataclass(frozen=True)
class Machine:
    """The device that choices are made for. flops: of the whole run on one process; None where the recipe cannot tell
    before the run: `auto` compiles none of these."""

    device: torch.device
    flops: float | None
    log: LogFn

    @property
    def profile(self) -> MachineProfile | None:
        """The profile of the CPU; None on another device."""
        return load_profile(self.log) if self.device.type == "cpu" else None


def resolve_auto(
    config: ConfigT,
    context: Context,
    flops: float | None = None,
    *,
    keys: Iterable[str] | None = None,
) -> ConfigT:
    """Resolve every `auto` of a config, before anything reads it, and set what holds for the whole process
    (threads). flops: as of `Machine`. keys: of `RESOLVERS`, those to resolve now; None: all."""
    parallel = context.parallel
    machine = Machine(parallel.device, flops, context.log)
    chosen = parallel.broadcast(
        choose_all(config, recorded_choices(config, context), machine, keys) if parallel.is_main_process else None
    )
    set_for_process(chosen, context.log)
    return config.model_copy(update=chosen)


def set_for_process(chosen: Mapping[str, Any], log: LogFn) -> None:
    """Set what these choices hold for the whole process; log what cannot be had."""
    if "threads" in chosen:
        torch.set_num_threads(chosen["threads"])
    if "few_row_products" in chosen:
        missing = set_few_row_products(chosen["few_row_products"], chosen["few_row_kernel"])
        if missing:
            log(f"the loop in C++ for few rows cannot be had ({missing}): the last bits of sampled text may differ")
    if "training_kernels" in chosen and (missing := set_training_kernels(chosen["training_kernels"])):
        log(f"the training kernels cannot be had ({missing}): layers are computed by their plain forms, slower")


def is_undecided(value: Any) -> bool:
    """auto, or 0 threads. (False equals 0 and is a decision: a run that is not compiled goes on so.)"""
    return value == "auto" or (value == 0 and value is not False)


def recorded_choices(config: RunConfig, context: Context) -> dict[str, Any]:
    """The choices of the run that is about to be resumed; empty if there is none."""
    if (recorded := recorded_config(config, context)) is None:
        return {}
    return {key: value for key in RESOLVERS if not is_undecided(value := getattr(recorded, key))}


def recorded_config(config: ConfigT, context: Context) -> ConfigT | None:
    """The config of the run that is about to be resumed; None if there is none."""
    folder = context.run_dir if context.resume in ("auto", "never") else Path(context.resume).parent.parent
    if not (folder / "config.yaml").is_file() or not list_checkpoints(folder / "checkpoints"):
        return None
    settings = load_raw_config(str(folder / "config.yaml"))
    if settings.tree.get("recipe") != config.recipe:
        return None
    return parse_recorded_config(type(config), settings)


def choose_all(
    config: RunConfig, recorded: Mapping[str, Any], machine: Machine, keys: Iterable[str] | None = None
) -> dict[str, Any]:
    """Resolve these keys of RESOLVERS (None: all), and log each value with its reason."""
    chosen: dict[str, Any] = {}
    for key in RESOLVERS if keys is None else keys:
        label, resolve = RESOLVERS[key]
        value, reason = getattr(config, key), "asked for"
        if is_undecided(value):
            value, reason = recorded.get(key, value), KEPT
        resolved = resolve(Resolved(value, reason), machine, config.model_copy(update=chosen))
        chosen[key] = resolved.value
        if resolved.reason:
            machine.log(f"{label}: {describe_value(resolved.value)} ({resolved.reason})")
    return chosen


def describe_value(value: Any) -> str:
    """A resolved value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{dtype} {first} to {end - 1}" for dtype, (first, end) in value.items()) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def resolve_threads(given: Resolved[int], machine: Machine, config: RunConfig) -> Resolved[int]:
    """Resolve the number of threads: one for each core that other programs leave idle, unless a number is given. A
    resumed run keeps its own on a CPU, where last bits follow from it; a log line says so where fewer are faster."""
    if given.reason == KEPT and machine.device.type != "cpu":
        given = Resolved(0, "")
    idle = find_idle_threads(given.value or torch.get_num_threads())
    threads = given.value or idle.value
    reasons = [given.reason] * bool(given.value) + [describe_threads(threads)]
    if idle.value < threads:
        reasons.append(f"but {idle.reason}: threads={idle.value} is faster, and changes last bits")
    elif idle.reason:
        reasons.append(idle.reason)
    torch.set_num_threads(threads)  # the profile is one of so many threads
    return Resolved(threads, "; ".join(reasons))


def find_idle_threads(most: int) -> Resolved[int]:
    """Count the threads, of so many, that have a core which other programs leave idle. All of them if OMP_NUM_THREADS
    gives a number, and if there are more threads than cores."""
    if most == 1 or most > usable_cores() or not are_threads_automatic():
        return Resolved(most, "")
    return choices.choose_threads(most, affinity(), count_busy_cores())


def resolve_precision(name: str, device: torch.device) -> Resolved[str]:
    """Resolve a precision: fp32 or bf16 (autocast; the weights stay float32). auto: bf16 where training in it is
    measured to be faster."""
    return decide_precision(Resolved(name, "asked for"), Machine(device, None, lambda text: None))


def decide_precision(given: Resolved[str], machine: Machine, config: RunConfig | None = None) -> Resolved[str]:
    """Resolve the key `precision`, as `resolve_precision`. A given value is kept where it is slow, with a warning."""
    name, profile = PRECISION_ALIASES.get(given.value, given.value), machine.profile
    if name == "auto" and profile is None:
        fast, why = bf16_support(machine.device)
        return Resolved("bf16" if fast else "fp32", why)
    if name == "auto" and profile is not None:
        return choices.choose_precision(profile)
    warning = choices.slow_bf16_warning(profile) if profile is not None and name == "bf16" else ""
    return Resolved(name, f"{given.reason}; {warning}" if warning else given.reason)


def resolve_compile(given: Resolved[bool | str], machine: Machine, config: RunConfig) -> Resolved[bool]:
    """Resolve the key `compile`: auto compiles where the run is long enough to repay it. Without a working compiler no
    run is compiled."""
    if given.value == "auto" and machine.flops is None:
        return Resolved(False, "")
    if given.value is False:
        return Resolved(False, given.reason)
    profile = machine.profile
    if profile is None and given.value == "auto":
        return choices.choose_gpu_compile(machine.flops or 0.0)
    if profile is None:
        return Resolved(True, given.reason)
    compiler = load_compiler(machine.log)
    if given.value == "auto":
        return choices.choose_compile(profile, compiler, machine.flops or 0.0, config.precision)
    if not compiler.works:
        return Resolved(False, f"{given.reason}, but {compiler.problem}; the last bits of a compiled run may differ")
    return Resolved(True, given.reason)


def resolve_muon_form(given: Resolved[str], machine: Machine, config: RunConfig) -> Resolved[str]:
    """Resolve the key `muon_form`, after the training kernels. A long run builds and measures the kernel in C++ first,
    and so does a run with training kernels, which are built together with it. Without the kernel, a form that needs it
    is computed by its definition, and the reason says so."""
    if given.value != "auto":
        resolved = given
    elif machine.profile is None:
        fast, why = bf16_support(machine.device)
        resolved = Resolved("bfloat16" if fast else "float32", why)
    else:
        seconds = choices.estimate_run_seconds(machine.profile, machine.flops or 0.0, config.precision)
        repays = seconds >= MUON_KERNEL_SECONDS or config.training_kernels is True
        builds = config.optim == "muon" and repays
        resolved = choices.choose_muon_form(load_muon_rates(machine.log) if builds else machine.profile)
    if config.optim != "muon":
        return Resolved(resolved.value, "")
    dtype = KERNEL_FORMS.get(resolved.value)
    if dtype is not None and (missing := missing_kernel(machine.device, dtype)):
        return Resolved(resolved.value, f"{resolved.reason}; by its plain form, whose last bits may differ: {missing}")
    return resolved


def resolve_few_rows(given: Resolved[Any], machine: Machine, config: RunConfig) -> Resolved[choices.FewRows]:
    """Resolve the key `few_row_products`: the form of products with few rows (sampling, evaluation)."""
    if given.value != "auto":
        return given
    return Resolved({}, "") if machine.profile is None else choices.choose_few_rows(machine.profile)


def resolve_few_row_kernel(given: Resolved[Any], machine: Machine, config: RunConfig) -> Resolved[choices.FewRows]:
    """Resolve the key `few_row_kernel`: the sizes for which the loop in C++ is taken. A run does not build and measure
    it, since few of its products are small."""
    if given.value != "auto":
        return Resolved(given.value, given.reason if given.value else "")
    return Resolved({}, "") if machine.profile is None else choices.choose_few_row_kernel(machine.profile)


def resolve_training_kernels(given: Resolved[bool | str], machine: Machine, config: RunConfig) -> Resolved[bool]:
    """Resolve the key `training_kernels`, after precision and compilation, which leave them without use."""
    if given.value != "auto":
        return Resolved(bool(given.value), given.reason if given.value else "")
    if machine.profile is None or machine.flops is None or config.compile is True:
        return Resolved(False, "")
    return choices.choose_training_kernels(machine.profile, machine.flops, config.precision, native.is_built)


Resolver = Callable[[Resolved[Any], Machine, Any], Resolved[Any]]
RESOLVERS: dict[str, tuple[str, Resolver]] = {
    "threads": ("threads", resolve_threads),
    "precision": ("precision", decide_precision),
    "compile": ("compiled", resolve_compile),
    "training_kernels": ("layers in C++", resolve_training_kernels),
    "muon_form": ("Muon's iterations", resolve_muon_form),
    "few_row_products": ("products of few rows in the other order", resolve_few_rows),
    "few_row_kernel": ("products of few rows in C++", resolve_few_row_kernel),
}
"""Key -> its label in the log and its resolver, in the order of resolving."""
LENGTH_KEYS = ("training_kernels", "muon_form")
"""Keys that follow from the length of the run, and from keys before them."""


class CompileTimer:
    """Callback that records the seconds of compiling in the machine's profile: those of the first step beyond a later
    one."""

    def __init__(self) -> None:
        self.moments = [time.perf_counter()]

    def on_step_end(self, model: Any, step: int) -> None:
        self.moments.append(time.perf_counter())
        if len(self.moments) == 4:
            first, second, third = (after - before for before, after in itertools.pairwise(self.moments))
            record_compile_seconds(max(first - min(second, third), 0.1))

    def on_step_skipped(self, model: Any) -> None:
        """A skipped step takes as long as another."""


FIRST_STEPS, SLOW_FACTOR, SLOW_STREAK = 8, 5.0, 3
"""Steps whose median is the usual time; the factor of a slow step; slow steps in a row before the notice."""


class SlowStepNotice:
    """Callback that logs once that other programs take cores which this run's threads need: steps then take many times
    as long, and fewer threads are faster. The number is not changed: last bits follow from it.

    Commonly got wrong: one slow step is no busy machine: it may hold an evaluation or a checkpoint."""

    def __init__(self, log: LogFn) -> None:
        self.log, self.usual, self.streak = log, list[float](), 0
        self.last, self.start = time.monotonic(), read_cpu_seconds()

    def on_step_end(self, model: Any, step: int) -> None:
        now, threads = time.monotonic(), torch.get_num_threads()
        seconds, self.last = now - self.last, now
        if len(self.usual) < FIRST_STEPS:
            self.usual.append(seconds)
        elif self.streak < SLOW_STREAK:
            self.streak = self.streak + 1 if seconds > SLOW_FACTOR * statistics.median(self.usual) else 0
            if self.streak == 1:
                self.start = read_cpu_seconds()
            if self.streak == SLOW_STREAK:
                idle = choices.choose_threads(threads, affinity(), count_busy_cores(self.start))
                self.streak = SLOW_STREAK if idle.value < threads else 0
                if self.streak:
                    usual = f"a step takes {seconds:.2g} s and took {statistics.median(self.usual):.2g} s at first"
                    self.log(f"note: {usual}; {idle.reason}: stop the run and resume it with threads={idle.value}")

    def on_step_skipped(self, model: Any) -> None:
        """A skipped step takes as long as another."""
