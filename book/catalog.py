"""What has a page: every family, layer, technique, objective, recipe, generation method and paper of the package. The
lists are the package's own tables, so that an addition without a page cannot be built."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from book.source import PACKAGE, ROOT

KINDS = {
    "family": "Families",
    "layer": "Layers",
    "technique": "Techniques",
    "objective": "Objectives",
    "generation": "Generation",
    "recipe": "Recipes",
    "paper": "Papers",
}
QUESTIONS = ROOT / "book/questions.yaml"


@dataclass(frozen=True)
class Subject:
    """The subject of a page. file: its source, relative to `llm_quest/`; anchor: the class or function that is it, or
    nothing where the whole file is."""

    kind: str
    name: str
    file: str
    anchor: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def path(self) -> str:
        """The page's file, relative to the site."""
        return f"{self.kind}/{self.name}.html"


def source_file(thing: object) -> str:
    return Path(inspect.getfile(thing)).resolve().relative_to(PACKAGE).as_posix()  # type: ignore[arg-type]


def all_subjects() -> list[Subject]:
    """Every subject, by kind and then in the order of the package's tables."""
    return [*families(), *modules("layer", "layers"), *techniques(), *modules("objective", "objectives"),
            *modules("generation", "generation"), *recipes(), *papers()]  # fmt: skip


def families() -> Iterator[Subject]:
    from llm_quest.cli.models import ALL_FAMILIES

    for family in ALL_FAMILIES:
        module = inspect.getmodule(family.assemble)
        yield Subject("family", family.name, source_file(module))


def modules(kind: str, package: str) -> Iterator[Subject]:
    """A page for each file of a package."""
    for file in sorted((PACKAGE / package).rglob("*.py")):
        if file.stem != "__init__":
            yield Subject(kind, file.stem, file.relative_to(PACKAGE).as_posix())


def techniques() -> Iterator[Subject]:
    from llm_quest.techniques import TECHNIQUES, TRAINING_TECHNIQUES

    for name, technique in (TECHNIQUES | TRAINING_TECHNIQUES).items():
        yield Subject("technique", name, source_file(technique), technique.__name__)


def recipes() -> Iterator[Subject]:
    from llm_quest.recipes import RECIPES

    for name, module in RECIPES.items():
        yield Subject("recipe", name, module.removeprefix("llm_quest.").replace(".", "/") + ".py")


def papers() -> Iterator[Subject]:
    from llm_quest.papers import PAPERS

    files = {file.name: file.read_text(encoding="utf-8") for file in (PACKAGE / "papers/claims").glob("*.yaml")}
    for name in PAPERS:
        file = next(file for file, text in files.items() if f"\n{name}:\n" in f"\n{text}" and file != "benches.yaml")
        yield Subject("paper", name, f"papers/claims/{file}", name)


def read_questions() -> dict[str, str]:
    """KIND/NAME -> the question that its page answers."""
    return {key: line.rpartition(" | ")[2] for key, line in read_lines().items()}


def read_titles() -> dict[str, str]:
    """KIND/NAME -> the title of its page, in the words of its field; empty for a paper."""
    return {key: line.rpartition(" | ")[0] for key, line in read_lines().items()}


@cache
def read_lines() -> dict[str, str]:
    """KIND/NAME -> its line: TITLE | QUESTION, or QUESTION."""
    read = yaml.safe_load(QUESTIONS.read_text(encoding="utf-8"))
    return {f"{kind}/{name}": line for kind, named in read.items() for name, line in named.items()}
