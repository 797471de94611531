"""`quest diff A B`: two pages of the house read side by side, as the lesson their difference is.

First what the later page says is new, in its own words; then which layers leave, come and stay, each with the sentence
that defines it; then the numbers of two sizes; at last the code of `Config`, `block` and `assemble`, line against
line."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from llm_quest.cli.models import (
    ALL_FAMILIES,
    DEFAULT_CONTEXT,
    ModelCard,
    family_docstring,
    find_config,
    make_model_card,
)
from llm_quest.contracts import Preset
from llm_quest.errors import UsageError
from llm_quest.formatting import align_columns, format_bytes
from llm_quest.models.build import family_of, preset, presets
from llm_quest.models.family import Family

CODE_PARTS = ("Config", "block", "assemble")
STYLE_CODES = {"heading": "\033[1m", "gone": "\033[31m", "new": "\033[32m", "same": "", "faint": "\033[2m"}
StyledLine = tuple[str, str]


@dataclass(frozen=True)
class FamilyDiff:
    """From `a` to `b`. docstring: what b's page says of itself. removed, added, shared: layers with their defining
    sentence. numbers: (name, a's, b's). code: per definition its lines, each a (style, text): gone, new, same."""

    a: str
    b: str
    title: str
    docstring: tuple[str, ...]
    removed: dict[str, str]
    added: dict[str, str]
    shared: tuple[str, ...]
    numbers: tuple[tuple[str, str, str], ...]
    code: dict[str, tuple[StyledLine, ...]]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, *, colour: bool = False) -> list[str]:
        """For people. colour: with terminal colours (all text here is our own source, none of it from strangers)."""
        return [colorize(style, text) if colour else text for style, text in self.styled_lines()]

    def styled_lines(self) -> Iterator[StyledLine]:
        """(style, line) pairs; styles: heading, gone, new, same, faint."""
        yield "heading", self.title
        if self.docstring:
            yield "same", ""
            yield from (("same", line) for line in self.docstring)
        if self.removed or self.added:
            yield "same", ""
            yield "heading", "The layers"
            yield from (("gone", f"- {line}") for line in layer_lines(self.removed))
            yield from (("new", f"+ {line}") for line in layer_lines(self.added))
            yield "faint", f"  both: {', '.join(self.shared)}"
        yield "same", ""
        yield "heading", "The numbers"
        yield from (
            ("same" if a != b else "faint", line)
            for (_, a, b), line in zip(
                self.numbers_table(), align_columns(self.numbers_table(), right=(1, 2)), strict=True
            )
        )
        for name, lines in self.code.items():
            yield "same", ""
            yield (
                "heading",
                f"The code: {name}" + ("" if any(style != "same" for style, _ in lines) else ", the same in both"),
            )
            if any(style != "same" for style, _ in lines):
                yield from ((style, f"{DIFF_MARKS[style]} {text}".rstrip()) for style, text in lines)

    def numbers_table(self) -> list[tuple[str, str, str]]:
        """The numbers under their column heads."""
        return [("", self.a, self.b), *self.numbers]


DIFF_MARKS = {"gone": "-", "new": "+", "same": " "}


def diff_families(a: str, b: str) -> FamilyDiff:
    """The lesson from a to b; each a page's or a preset's name. Two pages: their sizes nearest to each other are
    compared; two presets of one page: only their numbers."""
    if a == b:
        raise UsageError(f"{a} and {a} are the same; name two pages or presets (quest models lists them)")
    page_a, page_b = resolve_family(a), resolve_family(b)
    if page_a is page_b:
        return FamilyDiff(
            a,
            b,
            f"{a} and {b}: two sizes of one page ({page_a.name}.py)",
            (),
            {},
            {},
            (),
            compare_numbers(a, b),
            {},
        )
    left, right = closest_presets(candidate_presets(a, page_a), candidate_presets(b, page_b))
    gone, new = family_layers(page_a), family_layers(page_b)
    return FamilyDiff(
        a=left.name,
        b=right.name,
        title=f"From {page_a.name} to {page_b.name}  (llm_quest/models: {page_a.name}.py, {page_b.name}.py)",
        docstring=tuple(family_docstring(page_b).splitlines()),
        removed={name: text for name, text in gone.items() if name not in new},
        added={name: text for name, text in new.items() if name not in gone},
        shared=tuple(name for name in gone if name in new),
        numbers=compare_numbers(left.name, right.name),
        code={
            name: tuple(diff_lines(definition_source(page_a, name), definition_source(page_b, name)))
            for name in CODE_PARTS
        },
    )


def resolve_family(name: str) -> Family:
    """The page of that name, or the page of a preset."""
    for family in ALL_FAMILIES:
        if family.name == name:
            return family
    return family_of(find_config(name)[1])


def candidate_presets(name: str, family: Family) -> list[Preset]:
    """What a name stands for: a page's published sizes, or one preset."""
    if name in presets() and name != family.name:
        return [preset(name)]
    return [one for one in family.presets if one.num_parameters] or list(family.presets)


def closest_presets(ours: list[Preset], theirs: list[Preset]) -> tuple[Preset, Preset]:
    """The pair whose parameter counts differ by the smallest factor."""
    pairs = [(a, b) for a in ours for b in theirs]
    return min(pairs, key=lambda pair: abs(math.log((pair[0].num_parameters or 1) / (pair[1].num_parameters or 1))))


def compare_numbers(left: str, right: str) -> tuple[tuple[str, str, str], ...]:
    """Field by field: the configs', then what follows from them, both at a context that both have."""
    context = min(
        DEFAULT_CONTEXT, find_config(left)[1].max_position_embeddings, find_config(right)[1].max_position_embeddings
    )
    a, b = make_model_card(left, context=context), make_model_card(right, context=context)
    fields = dict.fromkeys([*a.numbers, *b.numbers])
    rows = [
        (field, format_value(a.numbers.get(field, "-")), format_value(b.numbers.get(field, "-"))) for field in fields
    ]
    rows.append(("parameters", f"{a.parameters:,}", f"{b.parameters:,}"))
    rows += [
        (f"  {part}", format_part_share(a, part), format_part_share(b, part))
        for part in dict.fromkeys([*a.parts, *b.parts])
    ]
    if a.image_tokens or b.image_tokens:
        rows.append(("tokens of an image", f"{a.image_tokens:,}", f"{b.image_tokens:,}"))
        rows.append(("GFLOPs of reading an image", f"{a.flops_image / 1e9:.4g}", f"{b.flops_image / 1e9:.4g}"))
    rows.append(("cache bytes per token (bfloat16)", f"{a.cache_per_token:,}", f"{b.cache_per_token:,}"))
    rows.append((f"cache at {context:,} tokens", format_bytes(a.cache_total), format_bytes(b.cache_total)))
    rows.append((f"GFLOPs per token at {context:,} tokens", f"{a.flops / 1e9:.4g}", f"{b.flops / 1e9:.4g}"))
    return tuple(rows)


def format_value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def format_part_share(card: ModelCard, part: str) -> str:
    return f"{card.parts.get(part, 0) / card.parameters:.1%}"


def family_layers(family: Family) -> dict[str, str]:
    """The layers a page takes from the ground floor -> the first sentence each says about itself."""
    module = inspect.getmodule(family.assemble)
    assert module is not None, "a page's assemble lives in its file"
    found: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_quest.layers."):
            home = importlib.import_module(str(node.module))
            found |= {name.name: first_sentence(vars(home)[name.name]) for name in node.names}
    return found


def first_sentence(thing: Any) -> str:
    """Of a docstring, up to the first full stop that ends one."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    for stop in range(len(text)):
        if text[stop] == "." and text[stop + 1 : stop + 2] in ("", " ") and text[stop + 2 : stop + 3].isupper():
            return text[:stop]
    return text.rstrip(".")


def layer_lines(layers: dict[str, str]) -> list[str]:
    """name  sentence, the names in a column."""
    return align_columns(list(layers.items())) if layers else []


def definition_source(family: Family, name: str) -> list[str]:
    """The lines of one definition in a page's file; none where it has none (a page made of two others has no block)."""
    module = inspect.getmodule(family.assemble)
    if name not in vars(module):
        return []
    return inspect.getsource(vars(module)[name]).splitlines()


def diff_lines(old: list[str], new: list[str]) -> Iterator[StyledLine]:
    """Line against line, in full: what is gone before what is new."""
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from (("same", line) for line in old[i:j])
        else:
            yield from (("gone", line) for line in old[i:j])
            yield from (("new", line) for line in new[k:m])


def colorize(style: str, text: str) -> str:
    return f"{STYLE_CODES[style]}{text}\033[0m" if STYLE_CODES[style] and text else text
