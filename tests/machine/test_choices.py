"""What `auto` means on each machine, from profiles: no machine is needed to see its choices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llm_quest.cli.chat import quantized_kinds, use_fast_weights
from llm_quest.layers.quantized import QuantizedMatrix
from llm_quest.machine.choices import (
    Resolved,
    choose_compile,
    choose_few_row_kernel,
    choose_few_rows,
    choose_muon_form,
    choose_precision,
    choose_threads,
    choose_training_kernels,
    choose_weight_kernel,
    rough_duration,
    slow_bf16_warning,
    training_gain,
)
from llm_quest.machine.compiler import CompilerTrial
from llm_quest.machine.probe import ROWS
from llm_quest.machine.profile import MachineProfile, parse_profile, read_profile
from llm_quest.techniques.quantize import Quantize
from tests.laws.subjects import own, random_tokens

MACHINES = Path(__file__).parent / "profiles"
GCC, NONE = (
    CompilerTrial("/usr/bin/g++", ""),
    CompilerTrial(None, "no C++ compiler was found (install g++, or set CXX)"),
)
HOUR = 3600 * 0.5 * 190e9
"""FLOPs of an hour at half of the measured rate."""


@pytest.mark.parametrize(
    ("most", "cores", "busy", "threads"),
    [
        (2, 2, 0.0, 2), (2, 2, 0.4, 2), (2, 2, 0.6, 1), (2, 2, 2.3, 1), (64, 64, 3.2, 61), (64, 64, 80.0, 1),
        (2, 64, 30.0, 2),  # a quota of two cores, and idle ones enough
        (2, 64, 63.0, 1),
    ],
)  # fmt: skip
def test_a_thread_for_each_core_that_is_idle(most: int, cores: int, busy: float, threads: int):
    found = choose_threads(most, cores, busy)
    assert found.value == threads
    assert found.reason == f"other programs keep {min(busy, cores):.1f} of {cores} cores busy"


def machine(name: str, **rates: float) -> MachineProfile:
    """A recorded machine; rates by name with `__` for `/` replace its own."""
    content = json.loads((MACHINES / f"{name}.json").read_text())
    return parse_profile(
        content | {"rates": content["rates"] | {k.replace("__", "/"): v for k, v in rates.items()}}, name
    )


def amx() -> MachineProfile:
    """A server with AMX: products in bfloat16 at six times float32's rate, attention slower."""
    return machine(
        "avx512_bf16", products__bfloat16__large=1200.0, products__bfloat16__small=900.0, attention__bfloat16=30.0
    )


KERNELS = {"muon__kernel_float32": 440.0, "muon__kernel_bfloat16": 720.0}
SLOW_PRODUCTS = {"products__float32__small": 120.0}


@pytest.mark.parametrize(
    ("profile", "precision", "muon", "few"),
    [
        (machine("avx2"), "fp32", "eigenvalues", ["float32"]),
        (machine("avx2", eigenvalues__float32=1.0), "fp32", "gram", ["float32"]),
        (machine("avx512_bf16"), "bf16", "bfloat16", ["float32"]),
        (amx(), "bf16", "bfloat16", ["float32"]),
        (machine("avx2", muon__kernel_float32=1000.0), "fp32", "kernel_float32", ["float32"]),
        (machine("avx2", **SLOW_PRODUCTS, muon__kernel_float32=199.0), "fp32", "kernel_float32", ["float32"]),
        (machine("avx2", **SLOW_PRODUCTS, muon__kernel_float32=170.0), "fp32", "eigenvalues", ["float32"]),
        (machine("avx512_bf16", **KERNELS), "bf16", "kernel_bfloat16", ["float32"]),
    ],
    ids=["avx2", "many cores", "avx512_bf16", "amx", "kernel", "even kernel", "slow kernel", "bf16 kernel"],
)
def test_each_machine_has_its_choices_and_says_why(profile, precision, muon, few):
    assert choose_precision(profile).value == precision
    assert choose_muon_form(profile).value == muon
    assert list(choose_few_rows(profile).value) == few
    for choice in (choose_precision(profile), choose_muon_form(profile), choose_few_rows(profile)):
        assert any(digit in choice.reason for digit in "0123456789"), "a reason is a measured number"


def test_bfloat16_is_not_taken_where_its_attention_eats_the_gain():
    """Products alone would be twice as fast."""
    slow = machine("avx512_bf16", attention__bfloat16=1.0)
    assert slow.ratio("products/bfloat16/large", "products/float32/large") > 2
    assert training_gain(slow) < 1
    assert choose_precision(slow).value == "fp32"


def test_who_asks_for_bfloat16_where_it_is_slow_reads_the_measured_ratio():
    assert slow_bf16_warning(machine("avx512_bf16")) == ""
    words = slow_bf16_warning(machine("avx2"))
    assert "34 times as long" in words
    assert "float32 is faster" in words


def few_row_rates(gains: dict[int, float]) -> dict[str, float]:
    return {f"few_rows__float32__{n}__{form}": (gains[n] if form == "columns" else 1.0) * 10 for n in ROWS
            for form in ("plain", "columns")}  # fmt: skip


@pytest.mark.parametrize(
    ("gains", "rows"),
    [
        ({1: 0.5, 2: 2.0, 4: 1.5, 8: 1.2, 16: 1.0, 32: 1.0, 64: 0.9}, (2, 9)),
        ({1: 2.0, 2: 0.9, 4: 1.5, 8: 1.2, 16: 1.3, 32: 1.0, 64: 1.2}, (4, 17)),
        ({1: 2.0, 2: 2.0, 4: 2.0, 8: 2.0, 16: 2.0, 32: 2.0, 64: 2.0}, (1, 65)),
        ({1: 1.0, 2: 1.05, 4: 1.09, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0}, None),
    ],
)
def test_few_rows_are_the_longest_measured_range_with_a_gain(gains, rows):
    found = choose_few_rows(machine("avx2", **few_row_rates(gains))).value
    assert found == ({} if rows is None else {"float32": rows})


def test_the_loop_in_cpp_is_taken_where_it_beats_both_other_forms():
    rates = few_row_rates({1: 0.5, 2: 2.0, 4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0})
    assert not choose_few_row_kernel(machine("avx2", **rates)).value
    assert "quest doctor" in choose_few_row_kernel(machine("avx2", **rates)).reason
    kernel = {1: 19.0, 2: 23.0, 4: 12.0, 8: 11.5, 16: 9.0, 32: 9.0, 64: 9.0}  # the others: 10, of two rows 20
    rates |= {f"few_rows__float32__{n}__kernel": rate for n, rate in kernel.items()}
    assert choose_few_row_kernel(machine("avx2", **rates)).value == {"float32": (1, 9)}
    assert choose_few_row_kernel(machine("avx2", **rates | {"few_rows__float32__2__kernel": 21.0})).value == {
        "float32": (4, 9)
    }


def test_a_kernel_of_quantized_weights_that_is_slower_is_not_taken():
    assert choose_weight_kernel(machine("avx2"), "int8").value
    slow = choose_weight_kernel(machine("avx2", weights__int8__1=2.0), "int8")
    assert not slow.value
    assert "0.4 times float32's rate" in slow.reason
    assert choose_weight_kernel(machine("avx2"), "nf4").reason == "nf4 weights were not measured"


@pytest.mark.parametrize(
    ("hours", "precision", "seconds", "compiled"),
    [(0.01, "bf16", None, False), (2, "bf16", None, True), (0.2, "fp32", None, False), (10, "fp32", None, True),
     (2, "bf16", 3000.0, False)],
)  # fmt: skip
def test_a_run_is_compiled_where_it_repays(hours, precision, seconds, compiled):
    profile = replace(machine("avx512_bf16"), compile_seconds=seconds)
    choice = choose_compile(profile, GCC, hours * HOUR * (2 if precision == "bf16" else 1), precision)
    assert choice.value == compiled
    assert ("measured by a run before" if seconds else "estimated") in choice.reason


def test_layers_in_cpp_are_taken_in_float32_where_building_them_repays():
    def choose(flops: float, precision: str = "fp32", built: bool = False, profile: MachineProfile = machine("avx2")):
        return choose_training_kernels(profile, flops, precision, lambda: built)

    assert not choose(HOUR / 60).value
    assert "building them takes 20 s" in choose(HOUR / 60).reason
    assert choose(HOUR / 60, built=True) == Resolved(
        True, "a run of about 66 s would be 8 s shorter, and they are built"
    )
    assert not choose(HOUR / 3600, built=True).value, "loading them takes longer"
    assert choose(HOUR).value
    assert not choose(HOUR, "bf16", built=True).value
    without = replace(machine("avx2"), machine={**machine("avx2").machine, "instructions": "DEFAULT"})
    assert not choose(HOUR, built=True, profile=without).value


def test_without_a_compiler_no_run_is_compiled():
    choice = choose_compile(machine("avx512_bf16"), NONE, 1e30, "bf16")
    assert not choice.value
    assert "install g++" in choice.reason


def test_durations_have_the_unit_that_a_person_would_use():
    assert [rough_duration(s) for s in (12, 600, 7200)] == ["12 s", "10 min", "2.0 h"]


def test_recorded_machines_are_what_their_names_say():
    assert read_profile(MACHINES / "avx2.json").machine["instructions"] == "AVX2"
    assert read_profile(MACHINES / "avx512_bf16.json").machine["bf16_instructions"] == "True"


@pytest.mark.parametrize("slow", [False, True])
def test_a_format_whose_kernel_is_slower_than_float32_is_dequantized_and_it_says_so(slow: bool):
    model, lines = Quantize("int4")(own("llama3.2-tiny", torch.float32)), []
    tokens = random_tokens(model, 2, 5)
    with torch.no_grad():
        before = model(tokens)
    rates = {"weights__int4__1": 2.0 if slow else 20.0}
    kinds = quantized_kinds(model)
    assert kinds == ["int4", "int8"]
    use_fast_weights(model, kinds, machine("avx2", **rates), lines.append)
    kept = {m.form.name for m in model.modules() if isinstance(m, QuantizedMatrix) and m.floats is not None}
    assert kept == ({"int4"} if slow else set())
    assert len(lines) == slow
    assert all("int4 weights are read at" in line and "they are dequantized" in line for line in lines)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-4)
    assert not any(m.floats is not None for m in model.to(torch.bfloat16).modules() if isinstance(m, QuantizedMatrix))
