"""Run folders as the engine writes them, for the tests of whoever reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row(step: int, **more: Any) -> dict[str, Any]:
    """One row of metrics."""
    loss = 2.0 + 5.0 * math.exp(-step / 20)
    speed = {"tokens": step * 512, "tokens_per_second": 1000.0 + step, "train_seconds": step * 0.5, "skipped_steps": 0}
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0 + 1 / step, **speed, **more}


def write_finished_run(folder: Path, *, steps: int = 60, config: str = "seed: 0\noptimizer:\n  lr: 0.001\n") -> Path:
    """A run with everything a run can have."""
    rows = [row(step) for step in range(1, steps + 1)]
    rows[29] |= {"eval/loss": 3.3, "eval/bits_per_byte": 2.5}
    rows[-1] |= {"eval/loss": 2.9, "eval/bits_per_byte": 2.125}
    write_rows(folder / "metrics.jsonl", rows)
    events = [{"time": "2026-01-01T10:00:00.000+00:00", "event": "started", "steps": steps}]
    write_rows(folder / "events.jsonl", events)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    write_json(folder / "env.json", {"python": "3.11", "warnings": [["no compiler", "install g++"]]})
    write_json(folder / "model.json", {"page": "llama"})
    baselines = {"unigram, bytes": 4.5, "Kneser-Ney 5-gram, bytes": 2.25}
    end = {"status": "finished", "step": steps, "parameters": 12_345, "baselines": baselines}
    write_json(folder / "summary.json", end)
    ledger = {"kept": {"documents": 9, "bytes": 999}, "dropped": {"empty": {"documents": 3, "bytes": 0}}, "notes": []}
    corpus = {"name": "builtin:topics", "drop_report": ledger}
    facts = {"train_documents": 8, "train_bytes": 900, "train_tokens": 300, "corpus": corpus}
    write_json(folder / "data.json", facts)
    planned = {
        "tokens_per_step": 512,
        "tokens_per_second": 2000.0,
        "step_seconds": 0.256,
        "memory": {"weights": 49_380},
    }
    write_json(folder / "plan.json", planned | {"parameters": 12_345})
    for step in (20, 40, 60):
        told = [{"prompt": "The ", "text": f"answer of step {step}"}]
        write_json(folder / "samples" / f"step-{step:08d}.json", {"step": step, "samples": told})
    return folder
