"""What README and docs tell a reader to type works: every command and option exists, training commands pass as dry
runs, Python examples run on a tiny model, `make` targets and modules are there."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer

from llm_quest.cli.main import app
from llm_quest.cli.train import start_training
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.hub.load_save import save
from llm_quest.models.build import build, preset
from llm_quest.recipes.config import recipe_names
from tests.mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    file for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    if file.name not in ("mutations.md", "LOG.md")
)  # fmt: skip
"""LOG.md and mutations.md are records: what they quote was true on its day."""
PROGRAMS = "quest|torchrun|make|python"
COMMANDS: Any = typer.main.get_command(app)
WITHOUT_A_MODEL = {"models", "show", "diff", "papers", "settings", "techniques"}
"""Commands that need no model and no training: they are run as they stand."""


READERS_FILES = {"my_rewards.py": "def score(completions, word, **kwargs):\n    return [0.0] * len(completions)\n"}
"""Files of the reader's own that commands name."""


class DocCommand(NamedTuple):
    place: str
    words: tuple[str, ...]


def code_blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, language, content) of every fenced block."""
    for match in re.finditer(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


def block_lines(block: str) -> Iterator[str]:
    """Lines of a block, continuations joined, comments away, several commands of a line apart."""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        yield from re.split(rf"\s{{2,}}(?=(?:{PROGRAMS}) )", re.sub(r"(^|\s+)#.*", "", line).strip())


def alternatives(words: list[str]) -> Iterator[tuple[str, ...]]:
    """`quest plan sft|dpo` is two commands."""
    for place, word in enumerate(words[:3]):
        if re.fullmatch(r"\w+(\|\w+)+", word):
            for one in word.split("|"):
                yield (*words[:place], one, *words[place + 1 :])
            return
    yield tuple(words)


def without_brackets(word: str) -> str:
    """`[key=value]` is an optional setting: it is tried with the others."""
    word = word.removeprefix("[")
    return word[:-1] if word.count("]") > word.count("[") else word


def commands_of(file: Path) -> Iterator[DocCommand]:
    text = file.read_text(encoding="utf-8")
    for line, language, block in code_blocks(text):
        before: list[str] = []
        for written in block_lines(block) if language != "python" else ():
            if not re.match(rf"({PROGRAMS}) ", written):
                continue
            words = [without_brackets(word) for word in shlex.split(re.sub(r"\$\w+|\bS\b", "1", written))]
            if len(words) > 3 and words[3] == "...":  # the settings of the command above
                words[3:4] = [word for word in before if "=" in word]
            else:
                before = words
            for one in alternatives(words):
                yield DocCommand(f"{file.name}:{line}", one)
    prose = re.sub(r"^ *```.*?^ *```", lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"`(quest [^`]+)`", prose):
        written = re.sub(r"\bS\b", "1", match[1].partition("...")[0])  # up to a value that is left open
        words = [without_brackets(word) for word in shlex.split(written) if not word.endswith("=")]
        for one in alternatives(words):
            yield DocCommand(f"{file.name}:{prose.count(chr(10), 0, match.start()) + 1}", one)


@functools.cache
def all_commands() -> tuple[DocCommand, ...]:
    return tuple(command for file in PAGES for command in commands_of(file))


def parameters(words: tuple[str, ...]) -> dict[str, Any]:
    """What `quest` reads from these words; typer's error names an option that does not exist."""
    words = words[1:]
    if words[0].startswith("-") or words[0].isupper():
        return {}
    command = COMMANDS
    while words and not words[0].startswith("-") and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert command is not COMMANDS, f"there is no command {words[0]}"
    if "--help" in words or not words:  # a command's name alone, in a sentence
        return {}
    return dict(command.make_context(words, list(words)).params)


def with_quest() -> list[DocCommand]:
    """Those that call `quest`, without what comes before (torchrun and its options)."""
    found = [command for command in all_commands() if "quest" in command.words]
    return [DocCommand(place, words[words.index("quest") :]) for place, words in found]


def test_the_pages_hold_commands():
    assert len(with_quest()) > 60
    assert {words[1] for _, words in with_quest()} >= {"train", "generate", "chat", "eval", "plan", "export"}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, for whatever a page loads."""
    tokenizer = character_tokenizer("abc")
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save(
        build(replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size), seed=1),
        folder,
        tokenizer=tokenizer,
    )
    return folder


@pytest.mark.parametrize("words", sorted({words for _, words in with_quest()}), ids=" ".join)
def test_a_command_of_the_docs_passes_as_a_dry_run(
    words: tuple[str, ...], tiny_folder: Path, tmp_path: Path, monkeypatch, capsys
):
    """Options are read by the command's own parser. Where a recipe is named, its settings are checked as
    `quest train --dry-run` does; a name that is no recipe stands for a run folder."""
    given = parameters(words)
    monkeypatch.chdir(tmp_path)
    for file, text in READERS_FILES.items():
        Path(file).write_text(text)
    for folder in {Path(pair.partition("=")[2]) for pair in given.get("pairs") or () if ".load=" in pair}:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(tiny_folder)
    if given.get("recipe") and "pairs" in given:
        if given["recipe"] not in recipe_names():
            folder = Path(given["recipe"])
            folder.mkdir(parents=True)
            result = start_training("pretrain", [], out=None, dry_run=True, log=print)
            (folder / "config.yaml").write_text("\n".join(result.lines()))
        result = start_training(given["recipe"], given["pairs"] or [], out=None, dry_run=True, log=print)
        assert result.exit_code == 0
    elif words[1] in WITHOUT_A_MODEL and len(words) > 1:
        COMMANDS.main(list(words[1:]), standalone_mode=False)
        assert capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [("quest", "trian"), ("quest", "train", "tiny", "--outt", "x"), ("quest", "show", "gpt2", "--josn")]
)
def test_a_command_that_does_not_exist_is_noticed(words: tuple[str, ...]):
    with pytest.raises(Exception, match=r"No such option: --\w+|there is no command trian"):
        parameters(words)


def test_make_targets_and_modules_of_the_docs_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for place, words in all_commands():
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, place
        if words[:2] == ("python", "-m"):
            spec = importlib.util.find_spec(words[2])
            assert spec is not None, place
            source = Path(spec.origin or "").read_text(encoding="utf-8")
            assert all(word in source for word in words if word.startswith("--")), place


def python_examples() -> list[tuple[str, str]]:
    blocks = ((f"{f.name}:{line}", lang, block) for f in PAGES for line, lang, block in code_blocks(f.read_text()))
    return [(place, block) for place, language, block in blocks if language == "python"]


@pytest.mark.parametrize(("place", "code"), python_examples(), ids=[place for place, _ in python_examples()])
def test_a_python_example_runs(place: str, code: str, tmp_path: Path, monkeypatch):
    """`tokens` and the folder that it loads are a tiny model's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    for folder in re.findall(r"quest\.load\(\"([^\"]+)\"\)", code):
        save(build("llama3.2-tiny", seed=1), folder)
    exec(compile(code, place, "exec"), {"tokens": torch.tensor([[1, 2, 3]])})


@pytest.mark.parametrize("page", ["docs/reliability.md", "SECURITY.md"])
def test_every_test_that_a_promise_names_exists(page: str):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_mutation_quotes_text_that_stands_once_in_its_file():
    """A mutation whose text has moved breaks nothing, and says nothing about the tests."""
    lost = [
        f"{one.title} ({one.file})"
        for one in MUTATIONS
        if (ROOT / "llm_quest" / one.file).read_text(encoding="utf-8").count(one.right) != 1
    ]
    assert lost == []
