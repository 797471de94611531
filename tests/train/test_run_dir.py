import json
import os

import pytest
import torch

from llm_quest.errors import BusyError, DataError, UsageError
from llm_quest.train.run_dir import RunDir, json_safe
from tests.train.small import Losses, Rule, digest, go, objective


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_bits_of_the_straight_one(tmp_path, optimizer):
    """Dropout draws from the process's generator; what it stood at before the resumption must not matter."""
    with RunDir(tmp_path / "straight") as run:
        straight = go(20, run, optimizer=optimizer)
    for part, steps in enumerate((7, 8, 20)):
        torch.manual_seed(part)
        with RunDir(tmp_path / "parts") as run:
            parts = go(steps, run, optimizer=optimizer, made=objective(seed=part))
    assert digest(parts.checkpoint_path) == digest(straight.checkpoint_path)
    assert [row["loss"] for row in rows(tmp_path / "parts")] == [row["loss"] for row in rows(tmp_path / "straight")]


def test_a_finished_run_resumed_does_nothing(tmp_path):
    for _ in range(2):
        with RunDir(tmp_path / "run") as run:
            result = go(3, run)
    assert (result.step, result.status, result.tokens) == (3, "finished", 0)
    assert result.metrics["step"] == 3


def test_no_step_appears_twice_in_the_metrics_even_after_a_torn_line(tmp_path):
    with RunDir(tmp_path / "run") as run:
        go(6, run)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    with RunDir(tmp_path / "run") as run:
        go(9, run)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 10))


def test_a_run_removes_its_own_halves_and_leaves_what_other_commands_write(tmp_path):
    """`quest export` writes into a folder beside it, `quest report` into a file, while the run is resumed."""
    mine, old, report, export = (
        tmp_path / f".tmp-{name}-12-ab" for name in ("env.json", "positions.json", "report.html", "hf")
    )
    export.mkdir()
    for file in (mine, old, report, export / "model.safetensors"):
        file.write_text("half")
    os.utime(old, (0, 0))
    with RunDir(tmp_path):
        assert set(tmp_path.glob(".tmp-*")) == {report, export}


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path):
    with RunDir(tmp_path / "run") as run:
        end = digest(go(6, run, save_steps=2, save_total_limit=0).checkpoint_path)
    with RunDir(tmp_path / "run", resume=tmp_path / "run/checkpoints/step-00000002") as run:
        assert digest(go(6, run, save_steps=2, save_total_limit=0).checkpoint_path) == end
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 7))
    assert (tmp_path / "run/checkpoints/step-00000006.aside").is_dir()


def test_another_run_can_begin_at_this_one_s_checkpoint(tmp_path):
    with RunDir(tmp_path / "first") as run:
        saved = go(4, run).checkpoint_path
    with RunDir(tmp_path / "second", resume=saved) as run:
        assert go(6, run).step == 6
    with RunDir(tmp_path / "second", resume=saved) as run, pytest.raises(BusyError, match="holds a run already"):
        go(6, run)
    with (
        RunDir(tmp_path / "third", resume=tmp_path / "first") as run,
        pytest.raises(UsageError, match="is no checkpoint"),
    ):
        go(6, run)
    (tmp_path / "first/checkpoints/step-00000004/state.json").write_text("{}")
    with RunDir(tmp_path / "third", resume=saved) as run, pytest.raises(DataError, match="is corrupt"):
        go(6, run)


def test_never_resuming_refuses_a_folder_with_checkpoints(tmp_path):
    with RunDir(tmp_path / "run", resume="never") as run:
        go(2, run)
    with pytest.raises(BusyError, match="holds a run already"), RunDir(tmp_path / "run", resume="never"):
        pass


def test_a_checkpoint_of_another_configuration_is_refused_by_name(tmp_path):
    with RunDir(tmp_path / "run", identity={"config": "a", "tokenizer": "t"}) as run:
        go(2, run)
    other = RunDir(tmp_path / "run", identity={"config": "a", "tokenizer": "u"})
    with other as run, pytest.raises(BusyError, match="belongs to another run: its tokenizer differs"):
        go(4, run)


def test_a_checkpoint_of_another_model_optimizer_or_feed_is_refused(tmp_path):
    with RunDir(tmp_path / "run") as run:
        go(2, run)
        wider = objective()
        wider.model.norm = torch.nn.LayerNorm(16, bias=False)
        with pytest.raises(ValueError, match=r"another model: unexpected norm\.bias"):
            go(4, run, made=wider)
        with pytest.raises(DataError, match="optimizer is AdamW, this run's is Muon"):
            go(4, run, optimizer="muon")
        with pytest.raises(ValueError, match="the bookmark is of seed 0"):
            go(4, run, feed=Rule(seed=1))


def test_what_differs_from_the_saved_place_is_said(tmp_path):
    with RunDir(tmp_path / "run") as run:
        go(2, run)
        before, show = torch.get_num_threads(), Losses()
        torch.set_num_threads(before + 1)
        go(4, run, show=show)
        torch.set_num_threads(before)
    assert any(f"threads was {before} and is {before + 1}" in text for text in show.events)


def test_the_folder_holds_what_the_caller_gave_and_the_lock_goes(tmp_path):
    with RunDir(tmp_path / "run", config="steps: 3\n", env={"torch": "2"}):
        note = json.loads((tmp_path / "run/run.lock").read_text())
        assert note["pid"] == os.getpid()
    assert (tmp_path / "run/config.yaml").read_text() == "steps: 3\n"
    assert json.loads((tmp_path / "run/env.json").read_text()) == {"torch": "2"}
    assert (tmp_path / "run/samples").is_dir()


def test_the_best_checkpoint_stays(tmp_path):
    class Valley:
        name, interval = "eval", 1

        def evaluate(self, model, step):
            return {"loss": abs(step - 3.0)}

    with RunDir(tmp_path / "run") as run:
        go(8, run, save_steps=1, save_total_limit=2, metric_for_best_model="eval/loss", probes=[Valley()])
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000007", "step-00000008"]


@pytest.mark.parametrize(("greater", "kept"), [(False, 3), (True, 1)])
def test_the_best_is_the_lowest_or_the_greatest(tmp_path, greater, kept):
    class Valley:
        name, interval = "eval", 1

        def evaluate(self, model, step):
            return {"loss": abs(step - 3.0)}

    best = {"metric_for_best_model": "eval/loss", "greater_is_better": greater}
    with RunDir(tmp_path / "run") as run:
        go(4, run, save_steps=1, save_total_limit=1, probes=[Valley()], **best)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step-{kept:08d}", "step-00000004"]


def test_a_metric_that_nothing_measures_is_named(tmp_path):
    class Probe:
        name, interval = "eval", 1

        def evaluate(self, model, step):
            return {"loss": 1.0}

    named = r"eval/los is not measured.*eval/loss, .*loss"
    with RunDir(tmp_path / "run") as run, pytest.raises(UsageError, match=named):
        go(4, run, metric_for_best_model="eval/los", probes=[Probe()])
    with RunDir(tmp_path / "bare") as run, pytest.raises(UsageError, match="eval/loss is not measured"):
        go(4, run, metric_for_best_model="eval/loss")


def test_files_in_the_way_and_device_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="a file of that name is in the way"), RunDir(tmp_path / "file"):
        pass
    with pytest.raises(UsageError, match="cannot be a run folder"), RunDir("/dev/null"):
        pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/null")
    with pytest.raises(UsageError, match="not an ordinary file"), RunDir(tmp_path / "run"):
        pass


def test_json_has_no_nan():
    assert json_safe({"a": 1.0, "b": float("nan"), "c": float("-inf")}) == {
        "a": 1.0,
        "b": None,
        "c": None,
        "nonfinite": ["b", "c"],
    }
    assert json_safe({"a": 1}) == {"a": 1}
