"""What this machine is: the cores that a process may use, its processor, and whether it has bfloat16 instructions.

Importing this file does not import torch, because the number of threads is decided before torch starts its own."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")
"""Kinds of a core's time in which it could run a thread of ours; a guest's is counted as the user's too."""
LOAD_SECONDS, STALE_SECONDS = 0.25, 30.0
"""The shortest time over which the machine's load is measured, and the longest since the command began."""


def usable_cores(root: Path = Path("/")) -> int:
    """The number of cores that this process may use: its affinity and every CPU quota of its control groups
    (versions 1 and 2), not the number of the machine. A quota of 2.5 cores counts as 2. root: the folder that holds
    `proc` and `sys`."""
    return max(1, int(min([float(affinity()), *cpu_quotas(root)])))


def describe_threads(threads: int, *, option: str = "threads=") -> str:
    """A number of threads and the cores that they run on, with what to change where the two do not fit. option: what
    the number is given with."""
    cores, quota = usable_cores(), min(cpu_quotas(Path("/")), default=float("inf"))
    limit = f" (a CPU quota of {quota:.3g} of {affinity()} cores)" if quota < affinity() else ""
    count = f"{threads} thread{'s' if threads > 1 else ''} on {cores} usable core{'s' if cores > 1 else ''}{limit}"
    if threads > cores:
        return f"{count}: threads that wait for a core make every product slower; give {option}{cores}"
    return count


class CpuSeconds(NamedTuple):
    """Seconds of processor time up to now. at: by the clock; usable: that the cores which this process may use have
    been busy, with whatever program; own: of this process and of its children that have ended."""

    at: float
    usable: float
    own: float


BEGINNING: list[CpuSeconds] = []
"""When this command began, where the number of threads is for us to choose (`set_environment`)."""


def read_cpu_seconds() -> CpuSeconds | None:
    """The processor time that was spent so far; None where the system does not say."""
    import psutil

    try:
        cores = dict(enumerate(psutil.cpu_times(percpu=True)))
    except (OSError, RuntimeError, NotImplementedError):
        return None
    with contextlib.suppress(AttributeError, OSError):  # macOS and Windows have no such call
        cores = {number: cores[number] for number in os.sched_getaffinity(0) if number in cores}
    spent = [second for core in cores.values() for kind, second in core._asdict().items() if kind not in NOT_BUSY]
    return CpuSeconds(time.monotonic(), sum(spent), sum(os.times()[:4]))


def count_busy_cores(start: CpuSeconds | None = None) -> float:
    """How many of the usable cores other programs keep busy: a mean since `start`, else since this command began; where
    that is long ago, or a library calls, over LOAD_SECONDS, which it then takes. 0 where the system does not say.

    Commonly got wrong: the load average counts a program that has ended for minutes, and one that waits for a disk."""
    began = [one for one in BEGINNING if time.monotonic() - one.at <= STALE_SECONDS]
    start = start or (began[0] if began else read_cpu_seconds())
    if start is None:
        return 0.0
    time.sleep(max(0.0, LOAD_SECONDS - (time.monotonic() - start.at)))
    now = read_cpu_seconds()
    return 0.0 if now is None else max(0.0, now.usable - start.usable - (now.own - start.own)) / (now.at - start.at)


def affinity() -> int:
    """Cores on which the scheduler may run this process; all of them where the system does not say."""
    with contextlib.suppress(AttributeError, OSError):  # macOS and Windows have no such call
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quotas(root: Path) -> Iterator[float]:
    """The quotas in cores, of this process's control group and of every group above it. Inside a container the path
    may be the host's, of which only the top is mounted; folders that are not there are passed over."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(errors="replace").splitlines():
            _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
            if controllers and "cpu" not in controllers.split(","):
                continue
            for mount in [""] if not controllers else dict.fromkeys((controllers, "cpu")):
                top = root / "sys/fs/cgroup" / mount
                group = top / path.strip("/")
                for folder in (group, *group.parents):
                    yield from quota_of(folder)
                    if folder == top:
                        break


def quota_of(folder: Path) -> Iterator[float]:
    """The quota in one control group's folder, if it has one: `cpu.max` (version 2) or `cpu.cfs_*_us` (version 1)."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        yield int(quota) / int(period)  # "max" is no number: no quota
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        if int(quota) > 0:  # -1: no quota
            yield int(quota) / int(period)


def bf16_support(device: torch.device) -> tuple[bool, str]:
    """Whether this device multiplies bfloat16 in hardware, and the reason for the answer. A CPU without it is up to
    80 times slower in bfloat16 than in float32. Two variables take the instructions away from a CPU that has them,
    and are respected: ATEN_CPU_CAPABILITY (torch's own kernels) and ONEDNN_MAX_CPU_ISA (matrix products)."""
    import torch

    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return (major, minor) >= (8, 0), f"compute capability {major}.{minor}; 8.0 and later have it in hardware"
    if device.type != "cpu":
        return False, f"bfloat16 is not tried on {device.type} unless asked for"
    has = [name for name in BF16_INSTRUCTIONS if torch.cpu.get_capabilities().get(name)]
    if not has:
        return False, "the processor has neither avx512_bf16 nor amx_bf16"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False, f"the processor has {' and '.join(has)}, which ATEN_CPU_CAPABILITY takes away"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, f"the processor has {' and '.join(has)}, which ONEDNN_MAX_CPU_ISA takes away"
    return True, f"the processor has {' and '.join(has)}"


def processor_name() -> str:
    """The name of the processor, from /proc/cpuinfo where that exists."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held: of a GPU what torch allocated, else resident memory; None where the
    system does not say."""
    import torch

    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return int(allocated)
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except (ImportError, AttributeError, OSError):  # Windows, whose own count psutil knows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # macOS counts bytes, Linux kilobytes


def set_environment(threads: int, offline: bool = False) -> None:
    """Set environment variables that torch and huggingface_hub read when they are imported."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "RANK" in os.environ:  # a store that is gone has a message of ours; torch's is a page of C++ frames
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    elif "OMP_NUM_THREADS" not in os.environ:  # torch counts physical cores only, which leaves half of some idle
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())
        BEGINNING[:] = [now for now in (read_cpu_seconds(),) if now is not None]


def are_threads_automatic() -> bool:
    """Whether nobody has given a number of threads, by an option or by OMP_NUM_THREADS."""
    return bool(BEGINNING) or "OMP_NUM_THREADS" not in os.environ
