"""The measures of `quest eval` and the options of each: an option that would have no effect is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_quest.errors import UsageError

SAMPLED = ("--samples", "--vote", "--best-of")
CHAT = ("--chat", "--system", "--chat-template-kwargs")
EVAL_MEASURES: dict[str, tuple[str, ...]] = {
    "": (),
    "--data": ("--tokens",),
    "--task": (
        "--tokens", "--problems", "--part", "--temperature", *SAMPLED, "--reward-model", "--refine", "--refine-prompts",
        *CHAT,
    ),
    "--harness": ("--problems", "--fewshot", "--fewshot-as-multiturn", *CHAT),
}  # fmt: skip
"""What is measured -> its options. "": what a run held out."""
NEEDS: dict[str, tuple[str, ...]] = {
    "--temperature": SAMPLED,
    "--best-of": ("--reward-model",),
    "--reward-model": ("--best-of",),
    "--refine-prompts": ("--refine",),
    "--fewshot-as-multiturn": ("--chat",),
}
"""Option -> those of which it needs one."""


@dataclass(frozen=True)
class ChatOptions:
    """The form of the prompts of problems. chat: whether through the chat template; None: as a run was trained, else as
    plain text. system: a system message; None: the run's. template_kwargs: arguments of the template; empty: the
    run's."""

    chat: bool | None = None
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def check_eval_options(measures: Mapping[str, object], options: Mapping[str, object]) -> None:
    """UsageError for two measures at once, for an option that belongs to another measure, and for one that needs
    another. measures, options: as given; None or "": not given."""
    chosen = [name for name, value in measures.items() if value]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} measure different things: give one of them")
    measure = chosen[0] if chosen else ""
    given = [name for name, value in options.items() if value is not None]
    for name in given:
        if name not in EVAL_MEASURES[measure]:
            of = [one or "a run's own measure" for one, names in EVAL_MEASURES.items() if name in names]
            where = f"with {measure}" if measure else "on what a run held out"
            raise UsageError(f"{name} has no effect {where}: it belongs to {' and '.join(of)}; leave it out")
        needed = NEEDS.get(name, ())
        if needed and not set(needed) & set(given):
            raise UsageError(f"{name} has no effect without {' or '.join(needed)}: give one of them, or leave it out")
