"""The doctor: finds what is there, tells what to mend, keeps secrets."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch

from llm_quest.cli.doctor import (
    PACKAGES,
    git_state,
    hub_cache_dir,
    inspect_machine,
    machine_warnings,
    nearest_existing_dir,
    redact_variable,
)


def test_it_finds_this_machine(monkeypatch):
    found = inspect_machine()
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
    text = json.dumps(inspect_machine().as_json()) + "\n".join(inspect_machine().lines())
    assert "hf_very_secret" not in text
    assert "pass@" not in text
    assert "elsewhere" not in text
    assert "mirror.example" in text
    assert redact_variable("MY_API_KEY", "abc") == "(set, not shown)"


def test_offline_variables_and_the_cache_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    found = inspect_machine()
    assert found.hub_offline
    assert hub_cache_dir() == tmp_path / "hub"
    assert any(f"{tmp_path}/hub, offline" in line for line in found.lines())


@pytest.mark.parametrize(
    ("change", "said", "remedy"),
    [
        ({"compiler": None}, "no C++ compiler", "install g++"),
        ({"threads": 64, "usable_cores": 2}, "64 threads on 2 usable cores", "OMP_NUM_THREADS=2"),
        ({"threads": 1, "usable_cores": 4, "variables": {"OMP_NUM_THREADS": "1"}}, "leaves cores idle", "set it to 4"),
        ({"disk_free": 10**8}, "0.1 GB of disk", "free some"),
        ({"memory_available": 10**8}, "0.1 GB of memory", "micro_batch_size"),
        ({"packages": {"jinja2": None, "transformers": None}}, "jinja2 cannot be found", "pip install"),
    ],
)
def test_each_ill_has_its_remedy(change, said, remedy):
    well = dataclasses.replace(
        inspect_machine(), threads=2, usable_cores=2, variables={}, disk_free=10**12, packages={}
    )
    well = dataclasses.replace(well, memory_available=10**12, compiler="/usr/bin/g++")
    assert list(machine_warnings(well)) == []
    ((what, how),) = machine_warnings(dataclasses.replace(well, **change))
    assert said in what
    assert remedy in how


def test_outside_a_checkout_there_is_no_git_state(tmp_path):
    assert git_state(tmp_path) is None


def checkout(folder: Path, *settings: tuple[str, str]) -> Path:
    """A git checkout with one committed file, one change, and these settings."""
    for command in (
        ("init", "-q", "-b", "main"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@example", "commit", "-qm", "first"),
        *(("config", *setting) for setting in settings),
    ):
        subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("setting", ["core.fsmonitor", "filter.x.clean"])
def test_a_strangers_git_settings_run_nothing(tmp_path, monkeypatch, setting):
    """The working folder and the run folder are a stranger's checkout whose settings name a program."""
    witness = tmp_path / "it-ran"
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".gitattributes").write_text("* filter=x\n")
    (folder / "config.yaml").write_text("steps: 1\n")
    checkout(folder, (setting, f"touch {witness}; cat"))
    (folder / "config.yaml").write_text("steps: 2\n")
    monkeypatch.chdir(folder)
    inspect_machine(folder)
    inspect_machine()
    assert not witness.exists()
    git_state(folder)
    assert witness.exists(), "the trap does not work: git itself no longer obeys it"


def test_the_packages_own_checkout_is_told(tmp_path):
    (tmp_path / "a").write_text("1")
    found = git_state(checkout(tmp_path))
    assert found is not None
    assert (len(found["commit"]), found["branch"], found["changed"]) == (40, "main", False)
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == found | {"changed": True}


def test_a_folder_that_is_not_there_yet_has_a_disk(tmp_path):
    assert nearest_existing_dir(tmp_path / "runs" / "new") == tmp_path
    assert inspect_machine(tmp_path / "runs" / "new").disk_free > 0
