"""`quest` as a process: exit codes, messages of a few lines without a traceback, and what `--json` prints."""

from __future__ import annotations

import ast
import atexit
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_quest.cli import main as cli
from llm_quest.cli.main import app, end_process, main
from llm_quest.cli.output import explain_failure, run_with_exit_code
from llm_quest.errors import BusyError, DataError, GuardStop, MissingError, ResourceError, UsageError
from tests.forked import call_and_print, processes, run_forked

RunQuest = Callable[..., subprocess.CompletedProcess[str]]
TINY = [
    "tokenizer.vocab_size=300",
    "batch_size=2",
    "sequence_length=16",
    "warmup_steps=1",
    "eval_baselines=false",
    "eval_tokens=100",
    "samples.every_steps=0",
    "precision=fp32",
    "save_steps=1",
]


def run_main(folder: Path, *arguments: str) -> None:
    """`quest` as its entry point calls it, in a forked process, for what trains: an interpreter of its own spends six
    seconds on imports."""
    os.chdir(folder)
    os.environ["LLM_QUEST_CACHE"] = str(folder / "cache")
    sys.argv = ["quest", *arguments]
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # as an interpreter begins
    main()


def environment(cwd: Path, **variables: str) -> dict[str, str]:
    home = Path(__file__).parents[2]
    return {
        **os.environ,
        "PYTHONPATH": str(home),
        "LLM_QUEST_CACHE": str(cwd / "cache"),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a finished run in it."""
    folder = tmp_path_factory.mktemp("run_quest")
    text = "\n\n".join(f"Document {n}: " + "the cat sat on the mat and the dog ran after it. " * 8 for n in range(20))
    (folder / "text.txt").write_text(text)
    words = ("train", "tiny", "data.source=text.txt", "max_steps=3", *TINY, "--out", "run", "--json")
    (folder / "outcome.json").write_text("\n".join(run_forked(run_main, folder, *words)))
    return folder


@pytest.fixture
def run_quest(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunQuest:
    """`quest` in this process, in that folder: as the entry point calls it, without the seconds that starting one
    takes."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LLM_QUEST_CACHE", str(place / "cache"))

    def walk(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["quest", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = run_with_exit_code(lambda: app(prog_name="quest"))
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return walk


def failure_message(done: subprocess.CompletedProcess[str], code: int) -> str:
    """What a failure says: one to four lines, no traceback."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("quest: ")]
    assert 1 <= len(lines) <= 4, done.stderr
    return "\n".join(lines)


def test_help_lists_every_command_quickly_and_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "pydantic", "matplotlib", "numpy", "transformers", "yaml")
    code = "import sys; sys.argv = ['quest', '--help']\nfrom llm_quest.cli.main import main\n"
    code += f"try: main()\nexcept SystemExit: print(*(set({heavy}) & sys.modules.keys()), file=sys.stderr)"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == ""
    assert time.monotonic() - began < 5  # half a second on a machine of its own (docs/benchmarks.md)
    for command in [
        "quickstart",
        "train",
        "generate",
        "chat",
        "eval",
        "models",
        "show",
        "diff",
        "plan",
        "inspect",
        "verify",
        "export",
        "report",
        "doctor",
        "data",
    ]:
        assert f"\n  {command} " in done.stdout


def test_a_run_tells_its_outcome_and_leaves_a_report(place: Path) -> None:
    outcome = json.loads((place / "outcome.json").read_text())
    assert (outcome["status"], outcome["step"], outcome["exit_code"]) == ("finished", 3, 0)
    assert (place / "run" / "report.html").read_text().startswith("<!")
    assert json.loads((place / "run" / "plan.json").read_text())["parameters"] == outcome["parameters"]
    assert json.loads((place / "run" / "env.json").read_text())["torch"]


def test_a_run_generates_exports_and_is_loaded_again(run_quest: RunQuest) -> None:
    done = run_quest("export", "run", "exported", "--json")
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(json.loads(done.stdout)["files"])
    from_run = run_quest("generate", "run", "-p", "the cat", "-n", "6", "--temperature", "0", "--json")
    from_export = run_quest("generate", "exported", "-p", "the cat", "-n", "6", "--temperature", "0")
    assert from_run.returncode == from_export.returncode == 0, from_run.stderr + from_export.stderr
    assert from_export.stdout.strip("\n") == ("the cat" + json.loads(from_run.stdout)["text"]).strip("\n")
    assert "Traceback" not in from_export.stderr


def test_a_conversation_without_a_template_says_so(run_quest: RunQuest) -> None:
    done = run_quest("chat", "run", "-n", "3", stdin="the dog\n/reset\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "plain continuation" in done.stderr


def test_eval_sets_the_run_beside_baselines_on_what_it_held_out(place: Path, run_quest: RunQuest) -> None:
    done = run_quest("eval", "run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    held_out = json.loads((place / "outcome.json").read_text())["metrics"]["eval/bits_per_byte"]
    assert any("Kneser-Ney" in name for name in found["baselines"])
    assert found["bits_per_byte"] == held_out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "tiny", "learning_rat=1", "max_steps=x"], 2, "did you mean 'learning_rate'"),
        (["train", "tyni"], 2, "did you mean 'tiny'"),
        (["train", "broken.yaml"], 2, "broken.yaml:3"),
        (["train", "tiny", "data.source=nothing.txt"], 3, "nothing.txt does not exist"),
        (["train", "tiny", "data.source=latin.txt"], 3, "latin.txt:2 is not UTF-8"),
        (["train", "tiny", "data.source=empty.txt"], 3, "empty.txt"),
        (["train", "tiny", "data.source=bad.jsonl"], 3, "bad.jsonl:2: is not JSON"),
        (
            ["train", "tiny", "data.source=text.txt", "max_steps=3", *TINY, "learning_rate=0.3", "--out", "run"],
            7,
            "learning_rate: 0.005 -> 0.3",
        ),
        (
            ["train", "tiny", "data.source=text.txt", "max_steps=3", *TINY, "--out", "run", "--resume", "never"],
            7,
            "holds a run already",
        ),
        (["train", "tiny", "device=cuda:99", "data.source=text.txt"], 6, "device cuda:99 is not there"),
        (["generate", "nowhere/at/all", "-p", "x"], 3, "nowhere/at/all"),
        (["generate", "run", "-p", "the cat " * 300], 2, "context"),
        (["generate", "run", "-p", "x", "--dtype", "int8"], 2, "int8"),
        (["show", "llama3.2-1x"], 2, "did you mean"),
        (["inspect", "text.txt"], 3, "text.txt"),
        (["export", "cache", "there"], 3, "no run folder"),
        (["report", "cache"], 3, "no run folder"),
        (["eval", "nowhere"], 2, "--data"),
        (["data", "builtin:topicz"], 2, "did you mean"),
    ],
)
def test_bad_input_is_told_in_a_few_lines_with_the_exit_code_of_its_kind(
    place: Path, arguments: list[str], code: int, said: str, run_quest: RunQuest
) -> None:
    (place / "broken.yaml").write_text("recipe: pretrain\nsteps: [1\n")
    (place / "latin.txt").write_bytes(b"fine\nZo\xeb\n")
    (place / "empty.txt").write_text("\n")
    (place / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    assert said in failure_message(run_quest(*arguments), code)


def test_an_unknown_command_is_answered_with_the_nearest(run_quest: RunQuest) -> None:
    done = run_quest("trian")
    assert done.returncode == 2
    assert "train" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_tells_a_failure_as_json_too(run_quest: RunQuest) -> None:
    done = run_quest("show", "nothing-like-it", "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode == 2


def test_ctrl_c_saves_and_the_same_command_ends_with_the_same_bits(place: Path) -> None:
    command = ["train", "tiny", "data.source=text.txt", "max_steps=60", *TINY, "save_steps=0", "logging_steps=1"]
    run_forked(run_main, place, *command, "--out", "straight")
    os.mkfifo(place / "stderr")
    files = [str(place / name) for name in ("stdout", "stderr")]
    process = processes.Process(target=call_and_print, args=(*files, run_main, place, *command, "--out", "stopped"))
    process.start()
    with open(place / "stderr") as stderr:
        said = ""
        for line in stderr:
            said += line
            if "step 2/60" in line:
                os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, said
    assert "Traceback" not in said
    assert not (place / "stopped" / "report.html").exists()
    done = run_forked(run_main, place, "train", "stopped", "--json")
    assert json.loads("\n".join(done))["step"] == 60
    assert (place / "stopped" / "report.html").is_file()
    last = "checkpoints/step-00000060/model.safetensors"
    assert (place / "stopped" / last).read_bytes() == (place / "straight" / last).read_bytes()


def end_by_signal(folder: Path) -> None:
    atexit.register((folder / "registered").write_text, "done")
    threading.Thread(target=lambda: (time.sleep(0.1), (folder / "thread").write_text("done"))).start()
    end_process(130)


def test_an_interrupted_command_ends_without_the_interpreters_own_end(tmp_path: Path) -> None:
    """But with its threads and what is registered for the end, such as the removal of temporary caches."""
    process = processes.Process(target=end_by_signal, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 130
    assert sorted(file.name for file in tmp_path.iterdir()) == ["registered", "thread"]


def test_a_dry_run_prints_a_recipe_and_writes_nothing(
    run_quest: RunQuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_quest("train", "tiny", "max_steps=7", "--seed", "3", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "steps: 7\n" in done.stdout
    assert "seed: 3\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a"), 2),
        (DataError("a"), 3),
        (GuardStop("a"), 4),
        (ResourceError("a"), 5),
        (MissingError("a"), 6),
        (BusyError("a"), 7),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (OSError(28, "No space left on device", "x"), 5),
        (FileNotFoundError(2, "none", "x"), 3),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), 5),
    ],
)
def test_every_kind_of_failure_has_its_exit_code_and_at_most_four_lines(error: BaseException, code: int) -> None:
    found, lines = explain_failure(error)
    assert found == code
    assert 1 <= len(lines) <= 4


def test_a_bug_of_ours_leaves_its_traceback_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def raise_by_design() -> None:
        raise ZeroDivisionError("by design")

    assert run_with_exit_code(raise_by_design) == 1
    assert "by design" in (tmp_path / "crash.txt").read_text()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "crash.txt" in said


def test_threads_and_the_network_are_settled_before_a_command_imports_anything() -> None:
    """torch reads OMP_NUM_THREADS once, when it is imported."""
    sources = {inspect.getmodule(command) for command in cli.COMMANDS.values()}
    trees = [ast.parse(inspect.getsource(source)) for source in sources if source is not None]
    commands = [one for tree in trees for one in tree.body if isinstance(one, ast.FunctionDef)]
    late, settled = [], 0
    for command in commands:
        calls = [node.lineno for node in ast.walk(command) if function_of_call(node) == "set_environment"]
        imports = [node.lineno for node in ast.walk(command) if isinstance(node, ast.ImportFrom)]
        settled += bool(calls)
        if calls and imports and min(imports) < min(calls):
            late.append(command.name)
    assert not late
    assert settled > 20


def function_of_call(node: ast.AST) -> str:
    """What is called, if a name is."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
