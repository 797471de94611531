"""Follows README.md as a newcomer: every command of its blocks, in order, in an empty folder, run at a tiny size.

python -m tests.newcomer [--keep FOLDER] [--resume WORDS]

What a command needs and the reader would bring (texts, rows, a folder with a model) is made first, by the commands that
the README names. A command is cut to two steps of training; those in LEFT_OUT are not run, each for its reason. The
first command that fails, or is in no table and needs what is not there, ends it with 1. `make book` runs the commands
of the chapters, `python -m tests.extending` those of book/extending.md, the suite the others as dry runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.test_docs import ROOT, commands_of

LEFT_OUT = {
    r"make ": "CI runs it (test, book); quickstart: tests/cli/test_quickstart.py",
    r"torchrun ": "two processes: tests/recipes/test_one_law.py",
    r"quest push ": "needs the hub: tests/hub",
    r"quest classify openai/": "needs the hub: tests/models/test_clip.py",
    r"quest generate FOLDER --image": "needs a model that sees: tests/cli/test_llava_folder.py",
    r"quest serve ": "runs until it is stopped: tests/serve",
    r"quest (reproduce|ablate|train rpt|train grpo) ?": "minutes: chapter 15, tests/papers, tests/recipes/rpt",
    r"quest ledger list": "shows what quest ablate wrote: tests/experiments/test_ledger.py",
    r"quest (book|learn)$": "tests/test_book.py, tests/test_learn.py",
    r"quest \S+ (RUN|FOLDER|NAME)$": "a command's form, named in a sentence; it stands in a block with its own words",
}
"""Beginning of a command -> why it is not run."""
TRAINED = "max_steps=2 eval_steps=0"
PREPARED = (
    "quest train sft model.load=runs/first max_steps=2 eval_steps=0 samples.every_steps=0 --out runs/answers --quiet",
    "quest export runs/answers FOLDER",
    "quest export runs/answers BIG",
    "quest export runs/first SMALLER",
    "quest train classify model.load=FOLDER max_steps=2 eval_steps=0 --out RUN --quiet",
)
"""What the names in capitals stand for, made after the README's first commands."""


def shorten_run(line: str) -> str:
    """A command as it is typed -> as it is run: training of two steps, answers of a few tokens."""
    if line.startswith("quest train ") and "--help" not in line:
        fresh = "model.config." in line
        line = re.sub(r" (max_steps|num_train_epochs|early_stopping_patience|model\.config\.\w+)=\S+", "", line)
        steps = "max_steps=4" if "runs/mine" in line.split()[2] else TRAINED.replace("eval_steps=0", "eval_steps=1")
        size = " model.config.num_hidden_layers=1 eval_baselines=false" if fresh else ""
        return f"{line} {steps}{size} --quiet" if "model.load=FOLDER" not in line else f"{line} {TRAINED} --quiet"
    line = re.sub(r"--samples 16 --vote 16", "--samples 2 --vote 2 --problems 2", line)
    return f"{line} --tokens 8" if line.startswith("quest generate") else line


def write_readers_files() -> None:
    """Texts, rows and prompts of the reader's own."""
    Path("my_texts").mkdir()
    shutil.copy(ROOT / "docs/files.md", "my_texts/files.txt")
    shutil.copy(ROOT / "docs/rows.md", "my_texts/rows.txt")
    rows = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    Path("prompts.txt").write_text("Once\nThe\n")


def readme_commands() -> list[str]:
    """In order, each once."""
    lines = [shlex.join(one.words) for one in commands_of(ROOT / "README.md")]
    return list(dict.fromkeys(re.sub(r"'([\w.\[\]@=:/-]+)'", r"\1", line) for line in lines))


def reason_to_leave_out(line: str) -> str | None:
    return next((reason for words, reason in LEFT_OUT.items() if re.match(words, line)), None)


def run_command(line: str) -> tuple[int, str]:
    """Its exit status, and what it printed. Chats are left after one question."""
    from typer.testing import CliRunner

    from llm_quest.cli.main import app

    result = CliRunner().invoke(app, shlex.split(line)[1:], input="Hello\n/exit\n")
    return result.exit_code, f"{result.output}\n{result.exception or ''}"


def follow(lines: list[str]) -> int:
    """Runs them; the number of those that ran. SystemExit at the first that fails."""
    count = 0
    for line in lines:
        if (reason := reason_to_leave_out(line)) is not None:
            print(f"not run: {line} ({reason})", flush=True)
            continue
        if line.startswith("quest report"):
            for name in ("a", "b"):
                shutil.copytree("runs/first", f"runs/{name}")
        begun = time.monotonic()
        status, said = run_command(shorten_run(line))
        print(f"{'ok' if status == 0 else 'FAILED'} {time.monotonic() - begun:5.1f} s: {line}", flush=True)
        if status != 0:
            raise SystemExit(f"as it was run: {shorten_run(line)}\n{said[-3000:]}")
        count += 1
        if line.startswith("quest generate runs/first"):
            shutil.copytree("runs/first", "runs/quickstart")  # what `make quickstart` leaves in the reader's folder
            count += follow(list(PREPARED))
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.newcomer", description=__doc__)
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    parser.add_argument("--resume", help="go on in the folder of --keep, at the command that begins with these words")
    options = parser.parse_args()
    lines = readme_commands()
    if options.resume:
        lines = lines[next(at for at, line in enumerate(lines) if line.startswith(options.resume)) :]
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="newcomer-")))
        folder.mkdir(parents=True, exist_ok=options.keep is None or options.resume is not None)
        os.environ |= {"LLM_QUEST_CACHE": str(folder.resolve() / "cache"), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
        stack.enter_context(contextlib.chdir(folder))
        if not options.resume:
            write_readers_files()
        print(f"{follow(lines)} commands ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
