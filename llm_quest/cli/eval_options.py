"""What `quest eval` measures, and which options each measure has: one that would have no effect is refused."""

from __future__ import annotations

from collections.abc import Mapping

from llm_quest.errors import UsageError

SAMPLED = ("--samples", "--vote", "--best-of")
EVAL_MEASURES: dict[str, tuple[str, ...]] = {
    "": (),
    "--data": ("--tokens",),
    "--task": ("--tokens", "--problems", "--part", "--temperature", *SAMPLED, "--reward-model", "--chat"),
    "--harness": ("--problems",),
}
"""What is measured -> its options. "": what a run held out."""
NEEDS: dict[str, tuple[str, ...]] = {
    "--temperature": SAMPLED,
    "--best-of": ("--reward-model",),
    "--reward-model": ("--best-of",),
}
"""Option -> those of which it needs one."""


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
