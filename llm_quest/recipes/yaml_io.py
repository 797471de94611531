"""Reads settings from a YAML file and `key=value` pairs into one tree of plain values, each with its place.

YAML is read with PyYAML's safe loader, and with limits: at most 1 MB, 32 deep, 10,000 values, 32 aliases (an alias bomb
of a few lines otherwise explodes when it is printed), no key twice. Plain words are read by YAML 1.2's rules: `1e-3` is
a number, `no` and `enabled` are words, `1:30` is not ninety.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from llm_quest.errors import DataError, UsageError

MAX_BYTES, MAX_DEPTH, MAX_NODES, MAX_ALIASES = 2**20, 32, 10_000, 32
MAX_CACHED = 16_384
"""Characters of a text whose settings are kept."""

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class ConfigProblem:
    """A mistake in the settings. location: `file:line` or the argument; key: the dotted key; message: the mistake and
    the remedy."""

    location: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.location}: {self.key}: {self.message}" if self.key else f"{self.location}: {self.message}"


@dataclass
class RawConfig:
    """A tree of plain values. locations: where each key was written, by path; problems: mistakes in the text itself."""

    tree: dict[str, Any]
    source: str
    locations: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)

    def location(self, path: KeyPath) -> str:
        """The place of this key, or of the nearest key above it."""
        while path and path not in self.locations:
            path = path[:-1]
        return self.locations.get(path, self.source)


class Yaml12Loader(yaml.SafeLoader):
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
    Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


def read_yaml_file(file: File) -> RawConfig:
    """Read the settings of a YAML file; mistakes in the text are in its `problems`."""
    try:
        if not file.is_file():
            raise UsageError(f"{file} is no regular file; give the name of a recipe or a YAML file")
        if file.stat().st_size > MAX_BYTES:
            raise UsageError(f"{file} has {file.stat().st_size:,} bytes; settings have at most {MAX_BYTES:,}")
        return read_yaml(file.read_bytes().decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None


def read_yaml(text: str, name: str) -> RawConfig:
    """Read the settings in a text. name: of the text, for messages."""
    content = parse_yaml(text, name) if len(text) <= MAX_CACHED else parse_yaml.__wrapped__(text, name)
    return RawConfig(copy.deepcopy(content.tree), name, dict(content.locations), list(content.problems))


@functools.lru_cache(maxsize=512)
def parse_yaml(text: str, name: str) -> RawConfig:
    """Parse the settings in a text; the result is shared, and not to be changed. (A recipe is read several times: for
    its schema, for a model that is named on the command line, by every run of an experiment. PyYAML takes 10 ms.)"""
    settings = RawConfig({}, name)
    try:
        problem = find_limit_violation(text)
        node = None if problem else yaml.compose(text, Loader=Yaml12Loader)
        if node is not None:
            problem = find_node_excess(node)
    except (yaml.YAMLError, ValueError) as error:
        settings.problems.append(syntax_problem(error, name))
        return settings
    if problem:
        settings.problems.append(ConfigProblem(name, "", problem))
    elif node is not None and not isinstance(node, yaml.MappingNode):
        settings.problems.append(ConfigProblem(name, "", "a recipe is `key: value` lines; this is something else"))
    elif node is not None:
        record_locations(node, (), settings)
        if not settings.problems:
            build_tree(text, settings)
    return settings


def find_limit_violation(text: str) -> str | None:
    """The limit that the stream of events exceeds, checked before anything is built from it; None within all limits."""
    depth = deepest = aliases = documents = 0
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return f"more than {MAX_BYTES:,} bytes"
    for event in yaml.parse(text, Loader=Yaml12Loader):
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


def find_node_excess(node: yaml.Node) -> str | None:
    """A message if there are too many values with aliases expanded; None if not."""
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


def record_locations(node: yaml.Node, path: KeyPath, settings: RawConfig) -> None:
    """Record the line of every key and list entry, and every duplicate key as a problem."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            settings.locations[(*path, str(index))] = f"{settings.source}:{item.start_mark.line + 1}"
            record_locations(item, (*path, str(index)), settings)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line, word = key.start_mark.line + 1, str(key.value)
        where = f"{settings.source}:{line}"
        if word in seen and word != "<<":
            settings.problems.append(
                ConfigProblem(where, ".".join((*path, word)), f"written twice, first in line {seen[word]}")
            )
        if not isinstance(key, yaml.ScalarNode):
            settings.problems.append(ConfigProblem(where, ".".join(path), "a key must be a word"))
            continue
        seen.setdefault(word, line)
        settings.locations[(*path, word)] = where
        record_locations(value, (*path, word), settings)


def build_tree(text: str, settings: RawConfig) -> None:
    """Build the tree of values; a tag that is not plain YAML (`!!python/...`) is a problem."""
    try:
        settings.tree = stringify_keys(yaml.load(text, Loader=Yaml12Loader) or {})
    except (yaml.YAMLError, ValueError) as error:
        settings.problems.append(syntax_problem(error, settings.source))


def stringify_keys(value: Any) -> Any:
    """Convert keys to text, also those that look like numbers, and copy aliased values."""
    if isinstance(value, Mapping):
        return {str(key): stringify_keys(item) for key, item in value.items()}
    return [stringify_keys(item) for item in value] if isinstance(value, list) else value


def syntax_problem(error: Exception, name: str) -> ConfigProblem:
    """PyYAML's error on one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return ConfigProblem(name, "", f"not YAML: {' '.join(str(error).split())}")
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    return ConfigProblem(where, "", f"not YAML: {error.problem or error.context}")


def apply_overrides(settings: RawConfig, overrides: Iterable[str]) -> RawConfig:
    """Apply `a.b=value` pairs to the settings; a value is read as YAML (`learning_rate=1e-3`, `samples.prompts=[Once,
    The]`)."""
    for pair in overrides:
        key, equals, text = pair.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            hint = "write key=value, with dots for keys inside keys (learning_rate=1e-3)"
            settings.problems.append(ConfigProblem(f"argument {pair!r}", "", hint))
            continue
        given = read_yaml(f"value: {text}", f"argument {pair!r}")
        if given.problems:
            given = read_yaml("value: " + yaml.safe_dump(text, default_style='"'), f"argument {pair!r}")
        set_value(settings, path, given.tree.get("value"), f"argument {pair!r}")
    return settings


def set_value(settings: RawConfig, path: KeyPath, value: Any, where: str) -> None:
    """Write one value into the tree, replacing what is there."""
    at = settings.tree
    for part in path[:-1]:
        if not isinstance(at.get(part), dict):
            at[part] = {}
        at = at[part]
    at[path[-1]] = value
    settings.locations = {old: place for old, place in settings.locations.items() if old[: len(path)] != path}
    for depth in range(1, len(path) + 1):
        settings.locations.setdefault(path[:depth], where)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """The tree as YAML text, which `read_yaml` reads back."""
    return yaml.dump(dict(tree), Dumper=Yaml12Dumper, sort_keys=False, allow_unicode=True, width=120)


class Yaml12Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper without aliases, quoting the words that the 1.2 rules would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own way of holding them
        letter: [
            *Yaml12Loader.yaml_implicit_resolvers.get(letter, []),
            *yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []),
        ]
        for letter in {*Yaml12Loader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def represent_text(dumper: Yaml12Dumper, text: str) -> yaml.Node:
    """Text with characters that YAML takes for line ends is written with escapes."""
    odd = any(character in text for character in "\x85\u2028\u2029\ufeff\r\n")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)


Yaml12Dumper.add_representer(str, represent_text)


def flatten_tree(tree: Mapping[str, Any], path: KeyPath = ()) -> Iterator[tuple[str, Any]]:
    """Every leaf with its dotted key, for comparing two configs."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_tree(value, (*path, key))
        else:
            yield ".".join((*path, key)), value
