"""What the machine can do: a container's quota, and where bfloat16 is fast."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llm_quest.machine import hardware
from llm_quest.machine.hardware import (
    LOAD_SECONDS,
    CpuSeconds,
    are_threads_automatic,
    count_busy_cores,
    read_cpu_seconds,
    set_environment,
    usable_cores,
)
from tests.forked import run_forked


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 64),
        (
            {
                "proc/self/cgroup": "0::/pods/one\n",
                "sys/fs/cgroup/pods/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n1:memory:/docker/abc\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            64,
        ),
    ],
)
def test_a_containers_quota_counts(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cores(write_files(tmp_path, files)) == cores


def test_affinity_counts_and_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert usable_cores(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores(tmp_path) == 5


def test_the_command_line_starts_as_many_threads_as_the_quota_allows(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(hardware, "affinity", lambda: 64)
    monkeypatch.setattr(hardware, "cpu_quotas", lambda root: [2.0])
    monkeypatch.setattr(hardware, "BEGINNING", [])
    set_environment(0)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert are_threads_automatic()


def test_a_number_that_was_given_is_not_automatic(monkeypatch):
    monkeypatch.setattr(hardware, "BEGINNING", [])
    for variable, threads in (("3", 0), (None, 4), ("3", 4)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if variable is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        set_environment(threads)
        assert os.environ["OMP_NUM_THREADS"] == str(threads or variable)
        assert not are_threads_automatic()


def readings(monkeypatch: pytest.MonkeyPatch, *given: CpuSeconds | None) -> list[float]:
    """What the system says, one after another, and the clock of the first; the seconds that were slept."""
    slept: list[float] = []
    following = iter(given)
    monkeypatch.setattr(hardware, "read_cpu_seconds", lambda: next(following))
    monkeypatch.setattr(hardware.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(hardware.time, "sleep", slept.append)
    return slept


def test_cores_of_other_programs_are_counted_since_the_command_began(monkeypatch):
    """10 s in which two cores were busy for 18 s, 3 of them with this process."""
    monkeypatch.setattr(hardware, "BEGINNING", [CpuSeconds(90.0, 500.0, 1.0)])
    slept = readings(monkeypatch, CpuSeconds(100.0, 518.0, 4.0))
    assert count_busy_cores() == pytest.approx(1.5)
    assert slept == [0.0]


def test_load_is_measured_anew_where_the_command_began_long_ago_and_is_0_where_nobody_knows(monkeypatch):
    monkeypatch.setattr(hardware, "BEGINNING", [CpuSeconds(60.0, 0.0, 0.0)])
    slept = readings(monkeypatch, CpuSeconds(100.0, 500.0, 1.0), CpuSeconds(100.25, 500.5, 1.25))
    assert count_busy_cores() == pytest.approx(1.0)
    assert slept == [LOAD_SECONDS]
    monkeypatch.setattr(hardware, "BEGINNING", [])
    readings(monkeypatch, None)
    assert count_busy_cores() == 0.0
    readings(monkeypatch, CpuSeconds(100.0, 500.0, 1.0), CpuSeconds(100.25, 500.0, 1.25))
    assert count_busy_cores() == 0.0, "processor time is counted in ticks"


def test_what_a_process_spends_is_the_systems_and_only_its_own_is_this_processs():
    start = read_cpu_seconds()
    assert start is not None, "psutil reads it wherever the tests run"
    with subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) as other:
        time.sleep(0.5)
        spent = psutil.Process(other.pid).cpu_times()
        seen = read_cpu_seconds()
        other.kill()
    assert seen is not None
    assert seen.usable - start.usable > 0.9 * (spent.user + spent.system) - 0.03
    before = time.process_time()
    while time.process_time() < before + 0.1:
        pass
    now = read_cpu_seconds()
    assert now is not None
    assert now.own - seen.own > 0.09
    assert now.own - seen.own > spent.user + 0.05, "and of its children, once they have ended"


MUON = (
    "import torch\n"
    "from llm_quest.train.newton_schulz import default_form, newton_schulz, orthogonalize\n"
    "print(default_form(torch.device('cpu')))\n"
    "g = torch.randn(6, 8)\n"
    "print(torch.equal(orthogonalize(g), newton_schulz(g, 5) * (0.2 * 8**0.5)))\n"
)


def test_muon_iterates_in_float32_where_bfloat16_has_no_instructions():
    """By either variable (both: see below). oneDNN reads its own when it is used, ATen reads its own at the import."""
    forked = " ".join(run_forked(run_with_variables, MUON, {"ONEDNN_MAX_CPU_ISA": "AVX2"})).split()
    assert forked == run_python(MUON, ATEN_CPU_CAPABILITY="avx2") == ["float32", "True"]


def run_with_variables(code: str, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    exec(code, {})


def test_without_bfloat16_instructions_the_measured_choices_are_float32(tmp_path):
    """Nothing but the measurement says so: the machine is the real one, without what the variables take away."""
    code = (
        "from llm_quest.machine.choices import choose_muon_form, choose_precision\n"
        "from llm_quest.machine.profile import load_profile\n"
        "profile = load_profile()\n"
        "print(choose_precision(profile).value, choose_muon_form(profile).value != 'bfloat16')\n"
    )
    taken = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    found = run_python(code + MUON, LLM_QUEST_MACHINE_PROFILE="", LLM_QUEST_CACHE=str(tmp_path), **taken)
    assert found == ["fp32", "True", "float32", "True"]


def run_python(code: str, **variables: str) -> list[str]:
    """The words that a program prints in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.parametrize(
    ("threads", "cores", "quotas", "said"),
    [
        (2, 2, [], "2 threads on 2 usable cores"),
        (1, 64, [0.5], "1 thread on 1 usable core (a CPU quota of 0.5 of 64 cores)"),
        (2, 64, [2.5, 8.0], "2 threads on 2 usable cores (a CPU quota of 2.5 of 64 cores)"),
        (99, 2, [], "99 threads on 2 usable cores: threads that wait for a core make every product slower; "
                    "give threads=2"),
        (1, 1, [], "1 thread on 1 usable core"),
    ],
)  # fmt: skip
def test_threads_are_said_with_the_cores_that_they_run_on(monkeypatch, threads, cores, quotas, said):
    monkeypatch.setattr(hardware, "affinity", lambda: cores)
    monkeypatch.setattr(hardware, "cpu_quotas", lambda root: iter(quotas))
    assert hardware.describe_threads(threads) == said
