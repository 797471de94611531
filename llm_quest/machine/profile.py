"""The profile of a machine: rates that settings marked `auto` depend on, measured once and kept.

A profile belongs to a processor, its usable instructions, a torch version and a number of threads. It is a JSON file in
the cache folder, named by a hash of these; `quest doctor` shows it, `quest doctor --renew` measures it anew. The
variable LLM_QUEST_MACHINE_PROFILE names a file that is taken in its place, which may come from another machine: so the
choices for a machine can be seen without it.

A file that is damaged, of another machine or of another version is not used: a line says so, and the machine is
measured. A cache folder that cannot be written costs the measurement in every process, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llm_quest.cache_dirs import cache_dir, tolerate_cache_errors
from llm_quest.errors import DataError
from llm_quest.files import atomic_write_json, parse_digits
from llm_quest.layers import native
from llm_quest.machine.compiler import CompilerTrial, find_cpp_compiler, try_cpp_compiler
from llm_quest.machine.hardware import processor_name
from llm_quest.machine.probe import (
    MUON_KERNELS,
    RATES,
    REQUIRED,
    measure_kernel_rates,
    measure_muon_rates,
    measure_rates,
)

LogFn = Callable[[str], None]

VERSION = 2
VARIABLE = "LLM_QUEST_MACHINE_PROFILE"
MAX_FILE_BYTES = 100_000
MAX_RATE = 1e9
BUSY_PROFILE_SECONDS = 600.0
"""A profile that was measured on a busy machine is measured anew by a process that starts so much later."""


@dataclass(frozen=True)
class MachineProfile:
    """The measured rates of a machine, as they are kept. machine: what the profile belongs to (`identify_machine`).
    rates: by name, in the units of `probe.RATES`. busy: whether other programs ran meanwhile. measured_at: seconds
    since 1970. compile_seconds: what compiling a training step took here in an earlier run; None before the first.
    source: where it comes from, in words. given: whether by a file that stands for this machine."""

    machine: Mapping[str, str]
    rates: Mapping[str, float]
    busy: bool = False
    measured_at: float = 0.0
    compiler: CompilerTrial | None = None
    compile_seconds: float | None = None
    source: str = ""
    given: bool = False

    @property
    def threads(self) -> int:
        return int(self.machine["threads"])

    def ratio(self, name: str, reference: str) -> float:
        """One rate over another; 0 where the first was not measured (it was too slow)."""
        return self.rates.get(name, 0.0) / self.rates.get(reference, 1.0)


def identify_machine() -> dict[str, str]:
    """What rates depend on. Variables that take instructions away are part of it."""
    return {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": str(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "limits": " ".join(
            f"{name}={os.environ[name]}"
            for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
            if name in os.environ
        ),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def profile_path(machine: Mapping[str, str]) -> Path:
    """The file in the cache folder."""
    mark = hashlib.sha256(json.dumps([VERSION, sorted(machine.items())]).encode()).hexdigest()[:16]
    return cache_dir("machine") / f"{mark}.json"


def load_profile(log: LogFn = lambda text: None) -> MachineProfile:
    """The profile of this machine for the present number of threads: given by file, kept from before, or measured
    now. A process reads it once."""
    key = _process_key()
    if key not in _LOADED:
        _LOADED[key] = _find_profile(log)
    return _LOADED[key]


_LOADED: dict[tuple[Any, ...], MachineProfile] = {}
"""Profiles of this process, by everything that decides which one is loaded."""


def _process_key() -> tuple[Any, ...]:
    return (*identify_machine().values(), os.environ.get(VARIABLE), cache_dir("machine"))


def _find_profile(log: LogFn) -> MachineProfile:
    machine, given = identify_machine(), os.environ.get(VARIABLE)
    if given:
        try:
            return replace(read_profile(Path(given)), source=f"given by {VARIABLE}={given}", given=True)
        except DataError as error:
            log(f"machine profile: {error}; {VARIABLE} is passed over")
    path = profile_path(machine)
    if path.exists():
        try:
            return _require_current(read_profile(path), machine, path)
        except DataError as error:
            log(f"machine profile: {error}; this machine is measured anew")
    return measure_profile(log)


def _require_current(profile: MachineProfile, machine: Mapping[str, str], path: Path) -> MachineProfile:
    """DataError for a profile of another machine, or one of a busy machine that is old enough."""
    other = [
        f"{name} {profile.machine.get(name)!r} (here {here!r})"
        for name, here in machine.items()
        if profile.machine.get(name) != here
    ]
    if other:
        raise DataError(f"{path} is of another machine: {', '.join(other)}")
    if profile.busy and not 0 <= time.time() - profile.measured_at < BUSY_PROFILE_SECONDS:
        raise DataError(f"{path} was measured while other programs used the cores")
    return replace(profile, source=f"kept in {path}")


def measure_profile(log: LogFn) -> MachineProfile:
    """Measure this machine, about half a second, and keep the profile."""
    machine, began = identify_machine(), time.perf_counter()
    measured = measure_rates()
    profile = MachineProfile(machine, measured.rates, measured.busy, measured_at=time.time())
    took = f"measured in {time.perf_counter() - began:.1f} s"
    if measured.busy:
        took += " on one thread, because other programs use the cores"
    profile = replace(profile, source=took)
    log(f"machine profile: {took}")
    _LOADED[_process_key()] = profile
    save_profile(profile)
    return profile


def load_compiler(log: LogFn = lambda text: None) -> CompilerTrial:
    """The C++ compiler of this machine, tried when it is first needed. What does not work is tried again by the next
    process; a profile that is given by file keeps its own."""
    profile = load_profile(log)
    measured = profile.compiler
    if measured is not None and (profile.given or (measured.works and measured.path == find_cpp_compiler())):
        return measured
    trial = try_cpp_compiler()
    _update_profile(replace(profile, compiler=trial))
    return trial


def load_kernel_rates(log: LogFn = lambda text: None) -> MachineProfile:
    """The profile with the rates of the package's own kernels, which are built and measured when they are first
    needed."""
    profile = load_profile(log)
    whole = has_kernel(profile) and has_muon_kernel(profile)
    if profile.given or ("weights/float32/1" in profile.rates and (whole or not native.is_loaded())):
        return profile
    log("machine profile: building and measuring the kernels in C++, once")
    profile = replace(profile, rates={**profile.rates, **measure_kernel_rates()})
    _update_profile(profile)
    return profile


def has_kernel(profile: MachineProfile) -> bool:
    """Whether the loop over few rows in C++ was measured."""
    return "few_rows/float32/1/kernel" in profile.rates


def load_muon_rates(log: LogFn = lambda text: None) -> MachineProfile:
    """The profile with the rates of Muon's kernel, which is built for it if there is a compiler."""
    profile = load_profile(log)
    if profile.given or has_muon_kernel(profile):
        return profile
    log("machine profile: building and measuring Muon's kernel in C++, once")
    profile = replace(profile, rates={**profile.rates, **measure_muon_rates()})
    _update_profile(profile)
    return profile


def has_muon_kernel(profile: MachineProfile) -> bool:
    """Whether Muon's kernel was measured."""
    return any(name in profile.rates for name in MUON_KERNELS)


def record_compile_seconds(seconds: float) -> None:
    """Keep what compiling took in a run here: the longest time, because later runs find kernels that were compiled
    before."""
    profile = load_profile()
    if seconds > (profile.compile_seconds or 0.0):
        _update_profile(replace(profile, compile_seconds=round(seconds, 1)))


def _update_profile(profile: MachineProfile) -> None:
    _LOADED[_process_key()] = profile
    if not profile.given:
        save_profile(profile)


def save_profile(profile: MachineProfile) -> None:
    """Write a profile of this machine to the cache folder; a warning where that is not possible."""
    path = profile_path(profile.machine)
    with tolerate_cache_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, profile_to_json(profile))


def profile_to_json(profile: MachineProfile) -> dict[str, Any]:
    """The content of a profile's file."""
    content = {name: value for name, value in asdict(profile).items() if name not in ("source", "given")}
    return {"version": VERSION, **content, "rates": {name: round(rate, 4) for name, rate in profile.rates.items()}}


def read_profile(path: Path) -> MachineProfile:
    """A profile's file. DataError says what is wrong with it."""
    try:
        if not path.is_file():
            raise DataError(f"{path} is no file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes; a profile has at most {MAX_FILE_BYTES:,}")
        return parse_profile(json.loads(path.read_text(encoding="utf-8")), str(path))
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({type(error).__name__})") from None


def parse_profile(content: Any, name: str) -> MachineProfile:
    """A profile from JSON, every field checked. name: of the file, for messages."""
    require(isinstance(content, dict), f"{name} is no profile")
    require(content.get("version") == VERSION, f"{name} is of version {content.get('version')!r:.20}, not {VERSION}")
    expected: dict[str, Any] = {"machine": dict, "rates": dict, "busy": bool, "measured_at": (int, float)}
    for key, kind in expected.items():
        require(isinstance(content.get(key), kind), f"{name}: {key} is missing or of the wrong kind")
    unknown = set(content) - {"version", *expected, "compiler", "compile_seconds"}
    require(not unknown, f"{name}: {', '.join(sorted(unknown))[:60]} is no field of a profile")
    machine, seconds = content["machine"], content.get("compile_seconds")
    require(all(isinstance(value, str) for value in machine.values()), f"{name}: machine holds what is no text")
    require(set(machine) == set(identify_machine()), f"{name}: machine must name {', '.join(identify_machine())}")
    require(0 < (parse_digits(machine["threads"]) or 0) < 10_000, f"{name}: threads is no number")
    for rate, value in content["rates"].items():
        require(rate in RATES, f"{name}: {rate!r:.40} is no rate")
        require(is_rate(value), f"{name}: {rate} is {value!r:.20}; a rate is above 0 and finite")
    missing = [rate for rate in REQUIRED if rate not in content["rates"]]
    require(not missing, f"{name}: {', '.join(missing[:3])} missing")
    require(seconds is None or is_rate(seconds), f"{name}: compile_seconds is {seconds!r:.20}")
    require(is_rate(content["measured_at"], limit=1e11), f"{name}: measured_at is no time")
    return MachineProfile(
        machine, content["rates"], content["busy"], float(content["measured_at"]),
        parse_compiler(content.get("compiler"), name), seconds,
    )  # fmt: skip


def parse_compiler(content: Any, name: str) -> CompilerTrial | None:
    """The trial of a compiler from JSON."""
    if content is None:
        return None
    kinds: dict[str, tuple[type, ...]] = {"path": (str, type(None)), "problem": (str,), "seconds": (int, float)}
    right = isinstance(content, dict) and set(content) == set(kinds)
    require(right and all(isinstance(content[key], kind) for key, kind in kinds.items()), f"{name}: compiler is wrong")
    return CompilerTrial(**content)


def is_rate(value: object, limit: float = MAX_RATE) -> bool:
    """Whether this is a number that a rate or a duration can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < limit


def require(holds: bool, message: str) -> None:
    if not holds:
        raise DataError(message)
