"""`quest diff A B`: compares two model families.

Prints the docstring of the later family, the layers that it removes and adds with the sentence that defines each, the
numbers of two models of similar size, and the code of `Config`, `block` and `assemble` as a diff."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
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
from llm_quest.models.build import build_meta_model, family_of, preset, presets
from llm_quest.models.family import Family

CODE_PARTS = ("Config", "block", "assemble")
STYLE_CODES = {"heading": "\033[1m", "removed": "\033[31m", "added": "\033[32m", "same": "", "faint": "\033[2m"}
StyledLine = tuple[str, str]


@dataclass(frozen=True)
class FamilyDiff:
    """The differences from `a` to `b`. docstring: of b's file. removed, added, shared: layers with their defining
    sentence. numbers: (name, of a, of b). code: the lines of each definition as (style, text): removed, added,
    same."""

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

    def lines(self, *, color: bool = False) -> list[str]:
        """The comparison as lines. color: with terminal colors (all of the text is our own source)."""
        return [colorize(style, text) if color else text for style, text in self.style_lines()]

    def style_lines(self) -> Iterator[StyledLine]:
        """Yield (style, line); styles: heading, removed, added, same, faint."""
        yield "heading", self.title
        if self.docstring:
            yield "same", ""
            yield from (("same", line) for line in self.docstring)
        if self.removed or self.added:
            yield "same", ""
            yield "heading", "Layers"
            yield from (("removed", f"- {line}") for line in layer_lines(self.removed))
            yield from (("added", f"+ {line}") for line in layer_lines(self.added))
            yield "faint", f"  both: {', '.join(self.shared)}"
        yield "same", ""
        yield "heading", "Numbers"
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
                f"Code: {name}" + ("" if any(style != "same" for style, _ in lines) else ", the same in both"),
            )
            if any(style != "same" for style, _ in lines):
                yield from ((style, f"{DIFF_MARKS[style]} {text}".rstrip()) for style, text in lines)

    def numbers_table(self) -> list[tuple[str, str, str]]:
        """The numbers with their column heads."""
        return [("", self.a, self.b), *self.numbers]


DIFF_MARKS = {"removed": "-", "added": "+", "same": " "}


def diff_families(a: str, b: str) -> FamilyDiff:
    """Compare two families or presets, by name. Of two families the presets of most similar size are compared; of two
    presets of one family only the numbers."""
    if a == b:
        raise UsageError(f"{a} and {a} are the same; name two families or presets (quest models lists them)")
    family_a, family_b = resolve_family(a), resolve_family(b)
    if family_a is family_b:
        return FamilyDiff(
            a,
            b,
            f"{a} and {b}: two sizes of one family ({family_a.name}.py)",
            (),
            {},
            {},
            (),
            compare_numbers(a, b),
            {},
        )
    left, right = closest_presets(candidate_presets(a, family_a), candidate_presets(b, family_b))
    old_layers, new_layers = family_layers(family_a), family_layers(family_b)
    return FamilyDiff(
        a=left.name,
        b=right.name,
        title=f"From {family_a.name} to {family_b.name}  (llm_quest/models: {family_a.name}.py, {family_b.name}.py)",
        docstring=tuple(family_docstring(family_b).splitlines()),
        removed={name: text for name, text in old_layers.items() if name not in new_layers},
        added={name: text for name, text in new_layers.items() if name not in old_layers},
        shared=tuple(name for name in old_layers if name in new_layers),
        numbers=compare_numbers(left.name, right.name),
        code={
            name: tuple(diff_lines(definition_source(family_a, name), definition_source(family_b, name)))
            for name in CODE_PARTS
        },
    )


def resolve_family(name: str) -> Family:
    """The family of that name, or the family of a preset."""
    for family in ALL_FAMILIES:
        if family.name == name:
            return family
    return family_of(find_config(name)[1])


def candidate_presets(name: str, family: Family) -> list[Preset]:
    """The presets that a name stands for: the published sizes of a family, or one preset."""
    if name in presets() and name != family.name:
        return [preset(name)]
    return [one for one in family.presets if one.num_parameters] or list(family.presets)


def closest_presets(ours: list[Preset], theirs: list[Preset]) -> tuple[Preset, Preset]:
    """The pair whose parameter counts differ by the smallest factor."""
    pairs = [(a, b) for a in ours for b in theirs]
    return min(pairs, key=lambda pair: abs(math.log((pair[0].num_parameters or 1) / (pair[1].num_parameters or 1))))


def compare_numbers(left: str, right: str) -> tuple[tuple[str, str, str], ...]:
    """Rows of (name, of left, of right): the config fields, then parameters, cache and FLOPs at a context that both
    have."""
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


def family_layers(family: Family) -> Mapping[str, str]:
    """The layers that a family imports from layers/, and those of the families that it builds on which its models have
    -> the first sentence of each docstring."""
    return layers_by_family(family.name)


@functools.cache
def layers_by_family(name: str) -> Mapping[str, str]:
    """`family_layers`, found once."""
    family = next(one for one in ALL_FAMILIES if one.name == name)
    module = inspect.getmodule(family.assemble)
    assert module is not None, "assemble is defined in the family's file"
    own = layer_imports(module)
    built_on: dict[str, str] = {}
    for parent in parent_families(module):
        built_on |= layers_by_family(parent)
    used = set().union(*(layer_names_in(one.config) for one in family.presets if one.name.endswith("-tiny")))
    inherited = {name: text for name, text in built_on.items() if name in used}
    return {name: first_sentence(thing) for name, thing in own.items()} | inherited


def layer_imports(module: ModuleType) -> dict[str, Any]:
    """Name -> object of the imports from layers/ in a family's file."""
    imports: dict[str, Any] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llm_quest.layers."):
            home = importlib.import_module(str(node.module))
            imports |= {name.name: vars(home)[name.name] for name in node.names}
    return imports


def parent_families(module: ModuleType) -> list[str]:
    """The families whose files a family's file imports: it is one of them with a difference."""
    named = {inspect.getmodule(family.assemble): family.name for family in ALL_FAMILIES}
    return [named[value] for value in vars(module).values() if inspect.ismodule(value) and value in named]


def layer_names_in(config: Any) -> set[str]:
    """The names of the layers, rotations, scalings and activations that a model is made of."""
    modules = list(build_meta_model(config).modules())
    parts = [part for module in modules for part in vars(module).values()]
    parts += [getattr(part, "scaling", None) for part in parts]
    return {type(module).__name__ for module in (*modules, *parts)} | {getattr(part, "__name__", "") for part in parts}


def first_sentence(thing: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    for stop in range(len(text)):
        if text[stop] == "." and text[stop + 1 : stop + 2] in ("", " ") and text[stop + 2 : stop + 3].isupper():
            return text[:stop]
    return text.rstrip(".")


def layer_lines(layers: dict[str, str]) -> list[str]:
    """Lines of (name, sentence) in two columns."""
    return align_columns(list(layers.items())) if layers else []


def definition_source(family: Family, name: str) -> list[str]:
    """The source lines of a definition in a family's file; empty if there is none (LLaVA has no block)."""
    module = inspect.getmodule(family.assemble)
    if name not in vars(module):
        return []
    return inspect.getsource(vars(module)[name]).splitlines()


def diff_lines(old: list[str], new: list[str]) -> Iterator[StyledLine]:
    """A full line diff; removed lines come before the added lines that replace them."""
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from (("same", line) for line in old[i:j])
        else:
            yield from (("removed", line) for line in old[i:j])
            yield from (("added", line) for line in new[k:m])


def colorize(style: str, text: str) -> str:
    return f"{STYLE_CODES[style]}{text}\033[0m" if STYLE_CODES[style] and text else text
