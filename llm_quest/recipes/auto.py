"""What `auto` means on this machine for precision and compilation, each with the reason why it was chosen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from llm_quest.train.hardware import bf16_support, usable_cores

if TYPE_CHECKING:
    from llm_quest.recipes.config_schema import RunConfig

ValueT = TypeVar("ValueT")
ConfigT = TypeVar("ConfigT", bound="RunConfig")


@dataclass(frozen=True)
class Resolved(Generic[ValueT]):
    """What was chosen and why, for the screen and the run's events."""

    value: ValueT
    reason: str


PRECISION_ALIASES = {"float32": "fp32", "bfloat16": "bf16"}
"""Other names of the same things."""


def resolve_precision(name: str, device: torch.device) -> Resolved[str]:
    """fp32 or bf16 (autocast, with masters in float32): auto takes bf16 where the hardware multiplies it faster."""
    if name != "auto":
        return Resolved(PRECISION_ALIASES.get(name, name), "asked for")
    fast, why = bf16_support(device)
    return Resolved("bf16" if fast else "fp32", why)


def resolve_auto(
    config: ConfigT, device: torch.device, log: Callable[[str], None], flops: float | None = None
) -> ConfigT:
    """The config with precision and compile decided, once, before anything reads them. flops: of the whole run on one
    process; None where compiling is not worth deciding (`auto` is then no)."""
    precision = resolve_precision(config.precision, device)
    graph = Resolved(config.compile is True, "") if flops is None else resolve_compile(config.compile, device, flops)
    reason = f" ({graph.reason})" if graph.reason else ""
    log(f"precision: {precision.value} ({precision.reason}); compiled: {'yes' if graph.value else 'no'}{reason}")
    return config.model_copy(update={"precision": precision.value, "compile": graph.value})


MIN_SECONDS_TO_COMPILE = 600.0
FLOPS_PER_CORE, FLOPS_GPU = 25e9, 1e13


def resolve_compile(requested: bool | str, device: torch.device, flops: float) -> Resolved[bool]:
    """Compiling a model takes from half a minute to two: auto does it where the run (flops in all) is likely to last
    ten minutes, and a compiler is there. The rates are cautious guesses, so that the same recipe decides the same way
    on a machine."""
    if isinstance(requested, bool):
        return Resolved(requested, "asked for")
    rate = FLOPS_PER_CORE * usable_cores() if device.type == "cpu" else FLOPS_GPU
    seconds = flops / rate
    if device.type == "cpu" and not find_cpp_compiler():
        return Resolved(False, "no C++ compiler was found (install g++ or clang to train faster)")
    if seconds < MIN_SECONDS_TO_COMPILE:
        return Resolved(False, f"a run of about {rough_duration(seconds)} does not repay compiling")
    return Resolved(True, f"a run of about {rough_duration(seconds)} repays compiling")


def find_cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on the CPU."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def rough_duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
