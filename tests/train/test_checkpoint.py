import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_quest.errors import BusyError, DataError, ResourceError
from llm_quest.files import file_sha256
from llm_quest.manifest import MANIFEST_FILE, find_fault
from llm_quest.train import checkpoint as files
from llm_quest.train.checkpoint import Checkpoint
from llm_quest.train.guards import NonFiniteGuard
from llm_quest.train.optimizers import make_adamw, make_lr_schedule
from llm_quest.train.rng_state import RNGState
from llm_quest.train.run_dir import RunDir
from llm_quest.train.state import TrainState
from tests.train.small import Rule, digest, go, objective


def make_checkpoint(step: int, size: int = 100) -> Checkpoint:
    tensors = {"model": {"w": torch.full((size,), float(step))}, "optimizer": {"w|exp_avg": torch.zeros(size)}}
    return Checkpoint(step, {**tensors, "progress": {"step": step}})


def names(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_written_is_read_and_latest_names_it(tmp_path):
    folder = files.save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1000))
    assert folder.name == "step-00001000"
    assert (tmp_path / "LATEST").read_text() == "step-00001000\n"
    assert find_fault(folder) == ""
    back = files.load_checkpoint(folder)
    assert torch.equal(back.state_dict["model"]["w"], make_checkpoint(1000).state_dict["model"]["w"])
    assert (back.step, back.state_dict["progress"]) == (1000, {"step": 1000})


def test_files_have_the_modes_of_the_umask_and_no_pickle(tmp_path):
    before = os.umask(0o027)
    try:
        folder = files.save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert names(folder) == ["MANIFEST.json", "model.safetensors", "optim.safetensors", "state.json"]


def test_a_committed_checkpoint_is_never_overwritten(tmp_path):
    files.save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1))
    with pytest.raises(BusyError, match="exists already"):
        files.save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1))


def flip(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: flip(folder / "model.safetensors"), "xxh3_128"),
        (lambda folder: (folder / "optim.safetensors").write_bytes(b"x"), "has 1 bytes"),
        (lambda folder: (folder / "state.json").unlink(), "missing"),
        (lambda folder: (folder / "MANIFEST.json").write_text('{"files":'), "cannot be read"),
        (lambda folder: (folder / "MANIFEST.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "MANIFEST.json").write_text("[]"), "cannot be read"),
    ],
)
def test_a_corrupt_newest_is_renamed_and_the_one_before_it_is_used(tmp_path, harm, words):
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        files.save_checkpoint(root, make_checkpoint(step))
    harm(root / "step-00000002")
    said: list[str] = []
    assert files.latest_checkpoint(root, said.append).name == "step-00000001"
    assert len(said) == 1
    assert words in said[0]
    assert names(root) == ["step-00000001", "step-00000002.corrupt"]


def test_a_manifest_of_an_earlier_version_is_verified_by_its_sha256(tmp_path):
    folder = files.save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1))
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for name, entry in manifest["files"].items():
        del entry["xxh3_128"]
        entry["sha256"] = file_sha256(folder / name)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert find_fault(folder) == ""
    flip(folder / "optim.safetensors")
    assert "sha256" in find_fault(folder)


def test_a_manifest_without_any_hash_is_refused(tmp_path):
    folder = files.save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1))
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace("xxh3_128", "crc"))
    assert "has no size and hash (xxh3_128 or sha256)" in find_fault(folder)


def test_if_all_are_corrupt_the_run_does_not_start_over_however_often_it_is_asked(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        files.save_checkpoint(root, make_checkpoint(step))
        flip(root / f"step-{step:08d}/model.safetensors")
    for _ in range(3):
        with pytest.raises(DataError, match=r"all are corrupt \(step-00000002: .* xxh3_128 .*; step-00000001"):
            files.latest_checkpoint(root, print)
    assert names(root) == ["step-00000001", "step-00000002"]
    for step in (1, 2):
        files.rename_aside(root / f"step-{step:08d}", "corrupt")
    with pytest.raises(DataError, match="all are corrupt"):
        files.latest_checkpoint(root, print)


def test_a_run_that_was_stopped_before_any_checkpoint_keeps_its_rows_aside(tmp_path):
    for _ in range(2):
        with RunDir(tmp_path / "run") as run:
            go(3, run)
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    with RunDir(tmp_path / "run") as run:
        go(2, run)
    lines = {
        name: (tmp_path / "run" / name).read_text().count("\n")
        for name in os.listdir(tmp_path / "run")
        if "metrics" in name
    }
    assert lines == {"metrics.jsonl": 2, "metrics.jsonl.aside": 3, "metrics.jsonl.aside-2": 3}


def test_retention_keeps_the_last_the_multiples_and_the_best(tmp_path):
    root = tmp_path / "checkpoints"
    for step in range(10, 80, 10):
        files.save_checkpoint(root, make_checkpoint(step))
    files.prune_checkpoints(root, files.Retention(2, keep_every=30, keep_steps=(20,)))
    assert [files.checkpoint_step(folder) for folder in files.list_checkpoints(root)] == [20, 30, 60, 70]
    files.prune_checkpoints(root, files.Retention(0))
    assert len(files.list_checkpoints(root)) == 4


@pytest.mark.parametrize(
    ("every", "save_total_limit", "most"), [(1, 1, 3), (1, 2, 4), (3, 1, 3), (7, 1, 2), (50, 1, 2), (50, 2, 2)]
)
def test_a_checkpoint_that_is_known_to_be_well_is_always_there(every: int, save_total_limit: int, most: int):
    """It becomes known seven steps later; however often checkpoints are saved, few are kept for that."""
    there: list[int] = []
    for step in range(every, 300, every):
        there = sorted(files.Retention(save_total_limit, healthy_until=step - 7).select([*there, step]))
        assert len(there) <= most
        for now in range(step, step + every):
            assert min(there) <= max(every, now - 7), (there, now)
            known = [one for one in there if one <= now - 7]
            assert now - 7 < every or known, (there, now)
        assert known == [] or step - known[-1] <= 7 + 2 * max(every, 7)


def test_leftovers_of_killed_processes_are_swept_and_others_are_not(tmp_path):
    root = tmp_path / "checkpoints"
    files.save_checkpoint(root, make_checkpoint(1))
    for name in (".tmp-00000002-1-x", ".trash-step-00000000", "step-00000003.corrupt"):
        (root / name).mkdir()
        (root / name / "model.safetensors").write_bytes(b"half")
    files.remove_partial_checkpoints(root)
    assert names(root) == ["step-00000001", "step-00000003.corrupt"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 500, 500))
    with pytest.raises(ResourceError, match=r"0\.0 MB are missing\)\. Earlier checkpoints are untouched"):
        files.save_checkpoint(tmp_path / "checkpoints", make_checkpoint(1))
    assert names(tmp_path / "checkpoints") == []


FULL_DISK = """
import resource, sys, signal
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from tests.train.test_checkpoint import make_checkpoint
from llm_quest.train import checkpoint as files
from llm_quest.errors import ResourceError
root = Path(sys.argv[1])
files.save_checkpoint(root, make_checkpoint(1))
try:
    files.save_checkpoint(root, make_checkpoint(2, 10**6))
except ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_disk_that_fills_up_while_writing_loses_nothing(tmp_path):
    root = tmp_path / "checkpoints"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(root)], capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert "the disk is full: step-00000002 needs 8.0 MB" in done.stdout
    assert names(root) == ["step-00000001"]
    assert find_fault(root / "step-00000001") == ""
    assert (tmp_path / "LATEST").read_text() == "step-00000001\n"


def test_a_full_disk_stops_the_run_or_not_as_the_settings_say(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunDir(tmp_path / "run") as run:
        go(4, run, save_steps=2)
        monkeypatch.setattr(files, "write_tensors", lambda path, tensors: full(path))
        with pytest.raises(ResourceError, match="No space left on device"):
            go(8, run, save_steps=2)
        assert go(8, run, save_steps=2, on_disk_full="continue").step == 8
        monkeypatch.undo()
        assert names(run.checkpoints) == ["step-00000002", "step-00000004"]
        assert go(10, run).checkpoint_path.endswith("step-00000010")
    events = [json.loads(line)["event"] for line in (run.folder / "events.jsonl").read_text().splitlines()]
    assert events.count("save_failed") == 3


def test_background_and_foreground_saves_write_the_same_bytes(tmp_path):
    ends = []
    for background in (True, False):
        with RunDir(tmp_path / str(background)) as run:
            ends.append(digest(go(6, run, save_steps=2, async_save=background).checkpoint_path))
    assert ends[0] == ends[1]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_checkpoint_of_another_format_is_refused_in_one_line(tmp_path):
    with RunDir(tmp_path / "run") as run:
        manifest = Path(go(4, run).checkpoint_path) / MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with (
        RunDir(tmp_path / "run") as run,
        pytest.raises(DataError, match=r"format 1; this version resumes 2\): it loads for generate") as refused,
    ):
        go(8, run)
    assert "\n" not in str(refused.value)


def state(seed: int, steps: int = 0) -> TrainState:
    """Of the small model after some AdamW steps."""
    model = objective(seed).model
    optimizer = make_adamw(model, lr=3e-2)
    found = TrainState(model, optimizer, Rule(), make_lr_schedule(40), NonFiniteGuard(9, 9), RNGState(seed))
    for _ in range(steps):
        found.set_learning_rate()
        model(torch.zeros(1, 3, dtype=torch.int64)).logsumexp(-1).sum().backward()
        optimizer.step()
        found.progress.step += 1
    return found


def test_a_train_state_is_restored_whole():
    one, other = state(1, steps=3), state(2)
    one.guard.refusal_reason(float("nan"), 1.0, 1.0)
    saved = one.state_dict()
    expected = torch.rand(3)
    other.load_state_dict(saved)
    assert torch.equal(torch.rand(3), expected)
    assert (other.progress, other.guard) == (one.progress, one.guard)
    again = other.state_dict()
    assert all(torch.equal(saved[part][name], t) for part in ("model", "optimizer") for name, t in again[part].items())
    assert {name: again[name] for name in again if name not in ("model", "optimizer", "rng")} == {
        name: saved[name] for name in saved if name not in ("model", "optimizer", "rng")
    }


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES])
def test_an_error_of_the_disk_names_the_checkpoint_and_leaves_the_others(tmp_path, monkeypatch, number: int):
    root = tmp_path / "checkpoints"
    files.save_checkpoint(root, make_checkpoint(1))

    def fail(*given: object) -> None:
        raise OSError(number, os.strerror(number))

    for door in ("write_tensors", "file_entry", "write_text", "fsync_path"):
        with monkeypatch.context() as patched:
            patched.setattr(files, door, fail)
            with pytest.raises(ResourceError, match=r"step-00000002 cannot be written .*Earlier checkpoints are"):
                files.save_checkpoint(root, make_checkpoint(2))
        if door != "fsync_path" or not (root / "step-00000002").exists():
            assert names(root) == ["step-00000001"]
    assert find_fault(root / "step-00000001") == ""


def test_a_run_folder_that_was_deleted_while_it_trained_ends_the_run(tmp_path):
    class Deleted(Rule):
        def batches(self, step):
            if step == 2:
                shutil.rmtree(tmp_path / "run")
            return super().batches(step)

    for logging_steps in (1, 50):
        with RunDir(tmp_path / "run") as run, pytest.raises(DataError, match="was deleted or emptied while"):
            go(4, run, feed=Deleted(), save_steps=3, logging_steps=logging_steps)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_samples_of_a_run_folder_that_was_deleted_end_the_run_with_the_same_words(tmp_path):
    class Samples:
        name, interval = "samples", 2

        def evaluate(self, model, step):
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run" / "samples" / "x.json").write_text("{}", encoding="utf-8")

    with RunDir(tmp_path / "run") as run, pytest.raises(DataError, match="was deleted or emptied while"):
        go(4, run, probes=[Samples()])
