"""Files and folders are whole or not there, whoever else writes and whatever lies in the way."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import time
from pathlib import Path

import pytest

import llm_quest
from llm_quest.atomic_dirs import SWEEP_SECONDS, atomic_dir
from llm_quest.errors import UsageError, tolerate_failure
from llm_quest.files import atomic_write_text, parse_digits, read_pointer, update_text
from tests.sources import nodes_of, package_files

PACKAGE = Path(llm_quest.__file__).parent


def writing(target: Path, *, overwrite: bool = False):
    return atomic_dir(target, overwrite=overwrite, replaceable=lambda name: name == "model", required_bytes=10)


@pytest.mark.parametrize("empty_folder_first", [False, True])
def test_of_two_writers_of_a_new_folder_one_wins_and_the_other_is_told(tmp_path: Path, empty_folder_first: bool):
    target = tmp_path / "out"
    if empty_folder_first:
        target.mkdir()
    with contextlib.ExitStack() as stack:
        (stack.enter_context(writing(target)) / "model").write_text("late")
        with writing(target) as early:
            (early / "model").write_text("early")
        with pytest.raises(UsageError, match="was written by another process meanwhile"):
            stack.close()
    assert (target / "model").read_text() == "early"
    assert os.listdir(tmp_path) == ["out"]


def test_of_two_writers_that_may_replace_a_folder_the_last_one_wins(tmp_path: Path):
    for text in ("first", "second"):
        with writing(tmp_path / "out", overwrite=True) as stage:
            (stage / "model").write_text(text)
    assert (tmp_path / "out" / "model").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_writer_left_is_swept_and_what_another_one_writes_is_not(tmp_path: Path):
    old, recent = tmp_path / ".tmp-out-1-abcd", tmp_path / ".tmp-out-2-abcd"
    for folder in (old, recent):
        folder.mkdir()
        (folder / "model").write_text("half")
    os.utime(old, (time.time() - SWEEP_SECONDS - 60,) * 2)
    with writing(tmp_path / "out") as stage:
        (stage / "model").write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [recent.name, "out"]


def test_a_link_in_the_way_is_replaced_and_not_followed(tmp_path: Path):
    (tmp_path / "elsewhere").write_text("precious")
    for write in (atomic_write_text, update_text):
        link = tmp_path / "crash.txt"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "elsewhere")
        write(link, "precious")
        assert not link.is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_file_that_holds_the_text_already_is_not_written(tmp_path: Path):
    file = tmp_path / "tokenizer.json"
    update_text(file, "text")
    before = file.stat()
    update_text(file, "text")
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    update_text(file, "other")
    assert file.read_text() == "other"


def test_a_failure_of_a_side_output_is_logged_and_nothing_else():
    log: list[str] = []
    with tolerate_failure("the report", log.append):
        raise OSError(28, "No space left on device")
    assert log == ["the report could not be written, and is left out: [Errno 28] No space left on device"]
    with pytest.raises(KeyboardInterrupt), tolerate_failure("the report", log.append):
        raise KeyboardInterrupt


WRITES_IN_A_STAGE = {
    "data/tokens.py": "the stage of a token folder",
    "machine/compiler.py": "a temporary folder of its own",
    "cli/output.py": "the null device, and a temporary file with a name of its own",
    "train/run_dir.py": "appends lines to metrics and events, and notes who holds run.lock, after the check for links",
    "cli/jsonl_output.py": "appends lines under its own lock",
    "cli/chat_session.py": "appends a conversation to the file that the user names",
    "hub/mmap.py": "a temporary folder of its own",
    "files.py": "the functions that all others use",
    "hub/gguf.py": "a new file, never an existing one",
    "hub/downloads.py": "appends to a part of a file, which has a name of its own",
    "hub/wllama.py": "the stage of a file in the cache",
    "cli/export_web.py": "the stage of the folder",
    "experiments/ledger.py": "appends rows under its own lock",
    "progress.py": "the null device",
    "tensor_files.py": "a new file, never an existing one",
}


def test_nobody_writes_a_file_in_place():
    """A file that is rewritten in place is half a file when the process is killed, and follows a stranger's link."""
    found = set()
    for file in package_files(PACKAGE):
        for node in nodes_of(file):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            opens = name == "open" and any(set(mode) & set("wax+") and len(mode) <= 3 for mode in modes)
            if opens or (name in ("write_text", "write_bytes") and isinstance(node.func, ast.Attribute)):
                found.add(str(file.relative_to(PACKAGE)))
    assert found <= set(WRITES_IN_A_STAGE), found - set(WRITES_IN_A_STAGE)


def test_digits_are_read_in_one_place():
    """`str.isdigit` takes what `int` refuses ("²"), and digits of other scripts."""
    assert [parse_digits(text) for text in ("12", "007", "", "²", "١", "-1", "1" * 16, " 1")] == [12, 7, *[None] * 6]
    for file in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            loose = re.search(r"\.(isdigit|isdecimal|isnumeric)\(\)", line) and "isascii" not in line
            assert not loose or "int(" not in line, f"{file}:{number}: parse_digits reads it"
            assert not loose or file.name in ("config.py", "verifiers.py", "sentencepiece_model.py"), f"{file}:{number}"


@pytest.mark.parametrize(
    "content", [b"\0x", b"\xff\xfe", b"x" * 9000, b"a\nb", b"", b"\x1b[31m", None], ids=lambda one: repr(one)[:9]
)
def test_a_file_that_names_no_name_is_read_as_none(content: bytes | None, tmp_path: Path):
    """LATEST, BEST and RESULT of a stranger's run; None: a pipe, at which a reader would wait."""
    file = tmp_path / "LATEST"
    os.mkfifo(file) if content is None else file.write_bytes(content)
    assert read_pointer(file) == ""
    file.unlink()
    file.write_text("step-00000003\n")
    assert read_pointer(file) == "step-00000003"
