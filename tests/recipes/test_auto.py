"""What `auto` means for a run, on machines that are given by file; and that a resumed run keeps it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from llm_quest.layers import native
from llm_quest.layers.linear import FEW_ROWS, KERNEL_ROWS
from llm_quest.machine.choices import Resolved
from llm_quest.machine.hardware import CpuSeconds
from llm_quest.machine.profile import VARIABLE, load_profile
from llm_quest.recipes import auto
from llm_quest.recipes.auto import CompileTimer, Machine, SlowStepNotice, choose_all, is_undecided, resolve_precision
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import slow_step_notices
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.recipes.recipe import Context, load_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.train.parallel import DistributedContext
from tests.recipes.test_config import GOOD
from tests.recipes.test_pretrain import CtrlC, run, weights
from tests.recipes.tuned import WORDS, base, planning_context, write_rows

MACHINES = Path(__file__).parents[1] / "machine" / "profiles"
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes this machine one of those recorded, with other fields if given."""

    def use(name: str, **fields: object) -> None:
        file = tmp_path / f"{name}-{len(list(tmp_path.glob('*.json')))}.json"
        file.write_text(json.dumps(json.loads((MACHINES / f"{name}.json").read_text()) | fields))
        monkeypatch.setenv(VARIABLE, str(file))

    return use


def read_config(out: Path) -> dict:
    return yaml.safe_load((out / "config.yaml").read_text())


def config(*pairs: str) -> PretrainConfig:
    return parse_config(PretrainConfig, apply_overrides(read_yaml(GOOD, "my.yaml"), pairs))


def make_choices(*pairs: str, flops: float | None = None) -> tuple[dict, dict[str, str]]:
    """The choices on the present machine, and what is said of each."""
    said: list[str] = []
    found = choose_all(config(*pairs), {}, Machine(CPU, flops, said.append))
    return found, dict(line.split(": ", 1) for line in said)


def test_a_resumed_run_keeps_the_choices_of_the_machine_where_it_began(text, tmp_path, machine):
    """Bit for bit the straight run, though the machine on which it goes on would choose otherwise."""
    settings = ("precision=auto", "muon_form=auto")
    machine("avx512_bf16")
    run(text, tmp_path / "straight", *settings)
    run(text, tmp_path / "moved", *settings, callbacks=(CtrlC(4),))
    machine("avx2")
    assert resolve_precision("auto", CPU).value == "fp32"
    said: list[str] = []
    assert run(text, tmp_path / "moved", *settings, log=said.append).status == "finished"
    kept = {line.split(":")[0]: line for line in said if "as when this run began" in line}
    assert {"precision", "Muon's iterations", "products of few rows in the other order", "threads"} <= set(kept)
    assert "bf16" in kept["precision"]
    assert weights(tmp_path / "moved") == weights(tmp_path / "straight")
    written = read_config(tmp_path / "moved")
    assert (written["precision"], written["muon_form"]) == ("bf16", "bfloat16")
    assert written["few_row_products"] == read_config(tmp_path / "straight")["few_row_products"]
    assert {name: (rows.start, rows.stop) for name, rows in FEW_ROWS.items()} == {
        getattr(torch, name): tuple(rows) for name, rows in written["few_row_products"].items()
    }


KERNEL = {"few_rows/float32/1/kernel": 90.0}
"""A rate with which the loop in C++ is taken for one row."""


def test_a_run_keeps_the_training_kernels_and_says_where_they_cannot_be_had(text, tmp_path, machine, monkeypatch):
    """Whether layers are computed in C++ decides the last bits, so a resumed run goes on as it began."""
    with monkeypatch.context() as patch:
        patch.delenv("LLM_QUEST_CACHE")
        native.is_loaded()  # as below
    machine("avx2")
    run(text, tmp_path / "run", "training_kernels=true", callbacks=(CtrlC(4),))
    assert read_config(tmp_path / "run")["training_kernels"] is True
    said: list[str] = []
    monkeypatch.setattr(native.Library, "loaded", False)
    monkeypatch.setattr(native.Library, "reason", "no g++ here")
    run(text, tmp_path / "run", log=said.append)
    assert any(line.startswith("layers in C++: yes (as when this run began") for line in said)
    assert any("cannot be had (no g++ here)" in line for line in said)
    run(text, tmp_path / "new")
    assert read_config(tmp_path / "new")["training_kernels"] is False, "a short run does not repay building them"


def test_a_run_keeps_the_loop_in_cpp_and_one_from_before_it_goes_on_without(text, tmp_path, machine, monkeypatch):
    """A config.yaml without the key is that of a run that began before there was the loop."""
    with monkeypatch.context() as patch:
        patch.delenv("LLM_QUEST_CACHE")
        native.is_loaded()  # from the user's own cache; in that of the tests the loop would be compiled once more
    slow = json.loads((MACHINES / "avx2.json").read_text())["rates"]
    machine("avx2", rates=slow | KERNEL)
    new, old = tmp_path / "new", tmp_path / "old"
    for out in (new, old):
        run(text, out, callbacks=(CtrlC(4),))
        assert read_config(out)["few_row_kernel"] == {"float32": [1, 2]}
    content = read_config(old)
    del content["few_row_kernel"]
    (old / "config.yaml").write_text(yaml.safe_dump(content))
    for manifest in old.rglob("MANIFEST.json"):
        known = json.loads(manifest.read_text())
        settings = json.loads(known["identity"]["settings"])
        known["identity"]["settings"] = json.dumps({k: v for k, v in settings.items() if "few_row_kernel" not in k})
        manifest.write_text(json.dumps(known))
    for out, kept in ((new, {"float32": [1, 2]}), (old, {})):
        machine("avx2", rates=slow | ({} if out is new else KERNEL))
        said: list[str] = []
        run(text, out, log=said.append)
        assert read_config(out)["few_row_kernel"] == kept
        assert any(line.startswith("products of few rows in C++") for line in said) == bool(kept)
        assert {name: (rows.start, rows.stop) for name, rows in KERNEL_ROWS.items()} == (
            {torch.float32: (1, 2)} if kept and native.is_loaded() else {}
        )


def test_a_run_that_is_not_compiled_goes_on_so_where_another_would_be(text, tmp_path, machine, monkeypatch):
    """False equals 0, which means undecided for threads."""
    machine("avx512_bf16", compiler={"path": "/usr/bin/g++", "problem": "", "seconds": 1})
    values = ("auto", 0, False, True, {}, 2)
    assert [is_undecided(value) for value in values] == [True, True, False, False, False, False]
    run(text, tmp_path / "run", "compile=auto", callbacks=(CtrlC(4),))
    monkeypatch.setattr("llm_quest.machine.choices.COMPILE_SECONDS", -1.0)  # now any run would repay it
    said: list[str] = []
    run(text, tmp_path / "run", "compile=auto", log=said.append)
    assert "compiled: no (as when this run began)" in said
    assert read_config(tmp_path / "run")["compile"] is False


def test_a_new_run_has_the_choices_of_its_own_machine(text, tmp_path, machine):
    machine("avx2")
    run(text, tmp_path / "run", "precision=auto", "max_steps=2")
    written = read_config(tmp_path / "run")
    assert (written["precision"], written["muon_form"], written["compile"]) == ("fp32", "eigenvalues", False)
    assert "auto" not in {written[key] for key in ("precision", "muon_form", "compile")}
    assert written["threads"] == torch.get_num_threads()


def test_a_compiled_run_goes_on_without_a_compiler_and_says_so(text, tmp_path, machine):
    out = tmp_path / "run"
    run(text, out, callbacks=(CtrlC(4),))
    (out / "config.yaml").write_text(yaml.safe_dump(read_config(out) | {"compile": True}))
    machine("avx2", compiler={"path": None, "problem": "no C++ compiler was found (install g++)", "seconds": 0})
    said: list[str] = []
    assert run(text, out, log=said.append).status == "finished"
    (line,) = [line for line in said if line.startswith("compiled: ")]
    assert line.startswith("compiled: no (as when this run began, but no C++ compiler was found")
    assert "last bits" in line


@pytest.mark.parametrize(("works", "value"), [(True, True), (False, False)])
def test_a_long_run_is_compiled_where_a_compiler_works(machine, works, value):
    problem = "" if works else "/usr/bin/g++ fails on five lines (cmath: no such file)"
    machine("avx512_bf16", compiler={"path": "/usr/bin/g++", "problem": problem, "seconds": 1})
    found, said = make_choices("compile=auto", flops=1e18)
    assert found["compile"] is value
    assert ("compiling takes 60 s" if works else "cmath: no such file") in said["compiled"]
    assert make_choices("compile=auto", flops=None)[0]["compile"] is False, "only where a recipe counts its FLOPs"


def test_bfloat16_where_it_is_slow_is_done_and_said_before_the_run(machine):
    machine("avx2")
    found, said = make_choices("precision=bf16")
    assert found["precision"] == "bf16"
    assert "34 times as long" in said["precision"]
    machine("avx512_bf16")
    assert make_choices("precision=bf16")[1]["precision"] == "bf16 (asked for)"


def test_what_is_asked_for_is_not_decided(machine):
    machine("avx2")
    pairs = ("precision=bfloat16", "muon_form=bfloat16", "few_row_products={bfloat16: [1, 9]}", "optim=muon")
    found, said = make_choices(*pairs)
    assert (found["precision"], found["muon_form"], found["few_row_products"]) == (
        "bf16", "bfloat16", {"bfloat16": (1, 9)}
    )  # fmt: skip
    assert said["Muon's iterations"] == "bfloat16 (asked for)"
    assert said["products of few rows in the other order"] == "bfloat16 1 to 8 (asked for)"


@pytest.mark.parametrize(
    ("optim", "flops", "kernels", "measures"),
    [
        ("muon", 1e18, "false", True),
        ("muon", 1e12, "false", False),
        ("muon", 1e12, "true", True),
        ("adamw", 1e18, "true", False),
    ],
)
def test_a_run_with_muon_measures_its_kernel_if_it_is_long_or_builds_operators_anyway(
    machine, monkeypatch, optim, flops, kernels, measures
):
    machine("avx512_bf16")
    asked = []

    def load_muon_rates(log):
        asked.append(log)
        profile = load_profile()
        return replace(profile, rates={**profile.rates, "muon/kernel_bfloat16": 1e4})

    monkeypatch.setattr(auto, "load_muon_rates", load_muon_rates)
    monkeypatch.setattr(auto, "missing_kernel", lambda *machine: "")
    found, said = make_choices(f"optim={optim}", f"training_kernels={kernels}", flops=flops)
    assert bool(asked) == measures
    assert found["muon_form"] == ("kernel_bfloat16" if measures else "bfloat16")
    assert ("kernel_bfloat16 0.4 ms" in said.get("Muon's iterations", "")) == measures


def test_a_resumed_run_keeps_muons_kernel_and_says_where_it_cannot_be_had(machine, monkeypatch):
    machine("avx2")
    monkeypatch.setattr(auto, "missing_kernel", lambda device, dtype: "no g++")
    for optim, line in (
        ("muon", "kernel_float32 (as when this run began; by its plain form, whose last bits may differ: no g++)"),
        ("adamw", None),
    ):
        said: list[str] = []
        found = choose_all(config(f"optim={optim}"), {"muon_form": "kernel_float32"}, Machine(CPU, None, said.append))
        assert found["muon_form"] == "kernel_float32"
        assert dict(one.split(": ", 1) for one in said).get("Muon's iterations") == line


def test_more_threads_than_cores_are_said(machine, monkeypatch):
    monkeypatch.setattr("llm_quest.machine.hardware.affinity", lambda: 64)
    monkeypatch.setattr("llm_quest.machine.hardware.cpu_quotas", lambda root: iter([0.5]))
    before = torch.get_num_threads()
    try:
        _, said = make_choices("threads=3")
    finally:
        torch.set_num_threads(before)
    assert said["threads"].startswith("3 (asked for; 3 threads on 1 usable core (a CPU quota of 0.5 of 64 cores)")
    assert "give threads=1" in said["threads"]


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch):
    """Two cores and two threads, whose number is ours to choose, on a machine that other programs keep half busy."""
    for name, value in {
        "usable_cores": 2,
        "affinity": 2,
        "count_busy_cores": 1.0,
        "are_threads_automatic": True,
    }.items():
        monkeypatch.setattr(auto, name, lambda value=value: value)
    monkeypatch.setattr("llm_quest.machine.hardware.affinity", lambda: 2)
    monkeypatch.setattr("llm_quest.machine.hardware.cpu_quotas", lambda root: iter(()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def choose_thread_count(given: int, recorded: dict[str, int]) -> tuple[int, str]:
    said: list[str] = []
    chosen = choose_all(config(f"threads={given}"), recorded, Machine(CPU, None, said.append))
    (line,) = [one for one in said if one.startswith("threads: ")]
    return chosen["threads"], line


def test_a_run_takes_no_core_from_another_program_and_says_so(two_threads, monkeypatch):
    line = "threads: 1 (1 thread on 2 usable cores; other programs keep 1.0 of 2 cores busy)"
    assert choose_thread_count(0, {}) == (1, line)
    torch.set_num_threads(2)
    monkeypatch.setattr(auto, "count_busy_cores", lambda: 0.2)
    assert choose_thread_count(0, {})[0] == 2
    monkeypatch.setattr(auto, "are_threads_automatic", lambda: False)  # OMP_NUM_THREADS
    monkeypatch.setattr(auto, "count_busy_cores", lambda: 2.0)
    assert choose_thread_count(0, {}) == (2, "threads: 2 (2 threads on 2 usable cores)")


def test_a_number_is_kept_where_bits_follow_from_it_and_a_smaller_one_is_advised(two_threads):
    advice = "other programs keep 1.0 of 2 cores busy: threads=1 is faster, and changes last bits"
    assert choose_thread_count(2, {}) == (2, f"threads: 2 (asked for; 2 threads on 2 usable cores; but {advice})")
    kept = choose_thread_count(0, {"threads": 2})
    assert kept == (2, f"threads: 2 (as when this run began; 2 threads on 2 usable cores; but {advice})")
    assert choose_thread_count(0, {"threads": 1})[0] == 1
    on_gpu = Machine(torch.device("cuda"), None, print)
    assert auto.resolve_threads(Resolved(2, auto.KEPT), on_gpu, config()).value == 1, "its bits do not follow from it"


def test_a_compiled_run_keeps_what_compiling_took(machine, monkeypatch):
    machine("avx512_bf16")
    moments = iter([0.0, 31.0, 32.0, 33.0, 34.0])
    monkeypatch.setattr("llm_quest.recipes.auto.time.perf_counter", lambda: next(moments))
    timer = CompileTimer()
    for step in range(1, 5):
        timer.on_step_end(None, step)
    assert load_profile().compile_seconds == 30.0


def steps_of(seconds: list[float], busy: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in a run whose steps take so long, while other programs keep so many cores busy."""
    clock, said = [0.0], list[str]()
    monkeypatch.setattr(auto.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(auto, "read_cpu_seconds", lambda: CpuSeconds(clock[0], 0.0, 0.0))
    monkeypatch.setattr(auto, "count_busy_cores", lambda start: busy if start.at > 0 else 0.0)
    notice = SlowStepNotice(said.append)
    for step, one in enumerate(seconds, 1):
        clock[0] += one
        notice.on_step_end(None, step)
    return said


def test_a_run_whose_cores_are_taken_later_says_so_once(two_threads, monkeypatch):
    usual = [0.3] * 12
    advice = (
        "note: a step takes 15 s and took 0.3 s at first; other programs keep 1.9 of 2 cores busy: stop the run and "
    )
    assert steps_of([9.0, *usual, *[15.0] * 9], 1.9, monkeypatch) == [advice + "resume it with threads=1"]
    assert steps_of([*usual, 15.0, 15.0, 0.3, 15.0, 15.0, 0.3], 1.9, monkeypatch) == [], "evaluations"
    assert steps_of([*usual, *[15.0] * 9], 0.1, monkeypatch) == [], "slow for reasons of its own"
    assert steps_of([*usual, *[1.0] * 9], 1.9, monkeypatch) == [], "not many times as long"


def test_one_process_with_several_threads_is_watched(two_threads, tmp_path):
    context = Context(tmp_path, DistributedContext(), print, read_yaml(GOOD, "my.yaml"))
    assert [type(one) for one in slow_step_notices(context)] == [SlowStepNotice]
    assert not slow_step_notices(replace(context, parallel=DistributedContext(world_size=2)))
    torch.set_num_threads(1)
    assert not slow_step_notices(context)


@pytest.mark.parametrize("recipe", ["sft", "dpo", "kto", "reward", "classify"])
def test_long_fine_tuning_takes_layers_in_cpp_where_its_length_is_known(recipe, machine, monkeypatch, tmp_path):
    machine("avx2")
    monkeypatch.setattr(auto, "set_training_kernels", lambda enabled: "")
    monkeypatch.setattr(native, "is_built", lambda: False)
    rows = [
        {"prompt": f"say {a} {b}", "completion": a, "chosen": f"{a} {b}", "rejected": b, "text": a, "label": a[0] < "g"}
        for a in WORDS for b in WORDS if a != b
    ]  # fmt: skip
    given = [f"model.load={base(tmp_path / 'model')}", f"data.source={write_rows(tmp_path / 'rows.jsonl', rows)}"]

    def choices_of_job(*pairs: str, planning: bool = False) -> tuple[bool, bool]:
        found, config, settings = load_recipe(recipe, [*given, "precision=fp32", "sequence_length=40", *pairs])
        built = found.build(config, replace(planning_context(), settings=settings, planning=planning)).config
        return built.training_kernels, built.compile

    long = 10**9
    assert choices_of_job(f"max_steps={long}") == (True, False)
    assert choices_of_job(f"max_steps={long}", planning=True) == (False, False), "a plan builds nothing"
    assert choices_of_job("num_train_epochs=1e8") == (True, False)
    assert choices_of_job("num_train_epochs=1") == (False, False)
    assert choices_of_job("max_steps=2", "warmup_steps=0") == (False, False)
