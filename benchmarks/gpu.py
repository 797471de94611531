"""What a CUDA device computes and how fast, in one command of at most eight minutes.

python -m benchmarks.gpu [--minutes 8] [--out runs/gpu] [--only laws,attention,training,decoding,grpo]

Laws first (every family on the device against the CPU, float32 and bfloat16, eager, compiled and as a CUDA graph), then
the attention kernels, then speed: training and decoding a Llama of 1B, and a GRPO step against TRL. Every result is
written when it is known: results.jsonl has a line, results.md a row. A stage has a share of the minutes; what does not
fit is a row that says so. Without CUDA: "not run", and exit code 0. `--device cpu --tiny` runs the same code on small
shapes (a test does).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu_laws import attention_kernels, laws
from benchmarks.gpu_rows import decoding, grpo, peaks, training
from benchmarks.gpu_setting import Result, Setting
from tests.laws.subjects import TINY

Stage = Callable[[Setting], Iterator[Result]]


@dataclass(frozen=True)
class Share:
    """A stage and its share of the minutes."""

    stage: Stage
    share: float


STAGES: dict[str, Share] = {
    "peaks": Share(peaks, 0.05),
    "laws": Share(laws, 0.35),
    "attention": Share(attention_kernels, 0.1),
    "training": Share(training, 0.2),
    "decoding": Share(decoding, 0.2),
    "grpo": Share(grpo, 0.1),
}
"""In the order in which they run. Time that a stage leaves is the next one's."""


class Report:
    """results.jsonl and results.md in a folder, complete after every result."""

    def __init__(self, folder: Path, title: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.table = folder / "results.jsonl", folder / "results.md"
        self.lines.write_text("")
        self.table.write_text(f"{title}\n\n| stage | what | result |\n| --- | --- | --- |\n")

    def write(self, stage: str, result: Result) -> None:
        with self.lines.open("a") as lines:
            lines.write(json.dumps({"stage": stage, **asdict(result)}) + "\n")
        row = f"| {stage} | {result.name} | {result.text()} |"
        with self.table.open("a") as table:
            table.write(row + "\n")
        print(row, flush=True)


def run_stage(stage: Stage, setting: Setting) -> Iterator[Result]:
    """The stage's results until its time is up. An error is a result, too: the other stages run."""
    try:
        for result in stage(setting):
            yield result
            if setting.time_is_up():
                yield Result("the rest", "not run: the stage's time is up")
                return
    except Exception as error:
        yield Result("stopped", f"{type(error).__name__}: {str(error)[:300]}", ok=False)


def run(setting: Setting, report: Report, chosen: list[str], seconds: float) -> int:
    """Run the chosen stages; returns how many results are failures."""
    end, failures = time.monotonic() + seconds, 0
    left = sum(STAGES[name].share for name in chosen)
    for name in chosen:
        part = STAGES[name].share / left
        setting.deadline = time.monotonic() + part * (end - time.monotonic())
        left -= STAGES[name].share
        for result in run_stage(STAGES[name].stage, setting):
            report.write(name, result)
            failures += result.ok is False
    return failures


def describe(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"# {name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--families", default=",".join(TINY), help="presets whose laws are judged")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, no generated code")
    given = parser.parse_args(arguments)
    chosen, families = given.only.split(","), given.families.split(",")
    for kind, names, known in (("stage", chosen, STAGES), ("preset", families, TINY)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"no {kind} is called {', '.join(unknown)}; known: {', '.join(known)}")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("not run: this machine has no CUDA device (torch.cuda.is_available() is False)")
        return 0
    warnings.filterwarnings("ignore")
    report = Report(given.out, describe(device))
    failures = run(Setting(device, given.tiny, families), report, chosen, 60 * given.minutes)
    print(f"\n{report.table}: {failures} failures" if failures else f"\n{report.table}: no failures")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
