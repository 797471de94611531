"""Settings as text: a YAML file and `key=value` pairs in, one tree of plain values out, each with the place it came
from.

YAML from a stranger is read with PyYAML's safe loader, and less of it than the format allows: at most 1 MB, 32 deep,
10,000 values, 32 aliases (an alias bomb of a few lines otherwise explodes when it is printed), no key twice. Plain
words are read by YAML 1.2's rules: `1e-3` is a number, `no` and `on` are words, `1:30` is not ninety.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from llm_quest.errors import DataError, UsageError

MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_ALIASES = 2**20, 32, 10_000, 32

Path = tuple[str, ...]


@dataclass(frozen=True)
class Mistake:
    """One thing wrong with the settings. where: `file:line` or the argument; path: the key, dotted; what: and what to
    do."""

    where: str
    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.path}: {self.what}" if self.path else f"{self.where}: {self.what}"


@dataclass
class Settings:
    """A tree of plain values. places: where each key was written, by path; mistakes: what was wrong with the text
    itself."""

    tree: dict[str, Any]
    name: str
    places: dict[Path, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def place(self, path: Path) -> str:
        """Where this key was written, or else the nearest key above it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)


class Words(yaml.SafeLoader):
    """PyYAML's safe loader with the words of YAML 1.2 instead of 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own way of holding them


for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    Words.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


def read_file(file: File) -> Settings:
    """The settings of a YAML file; whatever is wrong with the text is in `.mistakes`."""
    try:
        if not file.is_file():
            raise UsageError(f"{file} is no regular file; give the name of a recipe or a YAML file")
        if file.stat().st_size > MAX_BYTES:
            raise UsageError(f"{file} has {file.stat().st_size:,} bytes; settings have at most {MAX_BYTES:,}")
        return read(file.read_bytes().decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None


def read(text: str, name: str) -> Settings:
    """The settings in a text. name: what to call it in messages."""
    settings = Settings({}, name)
    try:
        problem = limits(text)
        node = None if problem else yaml.compose(text, Loader=Words)
        if node is not None:
            problem = too_many(node)
    except (yaml.YAMLError, ValueError) as error:
        settings.mistakes.append(syntax(error, name))
        return settings
    if problem:
        settings.mistakes.append(Mistake(name, "", problem))
    elif node is not None and not isinstance(node, yaml.MappingNode):
        settings.mistakes.append(Mistake(name, "", "a recipe is `key: value` lines; this is something else"))
    elif node is not None:
        visit(node, (), settings)
        if not settings.mistakes:
            construct(text, settings)
    return settings


def limits(text: str) -> str | None:
    """What in the stream of events is over a limit; looked at before anything is built from it."""
    depth = deepest = aliases = documents = 0
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return f"more than {MAX_BYTES:,} bytes"
    for event in yaml.parse(text, Loader=Words):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        deepest = max(deepest, depth)
        if deepest > MAX_DEPTH or aliases > MAX_ALIASES:
            break
    if deepest > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} deep"
    if aliases > MAX_ALIASES:
        return f"more than {MAX_ALIASES} aliases (*name); write the values out"
    return "several documents in one file; keep the first and remove `---`" if documents > 1 else None


def too_many(node: yaml.Node) -> str | None:
    """Count the values as they would be written out, aliases expanded."""
    stack, count = [node], 0
    while stack:
        count += 1
        if count > MAX_NODES:
            return f"more than {MAX_NODES:,} values once aliases are written out"
        here = stack.pop()
        if isinstance(here, yaml.MappingNode):
            stack.extend(part for pair in here.value for part in pair)
        elif isinstance(here, yaml.SequenceNode):
            stack.extend(here.value)
    return None


def visit(node: yaml.Node, path: Path, settings: Settings) -> None:
    """Note the line of every key and list entry, and every key that stands twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            settings.places[(*path, str(index))] = f"{settings.name}:{item.start_mark.line + 1}"
            visit(item, (*path, str(index)), settings)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line, word = key.start_mark.line + 1, str(key.value)
        where = f"{settings.name}:{line}"
        if word in seen and word != "<<":
            settings.mistakes.append(
                Mistake(where, ".".join((*path, word)), f"written twice, first in line {seen[word]}")
            )
        if not isinstance(key, yaml.ScalarNode):
            settings.mistakes.append(Mistake(where, ".".join(path), "a key must be a word"))
            continue
        seen.setdefault(word, line)
        settings.places[(*path, word)] = where
        visit(value, (*path, word), settings)


def construct(text: str, settings: Settings) -> None:
    """The values themselves; a tag that is not plain YAML (`!!python/...`) is a mistake."""
    try:
        settings.tree = stringify(yaml.load(text, Loader=Words) or {})
    except (yaml.YAMLError, ValueError) as error:
        settings.mistakes.append(syntax(error, settings.name))


def stringify(value: Any) -> Any:
    """Keys are words, also those that look like numbers; aliased values become values of their own."""
    if isinstance(value, Mapping):
        return {str(key): stringify(item) for key, item in value.items()}
    return [stringify(item) for item in value] if isinstance(value, list) else value


def syntax(error: Exception, name: str) -> Mistake:
    """PyYAML's complaint on one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return Mistake(name, "", f"not YAML: {' '.join(str(error).split())}")
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    return Mistake(where, "", f"not YAML: {error.problem or error.context}")


def merge(settings: Settings, pairs: Iterable[str]) -> Settings:
    """The settings with `a.b=value` pairs on top; a value is read as YAML (`lr=1e-3`, `samples.prompts=[Once,
    The]`)."""
    for pair in pairs:
        key, equals, text = pair.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            hint = "write key=value, with dots for keys inside keys (optimizer.lr=1e-3)"
            settings.mistakes.append(Mistake(f"argument {pair!r}", "", hint))
            continue
        given = read(f"value: {text}", f"argument {pair!r}")
        if given.mistakes:
            given = read("value: " + yaml.safe_dump(text, default_style='"'), f"argument {pair!r}")
        put(settings, path, given.tree.get("value"), f"argument {pair!r}")
    return settings


def put(settings: Settings, path: Path, value: Any, where: str) -> None:
    """Write one value into the tree; what stood there is replaced."""
    at = settings.tree
    for part in path[:-1]:
        if not isinstance(at.get(part), dict):
            at[part] = {}
        at = at[part]
    at[path[-1]] = value
    settings.places = {old: place for old, place in settings.places.items() if old[: len(path)] != path}
    for depth in range(1, len(path) + 1):
        settings.places.setdefault(path[:depth], where)


def write(tree: Mapping[str, Any]) -> str:
    """The text that `read` turns into this tree again."""
    return yaml.dump(dict(tree), Dumper=Plainly, sort_keys=False, allow_unicode=True, width=120)


class Plainly(yaml.SafeDumper):
    """PyYAML's safe dumper without aliases, quoting the words that the 1.2 rules would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own way of holding them
        letter: [
            *Words.yaml_implicit_resolvers.get(letter, []),
            *yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []),
        ]
        for letter in {*Words.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def quoted(dumper: Plainly, text: str) -> yaml.Node:
    """Text with characters that YAML takes for line ends is written with escapes."""
    odd = any(character in text for character in "\x85\u2028\u2029\ufeff\r\n")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


Plainly.add_representer(str, quoted)


def flat(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted key, for comparing two configs."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, (*path, key))
        else:
            yield ".".join((*path, key)), value
