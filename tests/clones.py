"""Functions of the package that are equal but for the names of their variables and their texts.

`python -m tests.clones [NODES]` prints them, the largest first: functions of at least so many nodes of the syntax tree
(25), their docstrings left out. `recipes/flat/`, where code stands twice on purpose, is passed over."""

from __future__ import annotations

import ast
import collections
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llm_quest"


class Unnamed(ast.NodeTransformer):
    """Variables are numbered in the order in which they occur, and texts are all alike; numbers and attributes stay."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.numbers.setdefault(node.id, f"v{len(self.numbers)}"), node.ctx)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("text") if isinstance(node.value, str) else node


def equal_functions(least_nodes: int) -> list[list[str]]:
    """Groups of two or more, each function as `file:line name, lines`."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        if "flat" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = ast.Module(node.body[1:] if ast.get_docstring(node) else node.body, [])
                if sum(1 for _ in ast.walk(body)) >= least_nodes:
                    place = f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}"
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    groups[ast.dump(Unnamed().visit(body))].append(f"{place}, {lines} lines")
    return [places for _, places in sorted(groups.items(), key=lambda one: -len(one[0])) if len(places) > 1]


if __name__ == "__main__":
    found = equal_functions(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
    print(*(" = ".join(places) for places in found), f"{len(found)} groups", sep="\n")
