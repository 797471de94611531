"""The API pages: one for each module of the package, with the signature, the docstring and the source of every public
class and function. All of it is read from the syntax tree; nothing is imported."""

from __future__ import annotations

import ast
import html
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from book.markdown import Renderer, color_code
from book.source import PACKAGE, Definition, definitions, opening_sentence, parse


@dataclass(frozen=True)
class Module:
    """A file of the package. name: as it is imported."""

    file: str
    name: str

    @property
    def path(self) -> str:
        """The page, relative to the site."""
        return f"api/{self.name}.html"

    @property
    def package(self) -> str:
        """The package that lists it, such as `llm_quest.layers`."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if "/" in self.file else "llm_quest"


def all_modules() -> list[Module]:
    """Every module with a public name, in the order of the tree."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        if public_definitions(file) or path.name == "__init__.py":
            found.append(Module(file, module_name(file)))
    return found


def module_name(file: str) -> str:
    return ("llm_quest/" + file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def public_definitions(file: str) -> list[Definition]:
    return [node for name, node in definitions(parse(file)[1]).items() if not name.startswith("_")]


def public_methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Methods that a user calls: no underscore in front, but for `__call__`."""
    found = (one for one in node.body if isinstance(one, ast.FunctionDef))
    return [one for one in found if not one.name.startswith("_") or one.name == "__call__"]


def signature(node: Definition) -> str:
    """The lines of the source up to the body, on as few lines as they have there."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){returns}"
    bases = ", ".join(map(ast.unparse, node.bases))
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def fields(node: ast.ClassDef) -> list[str]:
    """The annotated fields of a dataclass, as they stand in the source."""
    return [
        ast.unparse(one)
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not one.target.id.startswith("_")
    ]


def first_sentence(node: Definition | ast.Module) -> str:
    return opening_sentence(ast.get_docstring(node) or "")


def module_body(module: Module, markdown: Renderer) -> str:
    """The HTML of a module's page."""
    text, tree = parse(module.file)
    parts = [f"<h1><code>{module.name}</code></h1>", markdown(as_text(ast.get_docstring(tree) or ""))]
    names = public_definitions(module.file)
    if len(names) > 1:
        parts.append("<ul>" + "".join(map(name_item, names)) + "</ul>")
    parts += (definition_body(node, markdown) for node in names)
    parts.append(source_block(text, {node.lineno for node in walk_public(names)}))
    return "".join(parts)


def as_text(docstring: str) -> str:
    """A docstring as Markdown: brackets that are no link stay what they are."""
    return docstring.replace("[[", "[&#91;")


def walk_public(nodes: list[Definition]) -> Iterator[Definition]:
    for node in nodes:
        yield node
        if isinstance(node, ast.ClassDef):
            yield from public_methods(node)


def name_item(node: Definition) -> str:
    return f'<li><a href="#{node.name}"><code>{node.name}</code></a> {html.escape(first_sentence(node))}</li>'


def definition_body(node: Definition, markdown: Renderer) -> str:
    """A class or a function: signature, docstring, fields, methods."""
    parts = [f'<h2 id="{node.name}"><code>{node.name}</code></h2>', definition_text(node, markdown)]
    if isinstance(node, ast.ClassDef):
        for method in public_methods(node):
            key = f"{node.name}.{method.name}"
            parts += [f'<h3 id="{key}"><code>{key}</code></h3>', definition_text(method, markdown)]
    return "".join(parts)


def definition_text(node: Definition, markdown: Renderer) -> str:
    lines = [signature(node)]
    if isinstance(node, ast.ClassDef):
        lines += [f"    {one}" for one in fields(node)]
    said = ast.get_docstring(node)
    source = f'<p><a href="#L{node.lineno}">source, line {node.lineno}</a></p>'
    return color_code("\n".join(lines), "python") + (markdown(as_text(said)) if said else "") + source


def source_block(text: str, marked: set[int]) -> str:
    """The file, with an id at each line that a definition begins at."""
    lines = [
        f'<span id="L{number}">{html.escape(line)}</span>' if number in marked else html.escape(line)
        for number, line in enumerate(text.splitlines(), start=1)
    ]
    code = "\n".join(lines)
    pre = f'<pre tabindex="0"><code>{code}</code></pre>'
    return f'<h2 id="the-source">The source</h2><details><summary>{len(lines)} lines</summary>{pre}</details>'


def module_words(module: Module) -> str:
    """What the search finds a module by."""
    return " ".join([module.name, *(node.name for node in walk_public(public_definitions(module.file)))])


def module_summary(module: Module) -> str:
    return first_sentence(parse(module.file)[1])


def undocumented() -> list[str]:
    """Public classes and functions without a docstring that are no method of a contract: what a page leaves bare."""
    return [
        f"{module.name}.{node.name}"
        for module in all_modules()
        for node in public_definitions(module.file)
        if not inspect.cleandoc(ast.get_docstring(node) or "")
    ]
