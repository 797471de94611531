"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems whose worked answers end in `#### 72`.

A file of JSON lines with `question` and `answer` (as published); `hub.gsm8k` reads the hub's as well. The published
test file is for testing: whoever chooses a checkpoint by it has trained on it; `held_out` cuts a validation part from
training."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from llm_quest.data.document import DropReport
from llm_quest.data.problems.problem import Problem
from llm_quest.data.records import REPAIR, Record, iter_records, parse_rows
from llm_quest.errors import DataError, RowError

GSM8K_ANSWER_MARK = "####"
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


def read_gsm8k(file: str | Path) -> list[Problem]:
    """Every problem of a file. DataError with file and line where a row is none."""
    if not Path(file).exists():
        raise DataError(f"there is no file {file}; give GSM8K's JSON lines (question, answer)")
    report = DropReport()
    problems = parse_rows(iter_records(file, report), parse_gsm8k_row, report)
    report.require_rows(len(problems), str(file), strict=True, remedy=REPAIR)
    if not problems:
        raise DataError(f"{file} holds no problems")
    return problems


def parse_gsm8k_row(record: Record) -> Problem:
    """The problem of a row with question and answer."""
    row, place = record.row, record.where
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str):
            reason = f"{name} is {row.get(name)!r:.60}; expected an object with question and answer, both text"
            raise RowError(place, f"no {name}", reason)
    question, worked = row["question"], row["answer"]
    reasoning, mark, answer = worked.rpartition(GSM8K_ANSWER_MARK)
    if not mark:
        raise RowError(place, "no answer mark", f"the answer has no {GSM8K_ANSWER_MARK} before its number")
    steps = tuple(line for line in CALCULATOR_ANNOTATION.sub("", reasoning).strip().split("\n") if line)
    return Problem(question, answer.strip().replace(",", ""), "gsm8k", question, steps=steps)


def split_gsm8k_validation(problems: list[Problem], share: float = 0.05) -> tuple[list[Problem], list[Problem]]:
    """Training and validation parts, by the hash of the question: no seed, and the same for everybody."""
    limit = int(share * 2**32)
    kept = [int.from_bytes(hashlib.sha256(p.key.encode()).digest()[:4], "big") >= limit for p in problems]
    train = [problem for problem, stays in zip(problems, kept, strict=True) if stays]
    return train, [problem for problem, stays in zip(problems, kept, strict=True) if not stays]
