"""`quest ablate` on real runs: from the claim to the ledger, killed and resumed, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from llm_quest.cli import ablate
from llm_quest.cli.ledger import list_experiments, show_experiment
from llm_quest.errors import QuestError, UsageError
from llm_quest.eval.evaluators import LossEvaluator
from llm_quest.experiments import measurements, worker
from llm_quest.experiments.arm_tuning import ArmTuning
from llm_quest.experiments.arms import Arm
from llm_quest.experiments.bases import Base
from llm_quest.experiments.code_tree import CodeTree, load_code_tree, own_code
from llm_quest.experiments.confirmation import MAX_CONFIRMATIONS, plan_confirmation
from llm_quest.experiments.experiment import Experiment
from llm_quest.experiments.ledger import Ledger, find_faults
from llm_quest.experiments.measurements import Measurements, OutOfTime, RunProgress, RunRequest, hash_inputs
from llm_quest.experiments.page import write_experiment_page
from llm_quest.experiments.run_costs import (
    FinishedRuns,
    count_runs,
    estimate_arm_seconds,
    estimate_seconds,
    find_finished_runs,
)
from llm_quest.experiments.tuning import MAX_EXTENSIONS
from llm_quest.experiments.verdict_lines import describe_verdict
from llm_quest.experiments.worker import describe_arm, run_arm
from llm_quest.experiments.worker_pool import WorkerPool
from llm_quest.progress import describe_phases, longest_silence, phase
from tests.experiments.bench import SHORT, WIDE, patch_package, plan_of, run_experiment, settings, write_text
from tests.recipes.tuned import base


class DescribesOnce(WorkerPool):
    """Many experiments here have the same arms: an arm of the same code and settings is described once."""

    def __init__(self) -> None:
        super().__init__(1)
        self.described: dict[tuple[str, str], str] = {}

    def ask(self, tree: CodeTree, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] != "describe":
            return super().ask(tree, request)
        key = tree.hash, json.dumps(request, sort_keys=True)
        if key not in self.described:
            self.described[key] = json.dumps(super().ask(tree, request))
        description: dict[str, Any] = json.loads(self.described[key])
        return description


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with DescribesOnce() as made:
        yield made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablations")


@pytest.fixture(scope="module")
def experiment_result(root: Path, text: Path, pool: WorkerPool) -> tuple[dict[str, Any], list[str]]:
    return run_experiment(plan_of(text, root), root, pool)


def test_an_experiment_ends_with_a_verdict(experiment_result: tuple[dict[str, Any], list[str]]):
    result, lines = experiment_result
    assert any("same changes nothing" in note for note in result["notes"]), "tiny's own width, spelled out"
    assert any(line.startswith("2 arms; ") for line in lines), "an arm that is dropped has no runs"
    (verdict,) = result["verdicts"]
    assert verdict["outcome"] in ("better", "worse", "no difference larger than delta", "undecided (cap)")
    assert 4 <= verdict["pairs"] <= 8
    assert verdict["seeds"] == list(range(1, verdict["pairs"] + 1))
    assert set(verdict["secondary"]) == {"eval/loss"}
    assert describe_verdict(verdict)[0].startswith("wide: ")
    assert len([line for line in lines if line.startswith("seed ")]) == verdict["pairs"]
    json.dumps(result, allow_nan=False)


def test_arms_share_weights_and_data_and_spend_alike(experiment_result: tuple[dict[str, Any], list[str]]):
    control, wide = (experiment_result[0]["arms_measured"][name] for name in ("control", "wide"))
    assert control["shared_weights"] == 1.0
    assert 0.3 < wide["shared_weights"] < 1.0
    assert wide["same_data_order"]
    assert wide["steps"] < control["steps"]
    assert wide["flops"] == pytest.approx(control["flops"], rel=0.01)
    assert len(wide["rates"]) == len(control["rates"]) >= 2


def test_the_control_is_repeatable_and_its_noise_is_known(experiment_result: tuple[dict[str, Any], list[str]]):
    noise = experiment_result[0]["noise"]
    assert noise["repeatable"]
    assert noise["nuisance"] == "micro_batch_size=2"
    assert 0 < noise["pair_sd"] < noise["run_sd"]


def test_the_ledger_tells_everything_in_order(experiment_result: tuple[dict[str, Any], list[str]], root: Path):
    rows = Ledger(root / "ledger.jsonl").of(experiment_result[0]["experiment"])
    assert find_faults(rows) == []
    assert rows[0]["kind"] == "claim"
    assert rows[0]["claim"]["delta"] == 0.03
    assert rows[0]["resolved"]["control"]["warmup_steps"] == 3
    assert rows[0]["resolved"]["wide"] == {"model.config.intermediate_size": 160}
    assert rows[0]["derived"]["control"]["eval_steps"]["why"] == "fixed by quest ablate for all arms"
    assert rows[-1]["kind"] == "verdict"
    started, ended = ([row["run"] for row in rows if row["kind"] == kind] for kind in ("started", "run"))
    assert set(started) == set(ended)
    reported = {run for runs in rows[-1]["runs"].values() for run in runs}
    assert reported <= {row["run"] for row in rows if row["kind"] == "run" and row["role"] == "report"}
    shown = show_experiment(root / "ledger.jsonl", rows[0]["experiment"], print).lines()
    heads = [line.partition("  finished  ")[0] for line in shown if "  finished  " in line]
    assert len(heads) == len(set(heads)) == len(ended), "what a run is, without what it measured"
    tuned = {row["seed"] for row in rows if row["kind"] == "run" and row["role"] == "tune"}
    assert not tuned & set(rows[-1]["seeds"])


def test_the_page_shows_curves_and_differences(
    experiment_result: tuple[dict[str, Any], list[str]], root: Path, tmp_path: Path
):
    write_experiment_page(experiment_result[0], root, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "Does a wider feed-forward network help" in page


def test_the_same_command_again_runs_nothing(
    experiment_result: tuple[dict[str, Any], list[str]],
    root: Path,
    text: Path,
    pool: WorkerPool,
    monkeypatch: pytest.MonkeyPatch,
):
    """Another command line of the same experiment goes on with it as well."""
    before = (root / "ledger.jsonl").read_bytes()
    monkeypatch.setattr(Measurements, "run_message", lambda *given: pytest.fail("a run was repeated"))
    other = replace(plan_of(text, root), command="quest ablate --another line")
    result, lines = run_experiment(other, root, pool)
    assert result == experiment_result[0]
    assert (root / "ledger.jsonl").read_bytes() == before
    assert any(line.startswith("estimate: ") and " 0 s to " in line for line in lines), lines


def test_runs_that_are_there_already_are_not_in_the_estimate(
    experiment_result: tuple[dict[str, Any], list[str]], root: Path, text: Path, pool: WorkerPool
):
    plan, ledger = plan_of(text, root), Ledger(root / "ledger.jsonl")
    experiment = Experiment(plan, root, pool, ledger, print)
    experiment.prepare()
    least = count_runs(len(experiment.arms), plan.rates, plan.tuning_seeds, plan.aa_pairs, plan.claim.cap).least
    runs = {row["run"]: row["role"] for row in ledger.of(plan.experiment) if row["kind"] == "run"}
    finished = experiment.finished
    assert finished.certain.total() == least
    assert finished.certain.total() + finished.possible.total() == len(runs)
    removed = root / "runs" / next(run for run, role in runs.items() if role == "tune") / "record.json"
    kept = removed.read_bytes()
    removed.unlink()
    try:
        without = find_finished_runs(experiment)
    finally:
        removed.write_bytes(kept)
    assert without.certain.total() == plan.rates * plan.tuning_seeds * len(experiment.arms) - 1
    assert not without.possible, "rates and pairs are not known"


def test_killed_and_resumed_it_ends_with_the_same_bytes(
    experiment_result: tuple[dict[str, Any], list[str]], root: Path, text: Path, pool: WorkerPool, tmp_path: Path
):
    """The process is killed after three runs, and its ledger loses the end of a row. (Nothing is learned in so few
    steps: the arm is void, because a comparison of such runs says nothing.)"""
    command = [sys.executable, "-m", "tests.experiments.bench", str(tmp_path), str(text), "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-40])
    assert len(list(tmp_path.glob("runs/*/record.json"))) in (3, 4)
    result, lines = run_experiment(plan_of(text, tmp_path, **SHORT), tmp_path, pool)
    whole, _ = run_experiment(plan_of(text, root, **SHORT), root, pool)
    assert result["command"] == f"quest {tmp_path} {text} 3", "of the process that began it"
    assert json.dumps(result) == json.dumps({**whole, "command": result["command"]})
    assert [row["kind"] for row in Ledger(ledger).rows()].count("claim") == 1
    (verdict,) = result["verdicts"]
    assert (verdict["outcome"], verdict["pairs"]) == ("invalid", 4)
    assert "token frequencies" in verdict["reason"]
    assert any("not a whole row" in line for line in lines)
    assert find_faults(Ledger(ledger).rows()) == []


def test_arms_begin_from_the_base_of_their_seed_and_go_on_where_time_ran_out(
    text: Path, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {**SHORT, "arms": ("muon=optim=muon",), "metrics": ("eval/bits_per_byte",), "delta": 1e-9, "steps": 4}
    plan = plan_of(text, tmp_path, **options)
    base = Base("start", plan.recipe, plan.pairs)
    loaded = ("model=null", "model.load=<start>", "tokenizer=null", "tokenizer.load=<start>")
    plan = replace(plan, pairs=(*plan.pairs, *loaded), bases=(base,))

    def rows_of_starts(role: str) -> list[dict[str, Any]]:
        rows = Ledger(tmp_path / "ledger.jsonl").rows()
        return [row for row in rows if row["kind"] == "started" and row["role"] == role]

    monkeypatch.setattr(measurements.time, "monotonic", lambda: 1.0 if len(rows_of_starts("report")) < 8 else 3.0)
    with pytest.raises(OutOfTime):
        run_experiment(plan, tmp_path, pool, deadline=0.0)
    result, _ = run_experiment(plan, tmp_path, pool, deadline=2.0)
    (verdict,) = result["verdicts"]
    assert (verdict["outcome"], verdict["pairs"]) == ("undecided (time)", 4)
    assert [row["seed"] for row in rows_of_starts("base")] == [1, 2, 3, 4], "one for each seed, shared by the arms"
    starts = {row["run"]: row["seed"] for row in rows_of_starts("base")}
    for row in rows_of_starts("report"):
        (start,) = {Path(pair.partition("=")[2]).name for pair in row["settings"] if pair.startswith("model.load=")}
        assert starts[start] == row["seed"]
    assert run_experiment(plan, tmp_path, pool, deadline=0.0)[0] == result, "what is there is used after the time too"


def test_a_run_has_another_name_where_a_file_that_its_arm_reads_has_changed(text: Path, tmp_path: Path):
    """A record of another model, or of another reward function, is not taken for it."""
    model = base(tmp_path / "model")
    loaded = ("model=null", f"model.load={model}", "tokenizer=null", f"tokenizer.load={model}")
    plan = plan_of(text, tmp_path, **SHORT)
    held = Measurements(plan.recipe, tmp_path, None, None, "", "of the control")  # type: ignore[arg-type]

    def name_of_run() -> str:
        about = describe_arm({"recipe": plan.recipe, "pairs": [*plan.pairs, *loaded]})
        return held.fingerprint(
            RunRequest("arm", (*plan.pairs, *loaded), 1, own_code(), "report", data=hash_inputs(about))
        )

    before = name_of_run()
    assert name_of_run() == before
    ends = model / "generation_config.json"
    ends.write_text(ends.read_text().replace("{", '{"temperature": 0.5,', 1))
    assert name_of_run() != before


def test_what_the_model_and_the_data_change_of_the_settings_is_said(text: Path, pool: WorkerPool, tmp_path: Path):
    """A context that is shorter than the recipe's rows shortens them, and a budget the warm-up of a dearer arm."""
    pairs = [pair for pair in settings(text, 37) if not pair.startswith("sequence_length")]
    options = ablate.AblateOptions(arms=(WIDE,), aa_pairs=0, rates=1)
    plan = ablate.make_plan("tiny", [*pairs, "model.config.max_position_embeddings=16"], options, tmp_path, print)
    experiment = Experiment(plan, tmp_path, pool, Ledger(tmp_path / "ledger.jsonl"), print)
    experiment.prepare()
    length = experiment.derived["control"]["sequence_length"]
    assert length["value"] == 16 < length["recipe"]
    assert any(note.startswith("control: sequence_length is 16, not ") for note in experiment.notes)
    steps = experiment.derived["wide"]["max_steps"]
    assert steps["value"] < steps["recipe"] == 37
    assert f"wide: max_steps is {steps['value']}, not 37 (equal flops)" in experiment.notes


def test_of_two_experiments_that_want_one_run_the_second_waits_for_its_record(tmp_path: Path):
    """It does not take what the first one has there, without a checkpoint yet, for what a killed process left."""
    folder, found = tmp_path / "runs" / "abc", list[dict[str, Any]]()
    with FileLock(tmp_path / "runs" / ".abc.lock"):
        folder.mkdir()
        (folder / "config.yaml").write_text("of the first")
        waits = threading.Thread(target=lambda: found.append(run_arm({"folder": str(folder)})), daemon=True)
        waits.start()
        waits.join(0.5)
        assert (found, (folder / "config.yaml").is_file()) == ([], True)
        (folder / "record.json").write_text('{"status": "finished"}')
    waits.join(60)
    assert found == [{"status": "finished"}]


def test_an_arm_may_be_another_measure_of_the_controls_run(text: Path, pool: WorkerPool, tmp_path: Path):
    """Such an arm trains nothing, and its differences are those of the two numbers."""
    plan = plan_of(text, tmp_path, **{**SHORT, "arms": ("muon=optim=muon",), "delta": 1e-9, "steps": 4})
    plan = replace(plan, arms=(Arm("perplexity", (), own_code(), "eval/perplexity"),), secondary=("eval/loss",))
    result, _ = run_experiment(plan, tmp_path, pool)
    (verdict,), values = result["verdicts"], result["arms_measured"]["perplexity"]["values"]
    assert verdict["runs"]["perplexity"] == verdict["runs"]["control"]
    losses = result["arms_measured"]["control"]["values"]
    assert values == pytest.approx([math.exp(loss) for loss in losses])
    assert verdict["differences"] == pytest.approx([math.exp(loss) - loss for loss in losses])
    assert verdict["secondary"]["eval/loss"]["mean"] == 0.0
    assert result["arms"]["perplexity"]["metric"] == "eval/perplexity"
    plan = replace(plan, claim=replace(plan.claim, scale="log"))
    check_logarithms(Experiment(plan, tmp_path, pool, Ledger(tmp_path / "ledger.jsonl", [].append), [].append))


def check_logarithms(experiment: Experiment) -> None:
    """On the scale of logarithms pairs and tuning compare ratios; the values and secondary metrics stay as they are."""
    result = experiment.run()
    (verdict,), losses = result["verdicts"], result["arms_measured"]["control"]["values"]
    assert verdict["differences"] == pytest.approx([loss - math.log(loss) for loss in losses])
    assert verdict["metric"] == "log eval/loss"
    assert result["arms_measured"]["perplexity"]["values"] == pytest.approx([math.exp(loss) for loss in losses])
    assert verdict["secondary"]["eval/loss"]["mean"] == 0.0
    assert ArmTuning(experiment).loss(experiment.reported["control"][0][1], "control") == pytest.approx(
        math.log(losses[0])
    )


def test_a_metric_that_no_arm_reports_is_named_with_those_that_are(
    experiment_result: tuple[dict[str, Any], list[str]], root: Path, text: Path, pool: WorkerPool
):
    with pytest.raises(UsageError, match=r"eval/accuracy: control reports no such number; it has .*eval/loss"):
        run_experiment(plan_of(text, root, metrics=("eval/accuracy",)), root, pool)


def test_an_edit_of_the_package_runs_from_a_copy(root: Path, text: Path, tmp_path: Path, pool: WorkerPool):
    """A patch that changes the first values; the control keeps this package's."""
    layers = "layers: Any = model.config"
    patch = patch_package(tmp_path / "edit.patch", "layers/initialize.py", layers, layers.replace("model", "4 * model"))
    plan = plan_of(text, root, arms=(), code=(patch,))
    (arm,) = plan.arms
    request = {"do": "describe", "recipe": "tiny", "pairs": [*settings(text), "seed_per_module=true"]}
    own, edited = (pool.submit(tree, request).result() for tree in (own_code(), arm.code))
    changed = {name for name in own["weights"] if own["weights"][name] != edited["weights"][name]}
    assert changed
    assert all(name.endswith(("out.weight", "down.weight")) for name in changed)
    assert own["order"] == edited["order"]


def test_what_was_found_on_the_dev_half_is_asked_once_more_on_the_test_half(
    text: Path, pool: WorkerPool, tmp_path: Path
):
    options = {
        **SHORT,
        "arms": ("fast=learning_rate=8e-3", "slow=learning_rate=1e-4"),
        "metrics": ("eval/bits_per_byte",),
    }
    plan = plan_of(text, tmp_path, **options, delta=0.2)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(UsageError, match=rf"0 experiments of .* are called {plan.experiment}; the newest are: none"):
        plan_confirmation(ledger, plan.experiment, (), tmp_path / "code", "")
    result, _ = run_experiment(plan, tmp_path, pool)
    assert [verdict["outcome"] for verdict in result["verdicts"]] == ["better", "worse"]
    asked = plan_confirmation(ledger, plan.experiment, (), tmp_path / "code", "")
    assert [arm.name for arm in asked.arms] == ["fast", "slow"], "every verdict that was decided"
    assert "data.eval_part=dev" in plan.pairs
    assert "data.eval_part=test" in asked.pairs
    assert (asked.first_seed, asked.rates, asked.claim) == (401, 1, plan.claim)
    assert asked.arms[0].pairs[-1] == "learning_rate=0.008"
    assert [row["kind"] for row in ledger.of(plan.experiment)][-1] == "confirmation", "before its first run"
    found, _ = run_experiment(asked, tmp_path, pool)
    assert [(one["outcome"], one["seeds"][0]) for one in found["verdicts"]] == [("better", 401), ("worse", 401)]
    assert found["confirmed"]["slow"] == {"before": "worse", "again": "worse", "same": True}
    assert f"fast: the same verdict again: better in {plan.experiment}, better here" in found["notes"]
    assert "an effect that is not there is declared in at most 5 %" in found["notes"][-1]
    again = plan_confirmation(ledger, plan.experiment[:-2], (), tmp_path / "code", "")
    assert again.experiment == asked.experiment, "once: the same seeds, whose runs are there"
    assert find_faults(ledger.rows()) == []
    with pytest.raises(UsageError, match="scored on all held-out data"):
        plan_confirmation(ledger, asked.experiment, (), tmp_path / "code", "")
    shown = list_experiments(tmp_path / "ledger.jsonl", lambda line: None).lines()
    assert any(f"asked once more on the test half, seeds from 401: {asked.experiment}" in line for line in shown)


def test_the_test_half_is_not_opened_without_end(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    arms = {"control": {"settings": [], "code": own_code().hash}, "x": {"settings": [], "code": own_code().hash}}
    claim = {"question": "", "recipe": "tiny", "settings": ["data.eval_part=dev"], "arms": arms, "claim": {
        "metric": "eval/loss", "delta": 0.1, "cap": 8, "greater_is_better": False, "normal": True}, "budget": "steps",
        "secondary": []}  # fmt: skip
    names = [f"tiny-{number}" for number in range(MAX_CONFIRMATIONS + 1)]
    for name in names:
        ledger.append("claim", name, claim)
        ledger.append("verdict", name, {"arm": "x", "outcome": "better", "learning_rates": {"control": 1.0, "x": 1.0}})
    seeds = [plan_confirmation(ledger, name, (), tmp_path, "").first_seed for name in names[:-1]]
    assert seeds == list(range(401, 401 + 100 * MAX_CONFIRMATIONS, 100)), "nobody has seen them"
    assert plan_confirmation(ledger, names[0], (), tmp_path, "").first_seed == 401
    with pytest.raises(UsageError, match="was opened 20 times"):
        plan_confirmation(ledger, names[-1], (), tmp_path, "")
    ledger.append("claim", "moved", {**claim, "arms": {**arms, "control": {"settings": [], "code": "other"}}})
    ledger.append("verdict", "moved", {"arm": "x", "outcome": "better"})
    with pytest.raises(UsageError, match="the package has changed"):
        plan_confirmation(ledger, "moved", (), tmp_path, "")
    ledger.append("claim", "none", claim)
    ledger.append("verdict", "none", {"arm": "x", "outcome": "undecided (cap)"})
    with pytest.raises(UsageError, match=r"no arm of it is decided \(x: undecided \(cap\)\)"):
        plan_confirmation(ledger, "none", (), tmp_path, "")


def test_the_same_question_of_other_seeds_is_a_repetition_and_linked_both_ways(
    text: Path, pool: WorkerPool, tmp_path: Path
):
    ledger, found = Ledger(tmp_path / "ledger.jsonl"), []
    for options in ({}, {"first_seed": 401, "question": "Again?"}, {"delta": 0.2}):
        found.append(Experiment(plan_of(text, tmp_path, **{**SHORT, **options}), tmp_path, pool, ledger, print))
        found[-1].write_claim()
    first, again, other = (one.plan.experiment for one in found)
    assert [any("repetition" in note for note in one.notes) for one in found] == [False, True, False]
    assert f"a repetition of {first} with other seeds" in found[1].notes[-1]
    assert f"quest ablate --confirm {first} does" in found[1].notes[-1]
    assert [row["by"] for row in ledger.of(first) if row["kind"] == "repetition"] == [again]
    assert not [row for name in (again, other) for row in ledger.of(name) if row["kind"] == "repetition"]


def test_a_dry_run_shows_settings_and_cost_and_writes_nothing(
    text: Path, pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ablate, "WorkerPool", lambda jobs: nullcontext(pool))
    options = ablate.AblateOptions(arms=("none=warmup_steps=0",), cap=8)
    pairs = [pair for pair in settings(text) if not pair.startswith("warmup")]
    found = ablate.preview_ablation("tiny", pairs, options, out=tmp_path / "out", log=print)
    shown = found.as_json()
    assert shown["runs"]["most"] == 47
    assert 0 < shown["run_seconds"] < shown["seconds"][0] < shown["seconds"][1]
    assert shown["derived"]["control"]["warmup_steps"]["value"] == shown["resolved"]["control"]["warmup_steps"]
    assert shown["resolved"]["none"] == {"warmup_steps": 0}
    assert any("warmup_steps is" in line for line in shown["messages"])
    assert any(line.startswith("estimate: ") for line in shown["messages"])
    assert list(tmp_path.iterdir()) == []
    json.dumps(shown, allow_nan=False)


def test_the_estimate_counts_every_evaluation_of_a_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A clock that stands still but in evaluations: two seconds between steps, seven after the last one."""
    pairs = [*settings(text, 8), "seed=1", "eval_steps=3"]
    now, steps, evaluate = [0.0], list[int](), LossEvaluator.evaluate

    def slow(self: LossEvaluator, model: Any, step: int) -> Any:
        steps.append(step)
        now[0] += 7.0 if step == 8 else 2.0
        return evaluate(self, model, step)

    monkeypatch.setattr(LossEvaluator, "evaluate", slow)
    assert run_arm({"recipe": "tiny", "pairs": pairs, "folder": str(tmp_path / "run")})["status"] == "finished"
    assert steps == [3, 6, 8]
    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0] / 4)
    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(worker, "time_call", lambda run, device: -now[0] + (run(), now[0])[1])
    about = describe_arm({"recipe": "tiny", "pairs": pairs, "estimate": True})
    assert about["outside_seconds"] == 2 * 2.0 + 7.0
    assert about["cpu_share"] == 0.25, "a busy machine: seconds by the clock are four times those of the processor"
    assert "outside_seconds" not in describe_arm({"recipe": "tiny", "pairs": pairs})


def test_the_estimate_counts_the_steps_of_every_arm(text: Path, tmp_path: Path):
    """At equal steps a dearer arm takes longer, by its FLOPs; start and evaluation are the control's."""
    plan = plan_of(text, tmp_path, steps=10, arms=(WIDE,), rates=3, tuning_seeds=2, aa_pairs=2, cap=8, budget="steps")
    experiment = Experiment(plan, tmp_path, SimpleNamespace(jobs=2), Ledger(tmp_path / "ledger.jsonl"), print)  # type: ignore[arg-type]
    experiment.arm_pairs = {"control": ("max_steps=10",), "wide": ("max_steps=60", "max_steps=10")}
    control = {"flops_per_step": 1e9, "step_seconds": 0.5, "outside_seconds": 1.0}
    experiment.descriptions = {"control": control, "wide": {"flops_per_step": 3e9}}
    assert [estimate_arm_seconds(experiment, name) for name in experiment.arms] == [6.0, 16.0]
    runs = {"least": 5 * 6 + (6 + 4) * (6 + 16), "most": 5 * 6 + (6 + 2 * MAX_EXTENSIONS + 8) * (6 + 16)}
    assert estimate_seconds(experiment) == (runs["least"] / 2, runs["most"] / 2)
    experiment.finished = FinishedRuns(Counter(control=3, wide=2), Counter(wide=1))
    assert estimate_seconds(experiment) == ((runs["least"] - 3 * 6 - 2 * 16) / 2, (runs["most"] - 3 * 6 - 3 * 16) / 2)
    del control["outside_seconds"]
    assert estimate_seconds(experiment) is None


@pytest.mark.parametrize(("metric", "worst", "told"), [("eval/loss", 5.99, True), ("eval/loss", 5.9, False),
                                                      ("eval/bits_per_byte", 5.99, False)])  # fmt: skip
def test_an_arm_that_no_rate_teaches_is_told_before_its_pairs(
    text: Path, tmp_path: Path, metric: str, worst: float, told: bool, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_of(text, tmp_path, arms=(WIDE,), metrics=(metric,))
    experiment = Experiment(plan, tmp_path, SimpleNamespace(jobs=1), Ledger(tmp_path / "ledger.jsonl"), print)  # type: ignore[arg-type]
    about = {"learning_rate": 0.01, "unigram_loss": 6.0}
    experiment.descriptions = {"control": about, "wide": about}
    experiment.arm_pairs = {"control": (), "wide": ()}

    def try_rates(self: ArmTuning, wanted: Any, what: str = "") -> None:
        for name, rates in wanted.items():
            best = 4.0 if name == "control" else worst
            self.searches[name].losses |= {rate: best + abs(math.log(rate / 0.02)) for rate in rates}

    monkeypatch.setattr(ArmTuning, "try_rates", try_rates)
    experiment.tune()
    notes = [note for note in experiment.notes if "uses its context at none of these rates" in note]
    assert [note.partition(" ")[0] for note in notes] == ["wide"] * told


def test_pairs_are_shown_as_they_end_and_records_that_are_used_again_are_counted(
    experiment_result: tuple[dict[str, Any], list[str]], root: Path, text: Path, pool: WorkerPool
):
    lines = experiment_result[1]
    first = lines.index(next(line for line in lines if line.startswith("seed ")))
    assert len([line for line in lines[:first] if line.startswith("runs of pairs ")]) < 8, (
        "not after all of the first four"
    )
    assert any(
        re.match(r"runs of pairs 1 of 8: control, seed 1: finished, eval/\w+ [\d.]+, [\d.]+ s, ETA", one)
        for one in lines
    )
    again = run_experiment(plan_of(text, root), root, pool)[1]
    assert "runs of pairs: 8 of 8 runs are there already and are used again" in again


def test_a_run_is_shown_with_its_step(tmp_path: Path):
    folder = tmp_path / "abc"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"ste')
    request = RunRequest("wide", ("max_steps=60",), 3, own_code(), "report")
    with phase("pairs", 2) as now:
        RunProgress({folder: request, tmp_path / "waits": request}, now)
        assert "(wide, seed 3: step 20 of 60)" in describe_phases()
        assert longest_silence() < 10
    assert longest_silence() == 60


def test_a_pool_that_closes_ends_a_process_that_is_still_starting():
    """It does not wait for the run that the process was started for."""
    with WorkerPool(1) as pool:
        future = pool.submit(own_code(), {"do": "describe", "recipe": "tiny", "pairs": []})
        while not future.running():
            time.sleep(0.01)
    assert isinstance(future.exception(), QuestError | ValueError)
    assert all(worker.process.poll() is not None for worker in pool.workers)


def test_no_process_starts_on_code_that_was_edited_since(tmp_path: Path):
    """Its runs would be recorded under the hash of the code before."""
    file = tmp_path / "llm_quest" / "layer.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    tree = load_code_tree(tmp_path)
    tree.require_unchanged()
    file.write_text("a = 2\n")
    with WorkerPool(1) as pool, pytest.raises(UsageError, match="was edited while its runs are measured"):
        pool.submit(tree, {"do": "describe"}).result()
    assert not pool.workers


def test_an_error_of_an_edited_package_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch):
    """Not as a process that ended without a message."""

    def fail(request: dict[str, Any]) -> dict[str, Any]:
        raise TypeError("an edit\nof the package")

    monkeypatch.setitem(worker.ACTIONS, "run", fail)
    told = worker.handle_request({"do": "run"})
    assert told["error"].startswith("TypeError: an edit of the package (")
    assert f"{Path(__file__).name}, line " in told["error"]
