"""A disk that fails at any call: what was there or what is new is whole, and the run goes on. All calls and all kinds
of failure: `python -m tests.faults files`."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
from functools import cache
from pathlib import Path

import pytest

import llm_quest
from llm_quest.errors import QuestError
from tests.faults.failing_files import KINDS, failing_files
from tests.faults.recipe_files import check_recipe, measure
from tests.faults.training import check_training, count_training_calls
from tests.faults.writers import WRITERS, Writer, check_writer, count_calls
from tests.recipes.every_recipe import prepare
from tests.sources import nodes_of, package_files

PACKAGE = Path(llm_quest.__file__).parent
PRIMITIVES = {
    "write_tensors", "atomic_dir", "atomic_file", "append_lines", "mkdtemp", "mkstemp", "os.rename", "replace_file",
    "update_text", "savefig", "tofile", "write_text", "write_bytes", "write_json", "SummaryWriter", "atomic_model_file",
    "open to write",
}  # fmt: skip
"""What writes otherwise than by the functions of files.py that replace one whole file."""
WITHOUT_A_WRITER = {
    "atomic_dirs.py": "the function that all others use",
    "files.py": "the functions that all others use",
    "layers/native.py": "compiled into a temporary folder and then renamed",
    "cache_dirs.py": "a temporary folder of its own, where the cache cannot be written",
    "machine/compiler.py": "a temporary folder of its own",
    "progress.py": "the null device",
    "hub/mmap.py": "a temporary folder of its own; what fails there means that nothing is mapped",
    "report/plots.py": "drawn in memory",
    "cli/export_web.py": "a stage that atomic_dir renames (tests/cli/test_export_web.py)",
    "hub/downloads.py": "tests/faults/test_downloads.py, at every third call",
    "hub/wllama.py": "a cache; what fails there costs the next download",
    "train/trackers.py": "a tracker that fails is left out (tests/train/test_trackers.py)",
}


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_a_writer_whose_disk_fails_leaves_the_old_or_the_new_content(writer: Writer):
    calls = count_calls(writer)
    for kind, parts in (("ENOSPC", (0.45,) if writer.is_slow else (0.1, 0.8)), ("EIO once", (0.4,))):
        numbers = {round(part * (calls - 1)) for part in parts} if not writer.is_slow or kind == "ENOSPC" else ()
        faults, tried = check_writer(writer, kind, sorted(numbers))
        assert faults == []
        assert tried >= len(numbers) > 0 or writer.is_slow


@cache
def calls_of_package() -> list[tuple[str, ast.Call]]:
    """Every call in the package, with its file."""
    nodes = ((str(file.relative_to(PACKAGE)), node) for file in package_files(PACKAGE) for node in nodes_of(file))
    return [(name, node) for name, node in nodes if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    """The last part of what is called; of `rename`, which much else is called, with its module."""
    match call.func:
        case ast.Attribute(value=ast.Name(id=owner), attr="rename"):
            return f"{owner}.rename"
        case ast.Attribute(attr="open") | ast.Name(id="open") if any(map(is_writing_mode, call.args)):
            return "open to write"
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def is_writing_mode(argument: ast.expr) -> bool:
    """Whether this is the mode of a file that is written."""
    text = argument.value if isinstance(argument, ast.Constant) else ""
    return isinstance(text, str) and 0 < len(text) < 4 and set(text) <= set("wxarb+t") and bool(set(text) & set("wxa"))


def test_every_module_that_writes_is_in_a_writer():
    found = {name for writer in WRITERS for name in writer.modules}
    assert all((PACKAGE / name).is_file() for name in found)
    for name, call in calls_of_package():
        assert name_of(call) not in PRIMITIVES or name in found or name in WITHOUT_A_WRITER, f"{name}:{call.lineno}"


def test_arrays_are_written_by_python():
    """`ndarray.tofile` and `numpy.save` write in C: on a full disk their error has no number and names no file."""
    for name, call in calls_of_package():
        if name_of(call) == "tofile" or (name_of(call) == "save" and ast.unparse(call.func) == "np.save"):
            assert ast.unparse(call.args[0]) == "content", f"{name}:{call.lineno}"


@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS"])
def test_a_training_whose_disk_fails_is_resumed_with_the_straight_runs_bits(kind: str):
    calls = count_training_calls()
    assert check_training(kind, [round(part * (calls - 1)) for part in (0.02, 0.3, 0.55, 0.9)]) == []


@pytest.fixture(scope="module")
def recipe_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    prepare(folder)
    return folder


@pytest.mark.parametrize(("recipe", "kind"), [("sft", "ESTALE"), ("vit", "short"), ("classify", "EIO once")])
def test_a_recipe_whose_disk_fails_is_resumed_with_the_straight_runs_bits(recipe: str, kind: str, recipe_inputs: Path):
    """All recipes in all ways: `python -m tests.faults files recipes`."""
    calls, straight = measure(recipe, recipe_inputs, kind)
    assert check_recipe(recipe, recipe_inputs, kind, [3 * calls // 5], straight) == ([], 1)


def test_the_failing_file_system_fails(tmp_path: Path):
    """At the call it is told, by the error it is told, and half of what a full disk was given is there."""
    for kind in ("ENOSPC", "EROFS"):
        with failing_files(tmp_path, kind, 0), pytest.raises(OSError) as caught:
            (tmp_path / "new").write_text("text")
        assert (caught.value.errno, os.listdir(tmp_path)) == (KINDS[kind].number, [])
    with failing_files(tmp_path, "ENOSPC", 1) as state, pytest.raises(OSError):
        (tmp_path / "new").write_text("text")
    assert ((tmp_path / "new").read_text(), state.failures) == ("te", 3)
    with failing_files(tmp_path, "short", 0) as state:
        (tmp_path / "whole").write_text("text" * 9)
    assert (tmp_path / "whole").read_text() == "text" * 9
    assert state.failures > 3
    with failing_files(tmp_path / "elsewhere", "EIO", 0) as state:
        (tmp_path / "new").write_text("all")
    assert (state.calls, open.__name__) == (0, "open")


def test_a_writer_in_place_is_found(tmp_path: Path):
    """The law fails for a writer that tears what was there, and for one that shows a traceback."""

    def tear(folder: Path, version: int) -> None:
        (folder / "a.json").write_text(json.dumps(["x" * 20000] * version))

    def confuse(folder: Path, version: int) -> None:
        with contextlib.suppress(OSError):
            (folder / "a.json").write_text(f"[{version}]")
            return
        raise RuntimeError("what?")

    def read(folder: Path) -> object:
        return json.loads((folder / "a.json").read_text())

    for write in (tear, confuse):
        assert check_writer(Writer("careless", (), write, read), "ENOSPC", range(9))[0]


def test_messages_of_a_failing_disk_name_the_file_and_the_remedy():
    from llm_quest.cli.output import explain_failure

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG):
        code, lines = explain_failure(OSError(number, os.strerror(number), "runs/a/metrics.jsonl"))
        assert (code, len(lines)) == (5, 1)
        assert lines[0].startswith("quest: runs/a/metrics.jsonl: ")
        assert "; " in lines[0]
    assert issubclass(QuestError, ValueError)
