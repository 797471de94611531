"""The profile's file: kept, read again, and never trusted."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.cache_dirs import TemporaryCache
from llm_quest.errors import DataError, QuestWarning
from llm_quest.machine import probe
from llm_quest.machine import profile as profiles
from llm_quest.machine.compiler import CompilerTrial
from llm_quest.machine.probe import RATES, REQUIRED, Measurement, fast_seconds, measure_rates
from llm_quest.machine.profile import (
    identify_machine,
    load_compiler,
    load_profile,
    parse_profile,
    profile_path,
    profile_to_json,
    read_profile,
    record_compile_seconds,
)

MACHINES = Path(__file__).parent / "profiles"
AVX2 = json.loads((MACHINES / "avx2.json").read_text())


@pytest.fixture
def measurements(tmp_path, monkeypatch) -> list[str]:
    """An empty cache and no profile by file. The measurement is the recorded one of a machine; the list has an entry
    for each time that it is asked for."""
    asked: list[str] = []
    monkeypatch.delenv(profiles.VARIABLE, raising=False)
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "_LOADED", {})
    monkeypatch.setattr(
        profiles, "measure_rates", lambda: asked.append("measured") or Measurement(AVX2["rates"], busy=False)
    )
    return asked


def new_process(monkeypatch) -> None:
    monkeypatch.setattr(profiles, "_LOADED", {})


@pytest.mark.parametrize("file", sorted(MACHINES.glob("*.json")), ids=lambda file: file.stem)
def test_a_profile_comes_back_from_its_file(file):
    profile = read_profile(file)
    assert parse_profile(json.loads(json.dumps(profile_to_json(profile))), "again") == profile


def test_the_machine_of_this_test_is_measured_in_all_its_rates():
    """Real numbers: the only test that measures."""
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    found = measure_rates()
    assert set(REQUIRED) <= set(found.rates) <= set(RATES)
    assert all(rate > 0 for rate in found.rates.values())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state), "nobody's random numbers are taken"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_slow_calls_of_a_busy_machine_do_not_count():
    now, durations = [0.0], itertools.cycle([50.0, 50.0, 1.0, 70.0])

    def call() -> None:
        now[0] += next(durations)

    assert fast_seconds(lambda: now[0], [call], limit=2000.0) == pytest.approx(1.0)
    assert fast_seconds(lambda: now[0], [call], limit=0.0) > 0, "one call where there is time for none"


def test_a_thread_that_is_kept_from_running_is_no_measurement(monkeypatch):
    """Few preemptions, each of them long: only the CPU time of the thread shows them."""
    monkeypatch.setattr(probe, "count_preemptions", lambda: 0)

    def wait(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    for work, steady in ((time.sleep, False), (wait, True)):
        monkeypatch.setattr(
            probe, "measure_with", lambda clock, rates_of, work=work: ((name, work(0.02) or 1.0) for name in "abc")
        )
        if steady:  # this machine may be busy: then the clock of the wall is the thread's own
            monkeypatch.setattr(probe.time, "perf_counter", time.thread_time)
        assert (probe.measure_undisturbed(probe._measure_all) == {"a": 1.0, "b": 1.0, "c": 1.0}) is steady


def test_it_is_measured_once_and_kept(measurements, monkeypatch):
    said: list[str] = []
    first = load_profile(said.append)
    assert load_profile(said.append) is first
    new_process(monkeypatch)
    again = load_profile(said.append)
    assert measurements == ["measured"]
    assert len(said) == 1
    assert again.rates == first.rates
    assert again.source.startswith("kept in ")


def test_another_number_of_threads_or_fewer_instructions_are_another_machine(measurements, monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)  # who runs the tests may have set it
    load_profile()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    load_profile()
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        load_profile()
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert len(measurements) == 3


def test_a_busy_machine_is_measured_anew_later(measurements, monkeypatch):
    load_profile()
    path = profile_path(identify_machine())
    content = json.loads(path.read_text())
    for age, times in ((10, 1), (10_000, 2)):
        path.write_text(json.dumps(content | {"busy": True, "measured_at": time.time() - age}))
        new_process(monkeypatch)
        load_profile()
        assert len(measurements) == times


HOSTILE = {
    "truncated": json.dumps(AVX2)[:400],
    "empty": "",
    "not JSON": "rates: 1",
    "a list": "[]",
    "deep": "[" * 100_000,
    "a number with many digits": '{"version": ' + "9" * 5000 + "}",
    "binary": "\x00\x01",
    "another version": json.dumps(AVX2 | {"version": 99}),
    "a field too many": json.dumps(AVX2 | {"command": "rm"}),
    "no rates": json.dumps({name: value for name, value in AVX2.items() if name != "rates"}),
    "a rate of nothing": json.dumps(AVX2 | {"rates": AVX2["rates"] | {"products/float32/large": 0}}),
    "a rate without end": json.dumps(AVX2 | {"rates": AVX2["rates"] | {"products/float32/large": 1e300}}),
    "NaN": json.dumps(AVX2 | {"rates": AVX2["rates"] | {"products/float32/large": float("nan")}}),
    "a rate of text": json.dumps(AVX2 | {"rates": AVX2["rates"] | {"products/float32/large": "fast"}}),
    "a rate that is true": json.dumps(AVX2 | {"rates": AVX2["rates"] | {"products/float32/large": True}}),
    "an unknown rate": json.dumps(AVX2 | {"rates": AVX2["rates"] | {"products/float8/large": 1.0}}),
    "a rate is missing": json.dumps(AVX2 | {"rates": {"products/float32/large": 1.0}}),
    "threads of nothing": json.dumps(AVX2 | {"machine": AVX2["machine"] | {"threads": "0"}}),
    "threads in other digits": json.dumps(AVX2 | {"machine": AVX2["machine"] | {"threads": "²"}}),
    "a time of infinity": json.dumps(AVX2 | {"measured_at": float("inf")}),
    "a compiler of another shape": json.dumps(AVX2 | {"compiler": {"path": "/bin/sh"}}),
    "too large": json.dumps(AVX2) + " " * 200_000,
    "of another machine": json.dumps(AVX2 | {"machine": AVX2["machine"] | {"processor": "Elbrus"}}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_broken_or_strange_file_is_said_and_the_machine_measured_anew(measurements, monkeypatch, kind):
    path = profile_path(identify_machine())
    path.parent.mkdir(parents=True)
    path.write_text(HOSTILE[kind])
    said: list[str] = []
    assert load_profile(said.append).rates == AVX2["rates"]
    assert measurements == ["measured"]
    assert "measured anew" in said[0]
    assert str(path) in said[0]
    assert max(map(len, said)) < 600
    new_process(monkeypatch)
    load_profile(said.append)
    assert measurements == ["measured"], "the broken file was replaced"


def test_a_profile_by_file_stands_for_the_machine_and_a_broken_one_is_passed_over(measurements, monkeypatch, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(HOSTILE["of another machine"])
    monkeypatch.setenv(profiles.VARIABLE, str(own))
    profile = load_profile()
    assert (profile.machine["processor"], profile.given, measurements) == ("Elbrus", True, [])
    record_compile_seconds(12.0)
    assert not profile_path(profile.machine).exists(), "a file that was given is not kept as a measurement"
    for bad in (tmp_path / "nowhere.json", tmp_path):
        monkeypatch.setenv(profiles.VARIABLE, str(bad))
        said: list[str] = []
        assert not load_profile(said.append).given
        assert f"{profiles.VARIABLE} is passed over" in said[0]


def test_a_cache_that_is_no_folder_costs_the_measurement_only(measurements, monkeypatch, tmp_path):
    """(tests/faults/test_cache.py has the other obstacles.)"""
    monkeypatch.setattr(TemporaryCache, "warned", False)
    (tmp_path / "cache").write_text("in the way")
    with pytest.warns(QuestWarning, match="cannot be written"):
        assert load_profile().rates
    new_process(monkeypatch)
    load_profile()
    assert len(measurements) == 2


def test_the_compiler_is_tried_once_and_what_compiling_took_is_kept(measurements, monkeypatch):
    tried: list[int] = []
    monkeypatch.setattr(profiles, "find_cpp_compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(profiles, "try_cpp_compiler", lambda: tried.append(1) or CompilerTrial("/usr/bin/g++", "", 0.5))
    assert load_compiler().works
    record_compile_seconds(40.0)
    new_process(monkeypatch)
    assert load_compiler().works
    assert len(tried) == 1
    record_compile_seconds(3.0)
    assert load_profile().compile_seconds == 40.0, "a later run finds compiled kernels"
    monkeypatch.setattr(profiles, "find_cpp_compiler", lambda: "/usr/bin/another")
    load_compiler()
    assert len(tried) == 2


def test_a_compiler_that_failed_is_tried_again_by_the_next_process(measurements, monkeypatch):
    answers = iter([CompilerTrial(None, "none"), CompilerTrial("/usr/bin/g++", "")])
    monkeypatch.setattr(profiles, "try_cpp_compiler", lambda: next(answers))
    assert not load_compiler().works
    new_process(monkeypatch)
    assert load_compiler().works


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(key=st.sampled_from(sorted(AVX2)), value=json_values, inside=st.booleans())
def test_any_value_in_any_field_is_a_profile_or_a_data_error(key, value, inside):
    content = AVX2 | {key: {**AVX2[key], "threads": value} if inside and isinstance(AVX2[key], dict) else value}
    try:
        profile = parse_profile(content, "file")
    except DataError:
        return
    assert profile.threads > 0
    assert profile.ratio("products/float32/small", "products/float32/large") > 0
