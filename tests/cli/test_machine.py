"""The doctor: finds what is there, tells what to mend, keeps secrets."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from llm_quest.cli.machine import PACKAGES, doctor, existing, git_state, hub_cache, matmul_peak, told, warnings


def test_it_finds_this_machine(monkeypatch):
    found = doctor()
    assert found.torch == torch.__version__
    assert 1 <= found.usable_cores <= found.cores
    assert 0 < found.memory_available <= found.memory_bytes
    assert set(found.packages) == set(PACKAGES)
    assert found.packages["torch"] is not None
    assert "cpu" in found.devices
    json.dumps(found.as_json())


def test_secrets_are_set_and_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pass@mirror.example/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "elsewhere")
    text = json.dumps(doctor().as_json()) + "\n".join(doctor().lines())
    assert "hf_very_secret" not in text
    assert "pass@" not in text
    assert "elsewhere" not in text
    assert "mirror.example" in text
    assert told("MY_API_KEY", "abc") == "(set, not shown)"


def test_offline_variables_and_the_cache_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    found = doctor()
    assert found.hub_offline
    assert hub_cache() == tmp_path / "hub"
    assert any(f"{tmp_path}/hub, offline" in line for line in found.lines())


@pytest.mark.parametrize(
    ("change", "said", "remedy"),
    [
        ({"compiler": None}, "no C++ compiler", "install g++"),
        ({"threads": 64, "usable_cores": 2}, "64 threads on 2 usable cores", "OMP_NUM_THREADS=2"),
        ({"threads": 1, "usable_cores": 4, "variables": {"OMP_NUM_THREADS": "1"}}, "leaves cores idle", "set it to 4"),
        ({"disk_free": 10**8}, "0.1 GB of disk", "free some"),
        ({"memory_available": 10**8}, "0.1 GB of memory", "micro_rows"),
        ({"packages": {"jinja2": None, "transformers": None}}, "jinja2 cannot be found", "pip install"),
    ],
)
def test_each_ill_has_its_remedy(change, said, remedy):
    well = dataclasses.replace(doctor(), threads=2, usable_cores=2, variables={}, disk_free=10**12, packages={})
    well = dataclasses.replace(well, memory_available=10**12, compiler="/usr/bin/g++")
    assert list(warnings(well)) == []
    ((what, how),) = warnings(dataclasses.replace(well, **change))
    assert said in what
    assert remedy in how


def test_outside_a_checkout_there_is_no_git_state(tmp_path):
    assert git_state(tmp_path) is None


def test_a_folder_that_is_not_there_yet_has_a_disk(tmp_path):
    assert existing(tmp_path / "runs" / "new") == tmp_path
    assert doctor(tmp_path / "runs" / "new").disk_free > 0


def test_the_matrix_product_rate_is_a_rate():
    assert 0 < matmul_peak(64, torch.float32, seconds=0.01) < 1e6
