"""Every table is its schema: a key that takes a table's names takes all of them, and nothing lists them again."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated

import pytest

import llm_quest
from llm_quest.errors import UsageError
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.schema import Choice, StrictModel
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml

PACKAGE = Path(llm_quest.__file__).parent
COLORS = {"red": 1, "green": 2}


class Painted(StrictModel):
    color: Annotated[str, Choice(COLORS)] = "red"
    other: Annotated[str, Choice(COLORS)] | None = None


@pytest.mark.parametrize("key", ["color", "other"])
def test_a_choice_takes_the_tables_names_and_tells_them(key: str) -> None:
    assert parse_config(Painted, read_yaml(f"{key}: green", "a")) == Painted.model_validate({key: "green"})
    with pytest.raises(UsageError, match=r"'gren' is not one of red, green.*, did you mean 'green'\?"):
        parse_config(Painted, read_yaml(f"{key}: gren", "a"))
    with pytest.raises(UsageError, match="one of red, green"):
        parse_config(Painted, apply_overrides(read_yaml("", "a"), [f"{key}=3"]))


def tables() -> dict[frozenset[str], str]:
    """The keys of every module's tables -> the table's name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Dict):
                keys = [key.value for key in value.keys if isinstance(key, ast.Constant)]
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if len(keys) > 1 and len(keys) == len(value.keys) and all(isinstance(key, str) for key in keys):
                    found[frozenset(keys)] = f"{file.relative_to(PACKAGE)}: {ast.unparse(target)}"
    return found


def literal_texts(node: ast.AST) -> frozenset[str]:
    """The texts in a `Literal[...]`; none for anything else."""
    if not (isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal")):
        return frozenset()
    return frozenset(part.value for part in ast.walk(node.slice) if isinstance(part, ast.Constant))


def test_no_literal_of_a_schema_repeats_the_keys_of_a_table() -> None:
    known = tables()
    assert frozenset(("k1", "k2", "k3", "unbiased")) in known, "the tables are found"
    repeated = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)} repeats {known[names]}"
        for file in (PACKAGE / "recipes").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for names in {literal_texts(node)} & known.keys()
    ]
    assert not repeated, "write Annotated[str, Choice(TABLE)]:\n" + "\n".join(repeated)
