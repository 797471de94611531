"""`python -m benchmarks.gpu`: without CUDA it says so; on small shapes on the CPU every stage but GRPO's runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_setting import Result, Setting

FAMILIES = ("qwen3.5-tiny",)
"""Attention and states. Every family's laws on the CPU are in tests/laws."""
ROOT = Path(__file__).parents[1]


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_cuda_it_says_not_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert gpu.main(["--out", str(tmp_path / "gpu")]) == 0
    assert capsys.readouterr().out.startswith("not run: this machine has no CUDA device")
    assert not (tmp_path / "gpu").exists()


def test_every_stage_runs_on_small_shapes(tmp_path: Path):
    only = "peaks,laws,attention,training,decoding"
    options = ["--device", "cpu", "--tiny", "--minutes", "60", "--out", str(tmp_path)]
    options += ["--only", only, "--families", ",".join(FAMILIES)]
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a process of its own: the hook on imports would be traced too
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    found = read(tmp_path)
    assert {row["stage"] for row in found} == set(only.split(","))
    held = {row["name"]: row["ok"] for row in found if row["stage"] == "laws"}
    for page in FAMILIES:
        for law in ("float32: rows", "bfloat16: rows", "float32: gradients", "float64: greedy text"):
            assert held[f"{page}, {law}"]
    assert all(held.values())
    assert {row["name"] for row in found if row["stage"] == "decoding"} == {
        f"batch {rows}, bf16, {form}" for rows in (1, 32) for form in ("eager", "compiled", "CUDA graph")
    }
    assert all(row["value"] > 0 and row["share"] > 0 for row in found if row["stage"] in ("training", "decoding"))
    assert any(row["name"] == "flex_attention, documents" and row["ok"] for row in found)
    table = (tmp_path / "results.md").read_text().splitlines()
    assert len(table) == 4 + len(found)


def test_a_failure_a_crash_and_a_full_clock_are_rows_and_the_other_stages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def wrong(setting: Setting) -> Iterator[Result]:
        yield Result("a law", "FAILS", 0.5, "error", ok=False)
        raise RuntimeError("out of memory")

    def slow(setting: Setting) -> Iterator[Result]:
        setting.deadline = 0.0
        yield Result("first", "holds", ok=True)
        yield Result("second", "holds", ok=True)

    monkeypatch.setattr(gpu, "STAGES", {"wrong": gpu.Share(wrong, 0.5), "slow": gpu.Share(slow, 0.5)})
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "wrong,slow"]) == 1
    assert [row["name"] for row in read(tmp_path)] == ["a law", "stopped", "first", "the rest"]
    assert "RuntimeError: out of memory" in (tmp_path / "results.md").read_text()


def test_an_unknown_stage_is_named(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "laws,speed"])
    assert "no stage is called speed; known: peaks, laws" in capsys.readouterr().err
