"""`freeze: ["model.embed_tokens.*"]`: parameters that are not trained, by name.

A pattern is a shell's (`*` also matches dots) and is compared with our names (`embed.token.weight`) and with the
published ones (`model.embed_tokens.weight`)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import UsageError
from llm_quest.hub.weight_map import compact_names, export_weight_map, weight_views
from llm_quest.models.build import family_of


def freeze_parameters(model: Any, patterns: Sequence[str], log: LogFn) -> None:
    """Exclude every parameter that one of the patterns names from training. UsageError for a pattern that matches
    nothing, or only some of the published tensors that are one matrix here."""
    published = published_tensors(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen: set[str] = set()
    for pattern in patterns:
        matched = match_parameters(pattern, published)
        if not matched:
            raise UsageError(f"freeze: {pattern!r} matches no parameter of this model{near_names(pattern, published)}")
        if not matched & set(trained) and trained:
            log(
                f"freeze: {pattern!r} changes nothing: all that it names is frozen already; trained is {trained[0]} ..."
            )
        frozen |= matched
    named = dict(model.named_parameters())
    for name in frozen:
        named[name].requires_grad_(False)
    learned = sum(p.numel() for p in named.values() if p.requires_grad)
    whole = sum(p.numel() for p in named.values())
    log(f"frozen: {compact_names(frozen)}; {learned:,} of {whole:,} numbers are trained ({learned / whole:.3%})")


def published_tensors(model: Any) -> dict[str, list[str]]:
    """Our parameter names -> the published tensors that each holds."""
    table = export_weight_map(model, family_of(model.config).weight_map(model.config))
    published: dict[str, list[str]] = {name: [] for name, _ in model.named_parameters()}
    for name, view in weight_views(model, table).items():
        published[view.parameter].append(name)
    return published


def match_parameters(pattern: str, published: dict[str, list[str]]) -> set[str]:
    """The parameters that a pattern names, as a whole."""
    matched = set()
    for name, parts in published.items():
        hit = [part for part in parts if fnmatchcase(part, pattern)]
        if fnmatchcase(name, pattern) or (hit and len(hit) == len(parts)):
            matched.add(name)
        elif hit:
            rest = [part for part in parts if part not in hit]
            raise UsageError(
                f"freeze: {pattern!r} matches {hit[0]}, which is one matrix with {', '.join(rest)} here ({name}): "
                "freeze them together"
            )
    return matched


def near_names(pattern: str, published: dict[str, list[str]]) -> str:
    """The names that are most like a pattern."""
    known = [name for own, parts in published.items() for name in (own, *parts)]
    near = difflib.get_close_matches(pattern.replace("*", "weight"), known, n=3, cutoff=0.4)
    return f"; near it are {', '.join(near)}" if near else f"; there are {compact_names(published)}"
