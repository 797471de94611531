"""The tests whose course depends on the machine: the list, and the law that it is whole.

All others judge the same on every processor: what `auto` means comes from a kept profile (`tests/machine/__init__.py`),
and bits are compared on one machine with themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
READS = {
    "is_loaded", "find_cpp_compiler", "bf16_support", "get_cpu_capability", "get_capabilities", "cpu_count", "affinity",
    "sched_getaffinity", "measure_rates", "read_cpu_seconds", "native_rows", "float_rows", "device_count",
    "query_attention",
    "_is_mkldnn_bf16_supported", "identify_machine", "usable_cores", "bf16_instructions", "is_available",
    "processor_name", "missing_kernel", "orthogonalize_by_kernel", "update_matrices",
}  # fmt: skip
"""What says something of the processor, its compiler, its load or its GPU, or calls the package's kernels in C++."""
COMPILER, INSTRUCTIONS = "skipped without a C++ compiler", "computes with the instructions that the processor has"
LISTED = {
    "cli/test_doctor.py": {"test_it_finds_this_machine": "the doctor's report holds this machine's cores"},
    "laws/test_platforms.py": {
        "test_all_cores_are_counted_where_the_system_names_none": "as many cores as the system counts",
        "test_every_file_that_makes_such_a_call_is_known": "through the table of such calls; nothing is compared",
        "test_a_feature_goes_on_where_its_call_is_missing_or_refused": "as many cores as the system counts",
    },
    "layers/test_attention.py": {
        "test_the_operator_for_one_query_is_the_definition": f"{COMPILER}; {INSTRUCTIONS}",
        "test_a_query_s_bits_do_not_depend_on_other_rows_nor_on_hidden_keys": f"{COMPILER}; {INSTRUCTIONS}",
        "test_the_operator_for_one_query_is_in_compiled_code_and_not_in_an_exported_program": COMPILER,
        "test_the_operator_for_one_query_leaves_the_rest_to_the_plain_forms": COMPILER,
    },
    "layers/test_linear.py": {
        "test_the_loop_in_cpp_is_the_product_and_a_row_does_not_depend_on_the_others": f"{COMPILER}; {INSTRUCTIONS}",
        "test_the_loop_in_cpp_compiles_and_is_not_in_an_exported_program": COMPILER,
        "test_the_layer_takes_the_loop_in_cpp_for_its_rows_alone": COMPILER,
    },
    "layers/test_quantized.py": {
        "test_the_kernel_is_the_definition_for_every_width_and_number_of_rows": f"{COMPILER}; {INSTRUCTIONS}",
        "test_a_row_has_the_same_bits_whatever_rows_come_with_it": f"{COMPILER}; {INSTRUCTIONS}",
        "test_numbers_of_x_keep_23_bits_of_their_group_s_largest": f"{COMPILER}; {INSTRUCTIONS}",
        "test_what_is_not_finite_stays_so_and_no_rows_are_no_result": COMPILER,
    },
    "layers/test_training_kernels.py": {
        "test_the_norm_is_the_plain_one": f"{COMPILER}; {INSTRUCTIONS}",
        "test_the_gated_product_is_the_plain_one": f"{COMPILER}; {INSTRUCTIONS}",
        "test_the_rotation_has_the_bits_of_the_plain_one": f"{COMPILER}; {INSTRUCTIONS}",
        "test_causal_attention_is_the_definition": f"{COMPILER}; {INSTRUCTIONS}",
        "test_the_cross_entropy_of_the_kernel_is_the_definition": f"{COMPILER}; {INSTRUCTIONS}",
        "test_numbers_that_are_not_finite_are_not_hidden": f"{COMPILER}; {INSTRUCTIONS}",
        "test_they_are_taken_in_float32_with_gradients_in_eager_passes_alone": COMPILER,
        "test_layers_call_them": f"{COMPILER}; {INSTRUCTIONS}",
        "test_a_model_is_as_near_to_its_gradients_in_float64_as_by_the_plain_forms": f"{COMPILER}; {INSTRUCTIONS}",
    },
    "machine/test_compiler.py": {
        "test_a_compiler_that_works_is_found_and_loads_what_it_made": COMPILER,
        "test_without_a_compiler_the_message_says_what_to_do": "with an empty PATH, whatever there is",
        "test_inductor_searches_where_we_do": COMPILER,
    },
    "machine/test_hardware.py": {
        "test_what_a_process_spends_is_the_systems_and_only_its_own_is_this_processs": "counts this machine's load",
    },
    "machine/test_profile.py": {
        "test_the_machine_of_this_test_is_measured_in_all_its_rates": "measures this machine; no rate is compared",
        "test_a_busy_machine_is_measured_anew_later": "the file of this machine; its rates are replaced",
        "test_a_broken_or_strange_file_is_said_and_the_machine_measured_anew": "the file of this machine",
    },
    "recipes/test_auto.py": {
        "test_a_run_keeps_the_loop_in_cpp_and_one_from_before_it_goes_on_without": "expects what a compiler makes",
        "test_a_run_keeps_the_training_kernels_and_says_where_they_cannot_be_had": "expects what a compiler makes",
    },
    "test_gpu_command.py": {"test_without_cuda_it_says_not_run_and_writes_nothing": "skipped where there is a GPU"},
    "train/test_muon_kernel.py": {
        "test_the_kernel_is_its_definition_on_every_instruction_set": f"{COMPILER}; {INSTRUCTIONS}",
        "test_a_step_by_the_kernel_is_the_step_by_the_definition": f"{COMPILER}; {INSTRUCTIONS}",
        "test_a_step_by_the_kernel_has_the_same_bits_on_any_number_of_threads": f"{COMPILER}; {INSTRUCTIONS}",
        "test_what_is_not_finite_stays_in_its_own_matrix": f"{COMPILER}; {INSTRUCTIONS}",
        "test_the_operator_refuses_what_it_would_read_beyond": COMPILER,
    },
    "train/test_parallel.py": {"test_an_unknown_engine_or_device_says_what_there_is": "asks for one GPU too many"},
}
"""File -> test -> how it depends on the machine."""


def names_in(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


CORES = {"sched_getaffinity", "affinity", "cpu_count", "cpu_quotas"}


def find_replacements(node: ast.AST) -> set[str]:
    """What a test puts its own machine in place of: `monkeypatch.setattr(os, "cpu_count", ...)`. Then the number of
    usable cores is its own too."""
    calls = [part for part in ast.walk(node) if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute)]
    found = {
        str(given.value).rpartition(".")[2]
        for call in calls
        if call.func.attr in ("setattr", "delattr")  # type: ignore[attr-defined]
        for given in call.args
        if isinstance(given, ast.Constant)
    }
    return found | ({"usable_cores"} if found & CORES else set())


def reading_tests(file: Path) -> set[str]:
    """The tests of a file that read the machine, themselves or through what the file defines; all of them where a mark
    of the whole file does."""
    text = file.read_text(encoding="utf-8")
    if not any(word in text for word in READS):
        return set()
    parts = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            parts[node.name] = set(names_in(node)) - find_replacements(node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            parts[node.targets[0].id] = set(names_in(node.value))
    reading = {name for name, names in parts.items() if names & READS}
    while more := {name for name, names in parts.items() if names & reading} - reading:
        reading |= more
    return {name for name in (parts if "pytestmark" in reading else reading) if name.startswith("test_")}


def test_every_test_that_reads_the_machine_is_listed() -> None:
    found = {
        file.relative_to(TESTS).as_posix(): tests for file in TESTS.rglob("test_*.py") if (tests := reading_tests(file))
    }
    assert found == {file: set(tests) for file, tests in LISTED.items()}
