"""Makes the JSON schema of a Python function, by which a chat template shows it to a model as a tool: the result of
transformers' `get_json_schema` for a function with annotated arguments and a docstring in Google's form."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llm_quest.errors import UsageError

JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", dict: "object", list: "array",
              type(None): "null", Any: None}  # fmt: skip
ARGUMENT_LINE = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?:\s*(.+)$")
SECTION = re.compile(r"^\s*(Args|Arguments|Returns|Raises|Example|Examples|Yields):\s*$", re.MULTILINE)


def tool_schemas(tools: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """The schema of each tool, which is a function or a schema already."""
    return tuple(dict(tool) if isinstance(tool, Mapping) else function_schema(tool) for tool in tools)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """{"type": "function", "function": {name, description, parameters}}. UsageError for a function without a docstring,
    or an argument without annotation or description: a model would have to guess what it is for."""
    if not callable(function):
        raise UsageError(f"a tool is {function!r:.60}; give a function, or its JSON schema")
    name, doc = function.__name__, inspect.getdoc(function) or ""
    if not doc:
        raise UsageError(f"the tool {name} has no docstring, from which a model learns what it is for")
    described, hints = argument_descriptions(doc), get_type_hints(function)
    properties, required = {}, []
    for argument in inspect.signature(function).parameters.values():
        if argument.name not in hints or argument.name not in described:
            what = "a type" if argument.name not in hints else "a line under Args: in the docstring"
            raise UsageError(f"the argument {argument.name} of the tool {name} needs {what}")
        properties[argument.name] = {**type_schema(hints[argument.name]), "description": described[argument.name]}
        if argument.default is inspect.Parameter.empty:
            required.append(argument.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    parameters |= {"required": required} if required else {}
    description = SECTION.split(doc)[0].strip()
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def argument_descriptions(doc: str) -> dict[str, str]:
    """Argument -> what the section `Args:` says of it."""
    parts = SECTION.split(doc)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    descriptions: dict[str, str] = {}
    name = ""
    for line in (sections.get("Args") or sections.get("Arguments") or "").strip("\n").split("\n"):
        if match := ARGUMENT_LINE.match(line):
            name, text = match.groups()
            descriptions[name] = text.strip()
        elif name and line.strip():
            descriptions[name] += f" {line.strip()}"
    return descriptions


def type_schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [type_schema(part) for part in parts if part is not type(None)]
        nullable = {"nullable": True} if type(None) in parts else {}
        if len(kinds) == 1:
            return kinds[0] | nullable
        return {"type": sorted(one["type"] for one in kinds if "type" in one)} | nullable
    if origin is Literal:
        return {**type_schema(type(parts[0])), "enum": list(parts)}
    if origin is list:
        return {"type": "array"} | ({"items": type_schema(parts[0])} if parts else {})
    kind = JSON_TYPES.get(origin or hint, "object")
    return {} if kind is None else {"type": kind}
