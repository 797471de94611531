"""Every command, through its classes of failure: the exit code of the class, one to four lines, the same words on a
terminal and in `--json`, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from llm_quest.cli.main import app
from llm_quest.cli.output import run_with_exit_code
from llm_quest.errors import LONGEST_LINE, MAX_MESSAGE_LINES

USAGE, DATA, DISK, MISSING, BUSY = 2, 3, 5, 6, 7
MODEL = [("NOWHERE", DATA), ("EMPTY", DATA), ("DAMAGED", DATA), ("FILE", DATA), ("RUN", DATA), ("LONG", DATA),
         ("some/model", MISSING)]  # fmt: skip
"""What may be given in place of a model: names in capitals are made by `places`."""
RECIPE = [
    ("nonsense", USAGE),
    ("FILE", USAGE),
    ("EMPTY", USAGE),
    ("sft learning_rate=x", USAGE),
    ("sft no_key=1", USAGE),
]


def cases(places: list[tuple[str, int]], before: str = "", after: str = "") -> list[tuple[str, int]]:
    return [(f"{before} {place} {after}".strip(), code) for place, code in places]


FAILURES: dict[str, list[tuple[str, int]]] = {
    "quickstart": [("--out FILE/x", USAGE), ("--out FILE", USAGE), ("--threads -3", USAGE)],
    "train": [*cases(RECIPE), ("sft model.load=NOWHERE data.source=FILE --out OUT", DATA),
              ("sft --resume NOWHERE", USAGE), ("sft model.load=EMPTY data.source=NOWHERE --out OUT", DATA),
              ("RUN", USAGE)],
    "generate": [*cases(MODEL, after="--prompt x"), ("GGUF --prompt x", DATA), ("EMPTY --tokens -1 --prompt x", USAGE)],
    "chat": cases(MODEL), "serve": [*cases(MODEL), ("EMPTY --port 99999999", USAGE)],
    "classify": cases(MODEL, after="text"), "score": cases(MODEL, after="--prompt a --answer b"),
    "eval": [*cases(MODEL, after="--data FILE"), ("EMPTY --task nonsense", USAGE)],
    "models": [("--max-parameters x", USAGE)], "settings": [("nonsense", USAGE)], "techniques": [],
    "show": [("nonsense", USAGE)], "diff": [("NOWHERE EMPTY", USAGE), ("nonsense other", USAGE)],
    "plan": cases(RECIPE), "inspect": cases([one for one in MODEL if one[0] != "DAMAGED"]),
    "inspect-batch": cases(RECIPE),
    "verify": [("NOWHERE", DATA), ("EMPTY", DATA), ("FILE", DATA)],
    "export": [("NOWHERE OUT", DATA), ("EMPTY OUT", DATA), ("DAMAGED OUT", DATA), ("RUN OUT", DATA)],
    "push": [("EMPTY a/b", USAGE)], "consolidate": [("NOWHERE", DATA), ("EMPTY", DATA)],
    "ablate": [("nonsense --vary learning_rate=1,2", USAGE)], "ladder": [("nonsense", USAGE)],
    "race": [("nonsense", USAGE)], "report": [("NOWHERE", DATA), ("EMPTY", DATA)],
    "book": [("FILE", DATA)], "learn": [("nonsense", USAGE), ("check nonsense", USAGE)], "papers": [],
    "reproduce": [("nonsense", USAGE)], "doctor": [("--threads x", USAGE)],
    "data": [("NOWHERE", DATA), ("FILE --recipe nonsense", USAGE)],
    "tokens add": cases(MODEL, after="OUT <x>"),
    "ledger list": [], "ledger show": [("nonsense --file NOWHERE", USAGE)],
    "ledger merge": [("NOWHERE --file OUT", USAGE)], "ledger export": [("--format nonsense", USAGE)],
}  # fmt: skip


def all_commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from all_commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(all_commands())
CASES = [(name, text, code) for name, found in FAILURES.items() for text, code in [*found, ("--no-such-option", USAGE)]]


def test_every_command_is_in_the_table():
    assert list(FAILURES) == list(COMMANDS)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A folder that is not there, an empty one, a damaged model, a file, a run without checkpoints, a GGUF file that is
    cut off, a name that is longer than a file's may be."""
    for name in ("EMPTY", "DAMAGED", "RUN"):
        (tmp_path / name).mkdir()
    (tmp_path / "DAMAGED/config.json").write_text("{")
    (tmp_path / "FILE").write_text("neither: [yaml\n")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "RUN/checkpoints").mkdir()
    (tmp_path / "RUN/model.json").write_text("[]")
    (tmp_path / "RUN/config.yaml").write_text("recipe: sft\n")
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    made = {name: str(tmp_path / name) for name in ("NOWHERE", "EMPTY", "DAMAGED", "FILE", "RUN", "OUT")}
    return made | {"GGUF": str(tmp_path / "cut.gguf"), "LONG": str(tmp_path / ("n" * 300))}


def run_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["quest", *words])
    environment = dict(os.environ)
    code = run_with_exit_code(lambda: app(words, standalone_mode=True, prog_name="quest"))
    for name in set(os.environ) - set(environment):  # --offline, --threads
        del os.environ[name]
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(("name", "text", "expected"), CASES, ids=lambda one: str(one)[:60])
def test_a_failure_has_the_code_of_its_class_and_one_to_four_lines(
    name: str, text: str, expected: int, places: dict[str, str], monkeypatch, capsys
):
    text = re.sub("|".join(places), lambda match: places[match.group()], text)
    words = [*name.split(), *text.split()]
    code, _, err = run_command(words, monkeypatch, capsys)
    lines = [line for line in err.splitlines() if line.startswith("quest: ")] or err.splitlines()
    assert code == expected, err
    assert 1 <= len(lines) <= MAX_MESSAGE_LINES, err
    assert "Traceback" not in err
    said = [line.removeprefix("quest: ").removeprefix("- ") for line in lines if line.startswith("quest: ")]
    assert not any(other.endswith(one) for at, one in enumerate(said) for other in said[:at]), "a problem is told twice"
    assert max(map(len, lines)) <= LONGEST_LINE + len("quest: ")
    if "--json" in [option for one in COMMANDS[name].params for option in one.opts]:
        again, out, _ = run_command([*words, "--json"], monkeypatch, capsys)
        reply = json.loads(out)["error"]
        assert (again, reply["exit_code"]) == (code, code)
        of_click = [line.removeprefix("Error: ") for line in err.splitlines() if line.startswith("Error: ")]
        assert reply["message"].splitlines() == (of_click or lines)
