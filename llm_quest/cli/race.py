"""`quest race`: trains an entry under the race's rules and scores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.cli.output import command_line
from llm_quest.contracts import LogFn
from llm_quest.experiments.code_tree import own_code
from llm_quest.experiments.race import RaceRules, describe_entry, run_race
from llm_quest.experiments.worker_pool import exclusive_pool


@dataclass(frozen=True)
class RaceReport:
    """An entry's result."""

    result: Mapping[str, Any]
    ledger: Path

    def as_json(self) -> dict[str, Any]:
        return {**self.result, "ledger": str(self.ledger)}

    def lines(self) -> list[str]:
        return [describe_entry(self.result), f"ledger: {self.ledger} ({self.result['experiment']})"]


def enter_race(recipe: str, pairs: Sequence[str], seeds: int, jobs: int, *, out: Path, log: LogFn) -> RaceReport:
    """Run an entry below the folder `out`, or go on with it."""
    out.mkdir(parents=True, exist_ok=True)
    with exclusive_pool(out, jobs, "another entry is running; wait, or choose another --out") as pool:
        result = run_race(
            recipe, pairs, seeds, RaceRules(), root=out, code=own_code(), pool=pool, log=log, command=command_line()
        )
    return RaceReport(result, out / "ledger.jsonl")
