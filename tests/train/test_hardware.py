"""What the machine can do: a container's quota, and where bfloat16 is fast."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_quest.train import hardware
from llm_quest.train.hardware import usable_cores


def written(root: Path, files: dict[str, str]) -> Path:
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
    assert usable_cores(written(tmp_path, files)) == cores


def test_affinity_counts_and_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert usable_cores(tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cores(tmp_path) == 5


def test_the_command_line_starts_as_many_threads_as_the_quota_allows(tmp_path, monkeypatch):
    from llm_quest.cli.main import set_environment

    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(hardware, "affinity", lambda: 64)
    monkeypatch.setattr(hardware, "cpu_quotas", lambda root: [2.0])
    set_environment(0)
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("taken", [{"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
                                   {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "avx2"}])  # fmt: skip
def test_muon_iterates_in_float32_where_bfloat16_has_no_instructions(taken):
    code = (
        "import torch\n"
        "from llm_quest.recipes.assembly import resolve_precision\n"
        "from llm_quest.train.optimizers import iteration_dtype, newton_schulz, orthogonalize\n"
        "cpu = torch.device('cpu')\n"
        "print(iteration_dtype(cpu), resolve_precision('auto', cpu).value)\n"
        "g = torch.randn(6, 8)\n"
        "print(torch.equal(orthogonalize(g), newton_schulz(g, 5) * (0.2 * 8**0.5)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **taken}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["torch.float32", "fp32", "True"]
