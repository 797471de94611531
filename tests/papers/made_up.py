"""What a size of a card holds, made up."""

from __future__ import annotations

from typing import Any

from llm_quest.papers import Paper


def make_result(paper: Paper, outcome: str, differences: list[float], parameters: int = 250_000) -> dict[str, Any]:
    """A size at which the claim's arm differs by these numbers."""
    arm = {
        "parameters": parameters, "steps": 9, "flops": 1e9, "shared_weights": 1.0, "rates": {"0.01": 4.0},
        "learning_rate": 0.01, "values": [4.0 + d for d in differences],
    }  # fmt: skip
    verdict = {
        "arm": next(iter(paper.arms)), "outcome": outcome, "size": "", "reason": "", "pairs": len(differences),
        "seeds": list(range(1, len(differences) + 1)), "differences": differences, "mean": sum(differences) / 4,
        "median": differences[0], "standard_deviation": 0.01, "interval_95": [-0.6, -0.4], "evidence": [1.0, 20.0],
        "threshold": 7.05, "pairing_gain": 2.0, "diverged": [], "control_diverged": [], "secondary": {},
    }  # fmt: skip
    return {
        "experiment": "x", "code": "c", "torch": "2", "date": "2026-01-02", "machine": "a processor", "runs": 9,
        "cpu_seconds": 100, "verdicts": [verdict], "arms": {"control": arm, verdict["arm"]: arm},
        "noise": {"run_sd": 0.02}, "notes": [],
    }  # fmt: skip
