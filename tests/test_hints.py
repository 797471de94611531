"""An error or a diagnosis never recommends what does not exist: every setting, option and command that a message or a
docstring names is one that the program takes.

Messages are the string constants of the package, read with `ast`; `{...}` of an f-string is left open."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from pydantic import BaseModel

from llm_quest.cli.main import app
from llm_quest.recipes import RECIPES
from llm_quest.recipes.recipe import get_recipe
from tests.sources import nodes_of, package_files

PACKAGE = Path(__file__).parents[1] / "llm_quest"
QUEST: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = QUEST.commands
ROOT_OPTIONS = {name for one in QUEST.params for name in one.opts}
"""Of `quest` itself, before or behind any command."""
OTHER_PROGRAMS = ("git", "hf", "torchrun", "pip", "llama-server", "vllm")
"""A message or a command line that runs one of these names its options, not ours."""
PRINTED_FOR = {
    "cli/output.py": tuple(RECIPES),
    "rollouts/diagnostics.py": ("grpo", "iterative", "rpt"),
    "recipes/diagnostics.py": tuple({*RECIPES} - {"grpo", "iterative", "rpt"}),
}
"""Files whose messages are printed for every one of these recipes: all of them take what is recommended."""
OPTIONS_OF_FILES = {
    "cost": "plan", "experiments": "ablate", "experiments/ladder_forecast.py": "plan",
    "experiments/race.py": "race",
    **{f"experiments/{name}.py": "ladder" for name in ("ladder", "rungs", "scaling_law")},
    "recipes/held_out.py": "eval", "serve": "serve",
    **{f"hub/gguf_{name}.py": "export" for name in ("adapter", "config", "export")},
    "files.py": "export", "atomic_dirs.py": "export", "hub/wllama.py": "export",
}  # fmt: skip
"""Packages and files outside cli/ whose messages one command prints; the others' are printed by `quest train`."""
GGUF_KEYS = ("general.architecture", "general.sampling", "general.type", "tokenizer.ggml.model")
NOT_OURS = {
    "save_projection": "PEFT's VeRA", "safe_serialization": "PEFT's save_pretrained", "tokenizer.model": "a file",
    "spiece.model": "a file", "base.gguf": "a file", "llama.cpp": "a program", "json.dumps": "of Python",
    "french": "an adapter's name", "version": "of a format", "error.type": "a field of OpenAI's errors",
    **dict.fromkeys(GGUF_KEYS, "a key of GGUF files"),
    "model.embed_tokens": "a module, which freeze names",
    "embed.token": "a module, which modules_to_save names",
    "http.server": "of Python", "--bind": "http.server's",
    "--ignore-scripts": "npm's", "--loglevel": "npm's",
    "--abbrev-ref": "git's", "--short": "git's", "--whitespace": "git's", "--reverse": "git's", "--check": "git's",
    "--porcelain": "git's", "--untracked-files": "git's",
}  # fmt: skip
FILE_ENDINGS = "json jsonl yaml yml py md txt html csv safetensors svg org com co jinja bin patch".split()  # noqa: SIM905
PYTHON_NAMES = ("torch", "sys", "itertools", "quest", "cache", "llm_quest", "transformers")
"""What a dotted word of a message to a Python caller begins with."""


class Message(NamedTuple):
    file: str
    line: int
    text: str
    is_docstring: bool

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


def messages_of(file: Path) -> Iterator[Message]:
    nodes = nodes_of(file)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in nodes if isinstance(node, owners) and node.body]
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        match node:
            case ast.JoinedStr(values=values):
                text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in values)
            case ast.Constant(value=str(text)) if id(node) not in parts:
                pass
            case _:
                continue
        plain = re.sub(r"\s+", " ", text)
        yield Message(str(file.relative_to(PACKAGE)), node.lineno, plain, id(node) in docstrings)


@functools.cache
def messages() -> tuple[Message, ...]:
    return tuple(message for file in package_files(PACKAGE) for message in messages_of(file))


def sentences() -> list[Message]:
    """Messages that a user may read: more than one word, no docstring, no markup."""
    return [m for m in messages() if " " in m.text and not m.is_docstring and "<" not in m.text]


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema; `name.*` where a key holds what other files define (a model's sizes)."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from keys_of(part, f"{prefix}{name}.")
            elif part is dict or getattr(part, "__origin__", None) is dict:
                yield f"{prefix}{name}.*"


def parts_of(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from parts_of(part)


@functools.cache
def recipe_keys() -> dict[str, frozenset[str]]:
    return {name: frozenset(keys_of(get_recipe(name).Config)) for name in RECIPES}


def has_key(recipe: str, key: str) -> bool:
    keys = recipe_keys()[recipe]
    return key in keys or f"{key.rpartition('.')[0]}.*" in keys


@functools.cache
def parameter_names() -> frozenset[str]:
    """Parameters of our functions and fields of our classes: what advice to a Python caller may name."""
    nodes = [node for file in package_files(PACKAGE) for node in nodes_of(file)]
    fields = [
        one.target
        for node in nodes
        if isinstance(node, ast.ClassDef)
        for one in node.body
        if isinstance(one, ast.AnnAssign)
    ]
    return frozenset(
        [node.arg for node in nodes if isinstance(node, ast.arg)] + [t.id for t in fields if isinstance(t, ast.Name)]
    )


def settings_in(text: str) -> Iterator[str]:
    """The keys of `key=value` and of `group.key`, but not files, addresses and names of Python."""
    yield from re.findall(r"(?<![\w./\[-])([a-z]\w*(?:\.[a-z]\w*)*)=(?=[\w{\[.'])", text)
    for word in re.findall(r"(?<![\w./@=:-])([a-z]\w*(?:\.[a-z_]\w*)+)(?![\w(/=])", text):
        if word.split(".")[-1] not in FILE_ENDINGS and word.split(".")[0] not in PYTHON_NAMES:
            yield word


def is_defined(word: str) -> bool:
    """`techniques.adapter_merge.merge_adapter` is the function of that file."""
    *folders, name = word.split(".")
    file = PACKAGE.joinpath(*folders).with_suffix(".py")
    return file.is_file() and f"def {name}(" in file.read_text(encoding="utf-8")


def recipes_of(file: str) -> tuple[str, ...]:
    """The recipes that a file's messages are printed for."""
    own = file.removeprefix("recipes/").removesuffix(".py")
    return (own,) if own in RECIPES else tuple(RECIPES)


def unknown_settings(message: Message) -> list[str]:
    """A word alone may also be a parameter of a Python function."""
    recipes = recipes_of(message.file)
    named = [key for key in settings_in(message.text) if key not in NOT_OURS and not is_defined(key)]
    return [
        key for key in named
        if not any(has_key(recipe, key) for recipe in recipes) and ("." in key or key not in parameter_names())
    ]  # fmt: skip


def test_every_setting_that_a_message_recommends_is_a_key_of_its_recipe():
    assert not [(message.place, unknown) for message in sentences() if (unknown := unknown_settings(message))]


@pytest.mark.parametrize("file", PRINTED_FOR)
def test_advice_that_several_recipes_print_is_known_to_each(file: str):
    """Words with an underscore are keys in these files. Of what stands between brackets each recipe knows one key."""
    texts = [message.text for message in sentences() if message.file == file and "{}" * 2 not in message.text]
    clauses = [clause for text in texts for clause in re.split(r"[()]", text)]
    named = [set(re.findall(r"(?<![=\w])[a-z]+(?:_[a-z]+)+(?:\.[a-z_]+)*\b", clause)) for clause in clauses]
    assert any(named)
    for recipe in PRINTED_FOR[file]:
        unknown = [keys for keys in named if keys and not any(has_key(recipe, key) for key in keys)]
        assert not unknown, recipe


def options_of(command: str) -> set[str]:
    inside = [COMMANDS[command], *getattr(COMMANDS[command], "commands", {}).values()]
    named = {name for each in inside for one in each.params for name in (*one.opts, *one.secondary_opts)}
    return named | ROOT_OPTIONS | {"--help"}


def test_every_command_that_a_text_names_exists():
    named = [(m.place, word) for m in messages() for word in re.findall(r"(?:`|: |\()quest ([a-z][\w-]*)", m.text)]
    assert len(named) > 30
    assert not [f"{place}: quest {word}" for place, word in named if word not in COMMANDS]


def test_every_option_that_a_text_names_exists():
    """After `quest COMMAND` it is an option of that command; in a file of cli/ of some command; elsewhere, where any
    recipe may print the message, of `quest train`."""
    wrong = []
    for message in messages():
        if re.search(rf"\b({'|'.join(OTHER_PROGRAMS)}) |var\(", message.text):
            continue
        for match in re.finditer(r"(?<![\w-])--[a-z][a-z-]+", message.text):
            before = re.findall(r"quest ([a-z][\w-]*)", message.text[: match.start()])
            if before and before[-1] in COMMANDS:
                allowed = options_of(before[-1])
            elif match[0] in NOT_OURS:
                continue
            elif message.file.startswith("cli/") or message.is_docstring:
                allowed = set().union(*map(options_of, COMMANDS))
            else:
                package = OPTIONS_OF_FILES.get(message.file.split("/")[0], "train")
                allowed = options_of(OPTIONS_OF_FILES.get(message.file, package))
            if match[0] not in allowed:
                wrong.append(f"{message.place}: {match[0]}")
    assert not wrong


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("raise clip.high, or take variant=dr_grpo", ["variant", "clip.high"]),
        ("set data.source=x and see file.json", ["data.source"]),
        ("fewer tokens (model.sizes.width)", ["model.sizes.width"]),
        ("see https://docs.x.org/a.b=c", []),
    ],
)
def test_settings_are_recognized(text: str, found: list[str]):
    assert list(settings_in(text)) == found
