"""The reference: command line, settings, techniques, metrics, glossary, and the guides of `docs/`, which are read from
there. Everything is made from the package's own tables; two files of words (`glossary.yaml`, `metrics.yaml`) are held
to them by tests."""

from __future__ import annotations

import ast
import fnmatch
import functools
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from book.catalog import all_subjects
from book.flows import FLOWS, draw_flow
from book.markdown import Renderer, color_code
from book.pages import code, table
from book.source import PACKAGE, ROOT, find, parse

GUIDES = {
    "cli": "The command line: exit codes, runs, measures", "files": "Files and formats", "rows": "Data forms",
    "alignment": "Fine-tuning", "reasoning": "Learning from rewards", "serve": "The server", "gguf": "GGUF files",
    "ablate": "Comparing variants", "agents": "The protocol for agents", "reliability": "Reliability",
    "extending": "How to extend", "architecture": "How the package is built",
    "benchmarks": "Benchmarks (for contributors)",
}  # fmt: skip
"""A page of `docs/` -> its title in lists."""
TABLES = {
    "built": "How the package is built, in three pictures", "glossary": "Glossary", "metrics": "Metrics",
    "commands": "Commands", "settings": "Settings", "techniques": "Techniques and their options",
}  # fmt: skip
METRIC_PACKAGES = ("objectives", "eval", "rollouts", "train/session.py")
PLACE = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


@dataclass(frozen=True)
class ReferencePage:
    """name: its file under `reference/`; words: what search reads."""

    name: str
    title: str
    body: str
    words: str

    @property
    def path(self) -> str:
        return f"reference/{self.name}.html"


def reference_pages(markdown: Renderer, link: Callable[[str], tuple[str, str]]) -> Iterator[ReferencePage]:
    makers = {"built": package_pictures, "glossary": glossary, "metrics": metrics, "commands": commands,
              "settings": settings, "techniques": techniques}  # fmt: skip
    for name, title in TABLES.items():
        body = makers[name](markdown)
        yield ReferencePage(name, title, f"<h1>{title}</h1>{body}", re.sub(r"<[^>]+>", " ", body))
    for name, title in GUIDES.items():
        text = guide_file(name).read_text(encoding="utf-8")
        yield ReferencePage(name, title, markdown(site_links(text, link)), text)


def package_pictures(markdown: Renderer) -> str:
    """The three pictures; each box leads to its code."""
    said = "Each box leads to the code that does it; [[reference/architecture|the guide]] has the reasons."
    return markdown(said) + "".join(map(draw_flow, FLOWS))


def guide_file(name: str) -> Path:
    """A guide of `docs/`; the one that a test follows lies beside the book."""
    return ROOT / ("book/extending.md" if name == "extending" else f"docs/{name}.md")


def site_links(text: str, link: Callable[[str], tuple[str, str]]) -> str:
    """Markdown of `docs/` whose links name files there, with the addresses of the site; what has no page becomes its
    name alone."""

    def address(found: re.Match[str]) -> str:
        place, _, anchor = found[1].removeprefix("docs/").partition("#")
        stem = place.removesuffix(".md")
        key = f"reference/{stem}"
        if "/" in stem and stem.split("/")[0] in ("settings", "papers"):
            key = stem.replace("settings/", "recipe/").replace("papers/", "paper/")
        if stem == "papers":
            return "](../paper/index.html)"
        try:
            return f"]({link(key)[0]}{'#' + anchor if anchor else ''})"
        except ValueError:
            return "](#)"

    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\[([^\]]+)\]\(#\)", r"\1", PLACE.sub(address, text.replace("[[", "[&#91;")))


def read_glossary() -> dict[str, tuple[str, str, str]]:
    """Their name -> (whose, what it is here, an anchor of the source or the key of a page)."""
    read = yaml.safe_load((ROOT / "book/glossary.yaml").read_text(encoding="utf-8"))
    return {str(name): (whose, said, place) for name, (whose, said, place) in read.items()}


def glossary(markdown: Renderer) -> str:
    """Names of other projects and of papers, and settings of theirs, each with its place here."""
    from llm_quest.recipes.other_names import OTHER_NAMES

    rows = [
        [code(name), html.escape(whose), markdown(f"{said} {place_of(place)}")]
        for name, (whose, said, place) in sorted(read_glossary().items(), key=lambda one: one[0].lower())
    ]
    keys = [[code(name), " ".join(code(one) for one in ours)] for name, ours in sorted(OTHER_NAMES.items())]
    said = "<h2 id='settings'>Settings that go by other names</h2><p>An unknown key is answered with these.</p>"
    return table(("name", "of", "here"), rows) + said + table(("their key", "ours"), keys)


def place_of(place: str) -> str:
    """A link to an anchor of the API, or to a page, as Markdown."""
    if ":" not in place:
        return f"[[{place}]]"
    file, name = place.split(":")
    find(place)
    return f"[[api/{file}|{name}]]"


@functools.cache
def read_metrics() -> dict[str, tuple[str, str]]:
    """The name of a number, with * for a part that varies -> (unit, meaning)."""
    read = yaml.safe_load((ROOT / "book/metrics.yaml").read_text(encoding="utf-8"))
    return {name: (unit, said) for name, (unit, said) in read.items()}


def is_explained(metric: str) -> bool:
    """Whether the glossary has a number of a log: a held-out one by its name in training or in the log, where what an
    evaluator returns has `eval/` before it."""
    names = (metric, metric.removeprefix("eval/"), f"eval/{metric}")
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in read_metrics())


def known_metrics() -> set[str]:
    """Numbers that a log may hold: those that reports plot, and the keys of what objectives, rollouts, evaluators and
    the session return."""
    from llm_quest.report.metric_families import FAMILIES, SIDE_METRICS, WATCHED

    plotted = {metric for family in FAMILIES for metric, _ in family.lines}
    plotted |= {metric for metric, _, _ in WATCHED} | set(SIDE_METRICS)
    files = [file for part in METRIC_PACKAGES for file in sorted((PACKAGE / part).rglob("*.py") or ())]
    files += [PACKAGE / part for part in METRIC_PACKAGES if part.endswith(".py")]
    for file in files:
        plotted |= set(metric_keys(parse(file.relative_to(PACKAGE).as_posix())[1], plotted))
    return plotted


def metric_keys(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Keys of dictionaries that hold a known number, or (sum, count) pairs; and keys that are put into `metrics`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and node.keys:
            keys = [one.value for one in node.keys if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            pairs = all(isinstance(one, ast.Tuple) and len(one.elts) == 2 for one in node.values)
            if pairs or len(known.intersection(keys)) * 2 > len(keys):
                yield from keys
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "metrics":
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            yield from [key] if isinstance(key, str) else []


def metrics(markdown: Renderer) -> str:
    rows = [[code(name), html.escape(unit), markdown(said)] for name, (unit, said) in read_metrics().items()]
    said = markdown("What the numbers of `metrics.jsonl` and of a report are. A name with `*` stands for several.")
    return said + table(("number", "unit", "meaning"), rows)


def command_examples() -> dict[str, list[str]]:
    """A command -> the lines of README and docs that call it; tests hold that each of them runs."""
    found: dict[str, list[str]] = {}
    for file in (ROOT / "README.md", *map(guide_file, GUIDES)):
        for block in re.findall(r"^```\w*\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S):
            for line in re.split(r"\n|\s{2,}(?=quest )", re.sub(r"\\\n\s*", " ", block)):
                words = re.sub(r"\s+#.*", "", line).strip()
                if words.startswith("quest ") and words not in found.get(words.split()[1], []):
                    found.setdefault(words.split()[1], []).append(words)
    return found


def commands(markdown: Renderer) -> str:
    """Every command: what it does, its options, examples."""
    import typer

    from llm_quest.cli.main import app

    group: Any = typer.main.get_command(app)
    examples = command_examples()
    return "".join(command_section(name, one, examples.get(name, [])) for name, one in sorted(group.commands.items()))


def command_section(name: str, command: Any, examples: list[str]) -> str:
    said = html.escape(re.sub(r"\s+", " ", command.help or "").strip())
    rows = [
        [code(", ".join(one.opts)), html.escape(getattr(one, "help", None) or ""), code(default_of(one))]
        for one in command.params
        if one.name != "help"
    ]
    shown = color_code("\n".join(f"$ {one}" for one in examples[:4]), "console") if examples else ""
    inner = "".join(
        f"<h3 id='{name}-{sub}'><code>quest {name} {sub}</code></h3>{command_section('', one, [])}"
        for sub, one in getattr(command, "commands", {}).items()
    )
    head = f"<h2 id='{name}'><code>quest {name}</code></h2>" if name else ""
    options = table(("argument or option", "what it is for", "default"), rows) if rows else ""
    return f"{head}<p>{said}</p>{shown}{options}{inner}"


def default_of(parameter: Any) -> str:
    value = parameter.default
    return "" if value is None or callable(value) or value is False or value == () else str(value)


def settings(markdown: Renderer) -> str:
    """Every setting, once, with the recipes that have it."""
    from llm_quest.recipes import RECIPES
    from llm_quest.recipes.settings_reference import make_page

    found: dict[str, tuple[str, str, list[str]]] = {}
    for recipe in RECIPES:
        for one in make_page(recipe).settings:
            found.setdefault(one.key, (one.takes, one.description, []))[2].append(recipe)
    rows = [
        [code(key), html.escape(takes), html.escape(said),
         "all" if len(users) == len(RECIPES) else markdown(", ".join(f"[[recipe/{one}]]" for one in users))]
        for key, (takes, said, users) in sorted(found.items())
    ]  # fmt: skip
    return table(("setting", "takes", "what it is for", "recipes"), rows)


def techniques(markdown: Renderer) -> str:
    from llm_quest.cli.techniques import list_techniques

    parts = []
    for entry in list_techniques().entries:
        rows = [[code(one.name), html.escape(one.takes), code(one.default)] for one in entry.options]
        parts.append(f"<h2 id='{entry.name}'>{entry.name}</h2>")
        parts.append(markdown(f"{entry.summary} [[technique/{entry.name}]]"))
        parts.append(color_code(f"$ quest train {entry.command}", "console"))
        parts.append(table(("option", "takes", "default"), rows) if rows else "")
    return "".join(parts)


def page_names() -> dict[str, str]:
    """Keys of the reference's pages, as links name them -> their titles."""
    return {f"reference/{name}": title for name, title in (TABLES | GUIDES).items()}


def check_places() -> list[str]:
    """Entries of the glossary that name no code and no page."""
    keys, wrong = {one.key for one in all_subjects()}, []
    for name, (_, _, place) in read_glossary().items():
        try:
            if ":" in place:
                find(place)
            elif place not in keys:
                wrong.append(f"{name}: {place} is no page")
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    return wrong


def unknown_files(run: Path) -> list[str]:
    """Files of a run folder that `docs/files.md` does not name, itself or by the folder that they are in."""
    text = guide_file("files").read_text(encoding="utf-8")
    known = {name for cell in re.findall(r"^\| (`[^|]+) \|", text, re.M) for name in re.findall(r"`([^`]+)`", cell)}
    return [
        file.relative_to(run).as_posix()
        for file in sorted(run.rglob("*"))
        if file.is_file()
        and file.name not in known
        and not {f"{part}/" for part in file.relative_to(run).parts} & (known - {"checkpoints/"})
    ]


def unexplained_metrics(run: Path) -> list[str]:
    """Numbers of a run's log, and of the runs within it, that the glossary of metrics lacks."""
    logs = sorted(run.rglob("metrics.jsonl"))
    rows = [json.loads(line) for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    return [one for one in dict.fromkeys(key for row in rows for key in row) if not is_explained(one)]
