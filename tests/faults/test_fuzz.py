"""What reads input refuses bad input in a message, whatever it is. `python -m tests.faults --count 5000` does more."""

from __future__ import annotations

import shutil

import pytest

from tests.faults.all_targets import ALL_TARGETS as TARGETS
from tests.faults.fuzz import mutate_inputs, run_target
from tests.faults.mutations import to_hostile_json
from tests.faults.targets import Target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_input_is_read_or_refused_in_a_message(target: Target):
    assert run_target(target, 30) == []


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_good_input_is_read(target: Target, tmp_path):
    """The inputs that are mutated are good ones: otherwise all of their variants would be refused for one reason."""
    file = tmp_path / (target.file or target.name)
    for value in target.values():
        rows = value if target.as_lines else [value]
        file.write_bytes(b"\n".join(map(to_hostile_json, rows)))
        target.read(file)
        shutil.rmtree(tmp_path / "whole", ignore_errors=True)
    for content in target.contents():
        file.write_bytes(content)
        target.read(file)
    assert target.values() or target.contents()


def test_an_input_is_a_function_of_its_number():
    first, second = (dict(mutate_inputs(TARGETS[0], 5, start)) for start in (10, 12))
    assert first[12] == second[12]
    assert len(set(first.values())) > 3


def test_the_harness_finds_what_is_not_caught(tmp_path):
    def parse_carelessly(file):
        return {"a": 1}[file.read_bytes()[:1].decode()]

    faults = run_target(Target("careless", parse_carelessly, contents=lambda: [b"abc"]), 200)
    assert {fault.what.partition(":")[0] for fault in faults} <= {"KeyError", "UnicodeDecodeError"}
    assert faults
