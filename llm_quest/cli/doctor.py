"""`quest doctor`: reports the hardware, packages and settings of this machine, with warnings. A run writes the same
report to `env.json`.

No secrets are shown: only environment variables on a list are read, and of one whose name suggests a secret only that
it is set."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from llm_quest import __version__
from llm_quest.contracts import LogFn
from llm_quest.layers.weight_formats import FORMATS
from llm_quest.machine.choices import (
    choose_few_row_kernel,
    choose_few_rows,
    choose_muon_form,
    choose_precision,
    choose_weight_kernel,
)
from llm_quest.machine.compiler import find_cpp_compiler, missing_compiler_hint
from llm_quest.machine.hardware import bf16_support, describe_threads, processor_name, usable_cores
from llm_quest.machine.probe import WEIGHT_KINDS
from llm_quest.machine.profile import MachineProfile, load_compiler, load_kernel_rates, measure_profile
from llm_quest.recipes.auto import find_idle_threads

# fmt: off
PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pydantic", "pyyaml", "typer", "rich", "jinja2",
    "matplotlib", "jaxtyping", "filelock", "psutil", "tensorboard", "transformers",
)
OPTIONAL_PACKAGES = ("tensorboard", "transformers")
ENV_VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN",
    "HF_HUB_DISABLE_TELEMETRY", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CXX",
)
# fmt: on
SECRET_VARIABLE = re.compile(r"TOKEN$|_KEY|^KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
CREDENTIALS_IN_URL = re.compile(r"//[^/@\s]+@")
PACKAGE = Path(__file__).parents[1]
LOW_DISK, LOW_MEMORY = 2e9, 1e9


@dataclass(frozen=True)
class MachineReport:
    """Hardware, packages and settings. devices: name -> description. bf16: whether there are instructions for
    bfloat16, and why. compiler: of torch.compile, None if there is none that works. warnings: (problem, remedy).
    profile: measured rates, where asked for."""

    quest: str
    python: str
    platform: str
    torch: str
    processor: str
    cores: int
    usable_cores: int
    threads: int
    simd: tuple[str, ...]
    memory_bytes: int
    memory_available: int
    disk_free: int
    devices: dict[str, str]
    bf16: bool
    bf16_why: str
    compiler: str | None
    compiler_problem: str
    packages: dict[str, str | None]
    hub_cache: str
    hub_offline: bool
    variables: dict[str, str]
    git: dict[str, Any] | None
    warnings: tuple[tuple[str, str], ...]
    profile: MachineProfile | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        git = "LLM Quest does not run from a git checkout"
        if self.git is not None:
            changed = ", with uncommitted changes" if self.git["changed"] else ""
            git = f"{self.git['commit'][:12]} on {self.git['branch']}{changed}"
        cores = f"{self.usable_cores} of {self.cores} cores usable, torch uses {self.threads} threads"
        facts = [
            ("LLM Quest", f"{self.quest}, python {self.python}, torch {self.torch}"),
            ("platform", self.platform),
            ("processor", f"{self.processor}; {cores}"),
            ("SIMD", ", ".join(self.simd) or "none that torch reports"),
            ("bfloat16", f"{'yes' if self.bf16 else 'no'}: {self.bf16_why}"),
            ("devices", "; ".join(f"{name} ({what})" for name, what in self.devices.items())),
            ("memory", f"{self.memory_available / 1e9:.1f} of {self.memory_bytes / 1e9:.1f} GB available"),
            ("disk", f"{self.disk_free / 1e9:.1f} GB free here"),
            ("compiler", self.compiler or "none"),
            *(() if self.profile is None else profile_facts(self.profile)),
            ("hub cache", f"{self.hub_cache}{', offline' if self.hub_offline else ''}"),
            ("git", git),
            ("variables", ", ".join(f"{name}={value}" for name, value in self.variables.items()) or "none set"),
            ("packages", ", ".join(f"{name} {version}" for name, version in self.packages.items() if version)),
            ("absent", ", ".join(name for name, version in self.packages.items() if version is None) or "nothing"),
        ]
        width = max(len(name) for name, _ in facts)
        result = [f"{name:<{width}}  {what}" for name, what in facts]
        return result + (
            [f"{'warning':<{width}}  {what}: {remedy}" for what, remedy in self.warnings] or ["no warnings"]
        )


def inspect_machine(folder: str | Path = ".") -> MachineReport:
    """Inspect this machine, and the disk that holds `folder`."""
    memory = psutil.virtual_memory()
    fast, why = bf16_support(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    report = MachineReport(
        quest=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        torch=torch.__version__,
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        threads=torch.get_num_threads(),
        simd=simd_features(),
        memory_bytes=memory.total,
        memory_available=memory.available,
        disk_free=shutil.disk_usage(nearest_existing_dir(Path(folder))).free,
        devices=list_devices(),
        bf16=fast,
        bf16_why=why,
        compiler=find_cpp_compiler(),
        compiler_problem="",
        packages={name: package_version(name) for name in PACKAGES},
        hub_cache=str(hub_cache_dir()),
        hub_offline=any(
            os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        ),
        variables={name: redact_variable(name, os.environ[name]) for name in ENV_VARIABLES if name in os.environ},
        git=git_state(),
        warnings=(),
    )
    return replace(report, warnings=tuple(machine_warnings(report)))


def diagnose_machine(*, renew: bool = False, log: LogFn = lambda text: None) -> MachineReport:
    """`inspect_machine`, with the measured profile and a compiler that was tried. renew: measure the profile again."""
    if renew:
        measure_profile(log)
    profile, compiler = load_kernel_rates(log), load_compiler(log)
    report = replace(
        inspect_machine(),
        profile=replace(profile, compiler=compiler),
        compiler=compiler.path if compiler.works else None,
        compiler_problem=compiler.problem,
    )
    return replace(report, warnings=tuple(machine_warnings(report)))


def profile_facts(profile: MachineProfile) -> list[tuple[str, str]]:
    """The measured rates and what `auto` makes of them."""
    rate = {name: f"{value:.3g}" for name, value in profile.rates.items()}
    dtypes = [dtype for dtype in ("float32", "bfloat16") if f"products/{dtype}/large" in rate]
    products = [f"{dtype} {rate[f'products/{dtype}/large']}" for dtype in dtypes]
    attention = [f"{dtype} {rate[f'attention/{dtype}']}" for dtype in dtypes]
    weights = [f"{kind} {rate[f'weights/{kind}/1']}" for kind in WEIGHT_KINDS if f"weights/{kind}/1" in rate]
    precision, muon, few = choose_precision(profile), choose_muon_form(profile), choose_few_rows(profile)
    kernel, idle = choose_few_row_kernel(profile), find_idle_threads(profile.threads)
    return [
        ("threads", f"{describe_threads(idle.value)}{f' now: {idle.reason}' if idle.reason else ''}"),
        ("profile", f"{profile.source}{'; other programs were running' if profile.busy else ''}"),
        ("products", f"{', '.join(products)} GFLOP/s; memory {rate['memory/copy']} GB/s"),
        ("attention", f"{', '.join(attention)} GFLOP/s, forward and backward, rows of 128 tokens"),
        ("weights", f"{', '.join(weights)} billion/s, by one row" if weights else "not measured"),
        *(("", choose_weight_kernel(profile, kind).reason) for kind in FORMATS if weights),
        ("precision", f"{precision.value} ({precision.reason})"),
        ("Muon", f"{muon.value} ({muon.reason})"),
        ("few rows", f"the other order for {few.value or 'none'} ({few.reason})"),
        ("", f"the loop in C++ for {kernel.value or 'none'} ({kernel.reason})"),
    ]


def machine_warnings(machine: MachineReport) -> Iterator[tuple[str, str]]:
    """Yield (problem, remedy)."""
    missing = [name for name, version in machine.packages.items() if version is None and name not in OPTIONAL_PACKAGES]
    if missing:
        yield f"{', '.join(missing)} cannot be found", "run `pip install llm-quest` again"
    if machine.threads > machine.usable_cores:
        yield (
            f"torch uses {machine.threads} threads on {machine.usable_cores} usable cores",
            f"set OMP_NUM_THREADS={machine.usable_cores}",
        )
    if machine.threads < machine.usable_cores and "OMP_NUM_THREADS" in machine.variables:
        yield (
            f"OMP_NUM_THREADS={machine.variables['OMP_NUM_THREADS']} leaves cores idle",
            f"set it to {machine.usable_cores}, or unset it",
        )
    if machine.compiler is None:
        problem = machine.compiler_problem or "there is no C++ compiler"
        yield f"{problem}, so torch.compile cannot be used on the CPU", missing_compiler_hint()
    if machine.disk_free < LOW_DISK:
        yield (
            f"{machine.disk_free / 1e9:.1f} GB of disk are left",
            "free some: a full disk stops a run at its next checkpoint",
        )
    if machine.memory_available < LOW_MEMORY:
        yield (
            f"{machine.memory_available / 1e9:.1f} GB of memory are available",
            "close something, or train with a smaller micro_batch_size",
        )
    if not os.access(nearest_existing_dir(Path(machine.hub_cache)), os.W_OK):
        yield f"the hub cache {machine.hub_cache} cannot be written", "point HF_HOME to a folder that can"


def simd_features() -> tuple[str, ...]:
    """The vector instruction sets of the processor that torch reports."""
    capabilities = torch.cpu.get_capabilities()
    return tuple(name for name, there in sorted(capabilities.items()) if there is True and name != "architecture")


def list_devices() -> dict[str, str]:
    """The devices that torch can use here."""
    devices = {"cpu": torch.backends.cpu.get_cpu_capability()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        one = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{one.name}, {one.total_memory / 1e9:.0f} GB, compute capability {one.major}.{one.minor}"
        )
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    for index in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        devices[f"xpu:{index}"] = torch.xpu.get_device_name(index)
    return devices


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hub_cache_dir() -> Path:
    """The download cache of huggingface_hub."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def redact_variable(name: str, value: str) -> str:
    """The value of a variable without secrets: those are shown as set, and URLs without their credentials."""
    if SECRET_VARIABLE.search(name):
        return "(set, not shown)"
    return CREDENTIALS_IN_URL.sub("//(not shown)@", value)


def git_state(root: Path = PACKAGE.parent) -> dict[str, Any] | None:
    """Commit and branch of the checkout that this package runs from, and whether it has uncommitted changes; None if it
    is not a checkout, or without git.

    Commonly got wrong: git obeys the settings of the checkout it runs in (`core.fsmonitor` and `filter.*.clean`
    name programs to run), so it is never run on a run folder or the working folder, which may come from elsewhere."""
    if not (root / ".git").exists():
        return None
    answers = []
    for question in (
        ("rev-parse", "HEAD"),
        ("rev-parse", "--abbrev-ref", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no"),
    ):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *question], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    return {"commit": answers[0], "branch": answers[1], "changed": bool(answers[2])}


def nearest_existing_dir(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    folder = folder.absolute()
    return next(candidate for candidate in (folder, *folder.parents) if candidate.exists())
