"""READMEs of the package's folders, for readers on a code host: what a package is for, its modules with their first
sentences, the chapters that explain it. `python -m book.readmes` writes them, `--check` compares them with the tree."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from book.api import as_text, first_sentence
from book.site import chapter_files, chapter_title
from book.source import PACKAGE, parse, split_mistakes

SAID = {
    "cost": "FLOPs, memory and time of a model or a run, before it begins.",
    "eval": "Measures: perplexity and bits per byte, classifiers, problems with verifiers, policies, lm-eval.",
    "report": "The HTML report of runs: record, plots, text; nothing is loaded from elsewhere.",
    "rollouts": "Samples of a policy: prompts, sampling, episodes, rewards, advantages, and the rows to train on.",
}
"""Of packages whose `__init__.py` says nothing."""
CHAPTERS = {
    "cli": ["text-and-tokens", "evaluation"], "cost": ["llama", "deepseek"], "data": ["text-and-tokens", "fine-tuning"],
    "eval": ["evaluation", "ngrams"], "experiments": ["evaluation"], "generation": ["generation"], "hub": ["llama"],
    "layers": ["attention", "llama", "experts", "deepseek", "recurrence"], "machine": ["training"],
    "models": ["gpt2", "llama", "gemma", "experts", "deepseek", "recurrence", "images"],
    "objectives": ["gpt2", "preferences", "reinforcement"], "papers": ["evaluation"], "recipes": ["training"],
    "report": ["training"], "rollouts": ["reinforcement", "reasoning"], "serve": ["generation"],
    "techniques": ["long-context", "fine-tuning", "deepseek"], "train": ["training"],
}  # fmt: skip
GUIDES = {
    "cli": ["cli"], "data": ["rows"], "experiments": ["ablate", "agents"], "hub": ["gguf", "files"],
    "objectives": ["alignment"], "recipes": ["settings", "cli"], "rollouts": ["reasoning"], "serve": ["serve"],
    "train": ["reliability"],
}  # fmt: skip


def packages() -> list[str]:
    """The packages that have a README."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def make_readme(package: str) -> str:
    """The text of a package's README."""
    docstring = split_mistakes(ast.get_docstring(parse(f"{package}/__init__.py")[1]) or "")[0]
    said = as_markdown(docstring or SAID[package])
    titles = {file.stem.split("-", 1)[1]: file for file in chapter_files()}
    chapters = ", ".join(
        f"[{chapter_title(titles[one])}](../../book/chapters/{titles[one].name})" for one in CHAPTERS[package]
    )
    guides = [f"[docs/{one}](../../docs/{one}{'' if one == 'settings' else '.md'})" for one in GUIDES.get(package, [])]
    more = f"\nGuides: {', '.join(guides)}.\n" if guides else ""
    rows = "\n".join(f"| [{place}]({place}) | {summary} |" for place, summary in modules(package))
    return (
        f"# llm_quest/{package}\n\n{said}\n\nChapters of the book: {chapters}. `make book` builds it, with a page "
        f"for every module, class and function.\n{more}\n| module | what it is |\n| --- | --- |\n{rows}\n"
    )


def as_markdown(docstring: str) -> str:
    """Drawings of a docstring as code: paragraphs whose lines are indented or laid out in columns."""
    parts = []
    for part in docstring.split("\n\n"):
        drawn = any("   " in line.strip() or line.startswith("    ") for line in part.splitlines())
        parts.append(f"```text\n{part}\n```" if drawn else part)
    return as_text("\n\n".join(parts))


def modules(package: str) -> list[tuple[str, str]]:
    """(file, first sentence) of each module of a package."""
    found = []
    for path in sorted((PACKAGE / package).rglob("*.py")):
        if path.name != "__init__.py":
            text = first_sentence(parse(path.relative_to(PACKAGE).as_posix())[1])
            found.append((path.relative_to(PACKAGE / package).as_posix(), as_text(text).replace("|", "\\|")))
    return found


def readme_file(package: str) -> Path:
    return PACKAGE / package / "README.md"


def stale() -> list[str]:
    """Packages whose README is not what would be written."""
    return [
        one
        for one in packages()
        if not readme_file(one).is_file() or readme_file(one).read_text(encoding="utf-8") != make_readme(one)
    ]


def dead_links(file: Path) -> list[str]:
    """Links of a Markdown file that lead to no file."""
    found = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", file.read_text(encoding="utf-8"))
    return [one for one in found if not (file.parent / one).exists()]


def main() -> int:
    if "--check" in sys.argv:
        print("\n".join(stale()) or "every README is that of the tree")
        return 1 if stale() else 0
    for package in packages():
        readme_file(package).write_text(make_readme(package), encoding="utf-8")
        print(readme_file(package).relative_to(PACKAGE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
