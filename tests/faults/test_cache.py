"""A cache folder that cannot be written: everything that keeps something there goes on without it, with one warning;
what would lose long work is refused before it begins."""

from __future__ import annotations

import ast
import os
import pwd
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import llm_quest
from llm_quest import cache_dirs
from llm_quest.cache_dirs import TemporaryCache, cache_dir
from llm_quest.cli.chat_session import open_history
from llm_quest.cli.output import show_warnings
from llm_quest.cli.papers import reproduce_paper
from llm_quest.data.tokens import prepare_token_folder
from llm_quest.errors import QuestWarning, ResourceError, UsageError
from llm_quest.hub import wllama
from llm_quest.layers import native
from llm_quest.machine import profile as profiles
from llm_quest.machine.probe import Measurement
from llm_quest.recipes.assembly import train_or_load_tokenizer
from tests.data.test_tokens import PARTS, TOKENIZER
from tests.faults.failing_files import failing_files
from tests.machine import PROFILES
from tests.sources import nodes_of

PACKAGE = Path(llm_quest.__file__).parent
COMPILER = '#!/bin/sh\nfor a; do [ "$before" = -o ] && echo library > "$a"; before=$a; done\n'
FULL_COMPILER = '#!/bin/sh\ncase "$*" in *cache/native*) echo "ld: No space left on device" >&2; exit 1;; esac\n'
Patch = pytest.MonkeyPatch


def be_read_only(folder: Path, patch: Patch) -> AbstractContextManager[Any]:
    folder.mkdir()
    return failing_files(folder, "EROFS", 0)


def be_a_file(folder: Path, patch: Patch) -> AbstractContextManager[Any]:
    folder.write_text("in the way")
    return nullcontext()


def be_below_a_file(folder: Path, patch: Patch) -> AbstractContextManager[Any]:
    be_a_file(folder, patch)
    patch.setenv("LLM_QUEST_CACHE", str(folder / "below"))
    return nullcontext()


def be_below_what_nobody_may_write(folder: Path, patch: Patch) -> AbstractContextManager[Any]:
    patch.setenv("LLM_QUEST_CACHE", "/proc/nobody/cache")
    return nullcontext()


def be_full(folder: Path, patch: Patch) -> AbstractContextManager[Any]:
    return failing_files(folder, "ENOSPC", 0)


def fill_disk(folder: Path, patch: Patch) -> AbstractContextManager[Any]:
    """Folders and a first file can be made."""
    for part in ("tokens", "tokenizers", "machine", "native", "chat", "papers", f"wllama-{wllama.VERSION}"):
        (folder / part).mkdir(parents=True)
    return failing_files(folder, "ENOSPC", 1)


def be_homeless(folder: Path, patch: Patch) -> AbstractContextManager[Any]:
    """HOME is not set, and the user's number is in no file (a container)."""

    def unknown(number: int) -> Any:
        raise KeyError(number)

    for name in ("HOME", "LLM_QUEST_CACHE", "XDG_CACHE_HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)
    return nullcontext()


OBSTACLES: dict[str, Callable[[Path, Patch], AbstractContextManager[Any]]] = {
    "read-only": be_read_only,
    "a file in its place": be_a_file,
    "below a file": be_below_a_file,
    "a full disk": be_full,
    "a disk that becomes full": fill_disk,
    "no home": be_homeless,
}
if Path("/proc/self").exists():  # root may write everywhere else
    OBSTACLES["below what nobody may write"] = be_below_what_nobody_may_write


def use_tokens(patch: Patch) -> None:
    assert prepare_token_folder(PARTS, TOKENIZER).train.num_documents == len(PARTS.train)


def use_tokenizer(patch: Patch) -> None:
    assert train_or_load_tokenizer(PARTS, 264, lambda text: None).vocab_size == 264
    use_tokens(patch)  # a run has both


def use_profile(patch: Patch) -> None:
    rates = profiles.read_profile(PROFILES / "avx2.json").rates
    patch.delenv(profiles.VARIABLE, raising=False)
    patch.setattr(profiles, "_LOADED", {})
    patch.setattr(profiles, "measure_rates", lambda: Measurement(rates, busy=False))
    assert profiles.load_profile().rates == rates
    profiles.record_compile_seconds(40.0)
    assert profiles.load_profile().compile_seconds == 40.0, "in memory"


def use_compiler(patch: Patch) -> None:
    assert native.build_library().read_text() == "library\n"


def use_wllama(patch: Patch) -> None:
    patch.setattr(wllama, "download_package", lambda: {"index.min.js": b"x" * 9000})
    assert wllama.load_wllama()["index.min.js"] == b"x" * 9000


def use_history(patch: Patch) -> None:
    history = open_history(cache_dir("chat") / "history")
    history.append_string("hello")
    assert history.get_strings() == ["hello"]


USERS: dict[str, Callable[[Patch], None]] = {
    "data/tokens.py": use_tokens,
    "recipes/assembly.py": use_tokenizer,
    "machine/profile.py": use_profile,
    "layers/native.py": use_compiler,
    "hub/wllama.py": use_wllama,
    "cli/chat_session.py": use_history,
}
KEEPS_RESULTS = {"cli/papers.py"}
"""Files that refuse a folder which they cannot write: what they measure takes hours."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A cache folder that is not there, and a compiler."""
    monkeypatch.setattr(TemporaryCache, "folder", None)
    monkeypatch.setattr(TemporaryCache, "warned", False)
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    set_compiler(tmp_path, COMPILER, monkeypatch)
    return tmp_path / "cache"


def set_compiler(folder: Path, script: str, patch: Patch) -> None:
    (folder / "compiler").write_text(script)
    (folder / "compiler").chmod(0o755)
    patch.setenv("CXX", str(folder / "compiler"))


def test_every_file_that_uses_the_cache_is_judged_here() -> None:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in nodes_of(file) if "cache_dirs" in text else ():
            if isinstance(node, ast.ImportFrom) and node.module == "llm_quest.cache_dirs":
                found.add(file.relative_to(PACKAGE).as_posix())
    assert found == set(USERS) | KEEPS_RESULTS


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("user", USERS)
def test_without_a_cache_all_goes_on_with_one_warning(
    user: str, obstacle: str, folder: Path, monkeypatch: Patch
) -> None:
    with warnings.catch_warnings(record=True) as told, OBSTACLES[obstacle](folder, monkeypatch):
        warnings.simplefilter("always")
        USERS[user](monkeypatch)
    words = [str(one.message) for one in told if issubclass(one.category, QuestWarning)]
    assert len(words) == 1
    assert "LLM_QUEST_CACHE" in words[0]
    assert obstacle == "no home" or os.environ["LLM_QUEST_CACHE"] in words[0]


@pytest.mark.parametrize("obstacle", [one for one in OBSTACLES if one != "no home"])
def test_what_takes_hours_is_refused_before_it_begins(obstacle: str, folder: Path, monkeypatch: Patch) -> None:
    with (
        OBSTACLES[obstacle](folder, monkeypatch),
        pytest.raises(ResourceError, match=r"results cannot be kept in .*LLM_QUEST_CACHE"),
    ):
        reproduce_paper("yarn", sizes=(), out=None, jobs=1, minutes=0.0, first_seed=1, log=lambda text: None)


def test_without_a_home_folder_results_are_refused(folder: Path, monkeypatch: Patch) -> None:
    be_homeless(folder, monkeypatch)
    with pytest.raises(UsageError, match=r"home folder is not known .*LLM_QUEST_CACHE"):
        reproduce_paper("yarn", sizes=(), out=None, jobs=1, minutes=0.0, first_seed=1, log=lambda text: None)


def test_prepared_tokens_are_read_from_a_cache_that_can_only_be_read(folder: Path, monkeypatch: Patch) -> None:
    kept = prepare_token_folder(PARTS, TOKENIZER).path
    with warnings.catch_warnings(), failing_files(folder, "EROFS", 0):
        warnings.simplefilter("error")
        assert prepare_token_folder(PARTS, TOKENIZER).path == kept
    (kept / "val.bin").write_bytes(b"")
    with pytest.warns(QuestWarning, match="nothing for the next one"), failing_files(folder, "EROFS", 0):
        assert prepare_token_folder(PARTS, TOKENIZER).path != kept, "a damaged folder that cannot be made anew"


def test_where_temporary_files_have_no_room_either_one_message_says_so(
    folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(cache_dirs.tempfile, "tempdir", str(tmp_path))
    with (
        pytest.warns(QuestWarning, match="cannot be written"),
        failing_files(tmp_path, "ENOSPC", 0),
        pytest.raises(ResourceError, match=r"no space left for the tokens in .*name another folder"),
    ):
        prepare_token_folder(PARTS, TOKENIZER)


def test_a_compiler_that_says_that_the_disk_is_full_builds_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    set_compiler(tmp_path, FULL_COMPILER + COMPILER.removeprefix("#!/bin/sh\n"), monkeypatch)
    with pytest.warns(QuestWarning, match="No space left on device"):
        assert not native.build_library().is_relative_to(folder)
    set_compiler(tmp_path, "#!/bin/sh\necho 'error: no such header' >&2; exit 1\n", monkeypatch)
    with pytest.raises(subprocess.CalledProcessError):
        native.build_library()


def test_the_temporary_folder_is_removed_at_the_end_of_its_process_alone() -> None:
    code = (
        "import os, sys; from llm_quest.cache_dirs import temporary_cache_dir; folder = temporary_cache_dir('a');"
        "folder.mkdir(); child = os.fork(); child or sys.exit(0); os.waitpid(child, 0); print(folder, folder.is_dir())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, was_there = done.stdout.split()
    assert was_there == "True"
    assert not Path(name).parent.exists()


def test_commands_show_a_warning_of_ours_as_one_line_of_the_main_process(
    monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    others: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest, **more: others.append(str(message)))
    show_warnings()
    for rank, category in (("0", QuestWarning), ("1", QuestWarning), ("0", UserWarning)):
        monkeypatch.setenv("RANK", rank)
        warnings.showwarning(f"of {rank}", category, "file.py", 1)
    assert capsys.readouterr().err == "warning: of 0\n"
    assert others == ["of 0"]
