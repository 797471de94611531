"""Odd systems around a training run: it finishes all the same, or one message says what to do."""

from __future__ import annotations

import ast
import io
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_quest
from llm_quest.cache_dirs import TemporaryCache
from llm_quest.cli.output import explain_failure, open_streams, print_status
from llm_quest.cli.train import start_training
from llm_quest.errors import QuestWarning, UsageError
from llm_quest.machine.profile import read_profile
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import load_recipe
from tests.faults.__main__ import main as campaign
from tests.faults.failing_files import failing_files
from tests.recipes.tuned import base
from tests.sources import nodes_of

PACKAGE = Path(llm_quest.__file__).parent
RECIPE = """
recipe: pretrain
data: {source: FOLDER/text.jsonl}
tokenizer: {load: FOLDER/base}
model: {family: llama, config: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
  intermediate_size: 32}}
batch_size: 2
sequence_length: 16
max_steps: 2
save_steps: 1
logging_steps: 1
eval_steps: 0
eval_baselines: false
samples: {every_steps: 0}
precision: fp32
compile: false
threads: 1
device: cpu
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file of a run that takes a second."""
    folder = tmp_path_factory.mktemp("odd")
    base(folder / "base", num_hidden_layers=1)
    rows = [{"text": f"say red and blue {number} " * 9} for number in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    return folder / "tiny.yaml"


def train(recipe: Path, out: Path, *pairs: str) -> Any:
    """The run of `quest train`, without its report."""
    found, config, settings = load_recipe(str(recipe), list(pairs))
    return run_recipe(found, config, settings, out, log=print_status)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))


def close_terminal(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nobody reads stderr any more: EPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    patch.setattr(sys, "stderr", os.fdopen(writer, "w"))


def set_ascii(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """LC_ALL=C and PYTHONIOENCODING=ascii."""
    patch.setenv("LC_ALL", "C")
    for name in ("stdout", "stderr"):
        patch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii", "strict"))
    open_streams()


def set_clock_back(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The wall clock goes back an hour each time somebody looks; what lies on the disk is of the year 2100."""
    count = itertools.count()
    patch.setattr(time, "time", lambda: 1.7e9 - 3600 * next(count))
    (folder / "cache").mkdir()
    os.utime(folder / "cache", (4.1e9, 4.1e9))


def remove_temporary_folder(patch: pytest.MonkeyPatch, folder: Path) -> AbstractContextManager[Any]:
    """No space where temporary files go."""
    (folder / "tmp").mkdir()
    patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    from llm_quest.hub.mmap import can_replace_mapped_files

    can_replace_mapped_files.cache_clear()
    return failing_files(folder / "tmp", "ENOSPC", 0)


SURVIVED: dict[str, Callable[[pytest.MonkeyPatch, Path], Any]] = {
    "a closed terminal": close_terminal,
    "ASCII streams": set_ascii,
    "a clock that goes back": set_clock_back,
    "no space for temporary files": remove_temporary_folder,
}


@pytest.mark.parametrize("name", SURVIVED)
def test_a_run_finishes_on_an_odd_system(
    name: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder whose name has spaces, a newline and letters of several alphabets; and it is resumed there."""
    out = tmp_path / "a run\n\x1b[31m é 模型 'x'"
    with monkeypatch.context() as patch, SURVIVED[name](patch, tmp_path) or nullcontext():
        torch.set_num_threads(1)
        assert train(recipe, out).status == "finished"
        assert train(recipe, out, "max_steps=3").status == "finished"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (out / "checkpoints/step-00000003/MANIFEST.json").is_file()


def test_a_run_that_was_killed_before_its_config_was_written_is_begun_again(recipe: Path, tmp_path: Path) -> None:
    """Found by `python -m tests.faults kills --recipe reward`. Anything else in the folder is somebody's."""
    run = tmp_path / "run"
    for name in ("samples", "checkpoints"):
        (run / name).mkdir(parents=True)
    for name in ("run.lock", ".tmp-config.yaml-12-ab"):
        (run / name).touch()
    (run / "samples" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not empty and no run"):
        train(recipe, run)
    (run / "samples" / "mine.txt").unlink()
    assert train(recipe, run, "max_steps=1").status == "finished"
    assert not list(run.glob(".tmp-*"))


def test_a_folders_name_reaches_the_log_as_one_line_without_escape_codes(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a\nb\x1b[31m\u202e"
    start_training(str(recipe), ["max_steps=1"], out=out, log=print_status)
    said = capfd.readouterr().err
    assert not {"\x1b", "\u202e"} & set(said)
    saved = [line for line in said.splitlines() if "saved: checkpoint" in line]
    assert len(saved) == 1
    assert "step-00000001" in saved[0]
    assert (out / "report.html").is_file()


def message_of(call: Callable[[], Any], folder: Path) -> tuple[int, str]:
    """Exit code and message of a command that fails."""
    os.chdir(folder)
    try:
        call()
    except Exception as error:
        code, lines = explain_failure(error)
        assert 1 <= len(lines) <= 4
        return code, "\n".join(lines)
    raise AssertionError("nothing failed")


def test_a_run_folder_that_can_only_be_read_is_one_message_and_such_a_cache_is_none(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TemporaryCache, "warned", False)
    with failing_files(tmp_path / "cache", "EROFS", 0), pytest.warns(QuestWarning, match="LLM_QUEST_CACHE"):
        assert train(recipe, tmp_path / "first").status == "finished"
    with failing_files(tmp_path / "run", "EROFS", 0):
        code, message = message_of(lambda: train(recipe, tmp_path / "run"), tmp_path)
    assert code == 5
    assert str(tmp_path / "run") in message
    assert "name another folder" in message


def test_text_files_are_read_and_written_in_utf8_whatever_the_locale() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        for node in nodes_of(file) if "read_text" in text or "write_text" in text else ():
            match node:
                case ast.Call(func=ast.Attribute(attr="read_text" | "write_text"), keywords=words):
                    assert {word.arg for word in words} & {"encoding", "errors"}, f"{file.name}:{node.lineno}"


def test_a_campaign_has_the_rates_of_a_kept_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A straight run and a killed one that measured their own on a busy machine differed in their last bits."""
    monkeypatch.setenv("LLM_QUEST_MACHINE_PROFILE", "")
    monkeypatch.setattr(sys, "argv", ["python -m tests.faults", "signals", "--help"])
    with pytest.raises(SystemExit):
        campaign()
    assert read_profile(Path(os.environ["LLM_QUEST_MACHINE_PROFILE"])).rates
