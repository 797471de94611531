"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems whose worked answers end in `#### 72`.

A file of JSON lines with `question` and `answer` (as published); `hub.gsm8k` reads the hub's as well. The published
test file is for testing: whoever chooses a checkpoint by it has trained on it; `held_out` cuts a validation part from
training."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from llm_quest.data.documents import decode_utf8
from llm_quest.data.problems.problem import Problem
from llm_quest.data.records import require_valid_text
from llm_quest.errors import DataError

GSM8K_ANSWER_MARK = "####"
CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")


def read_gsm8k(file: str | Path) -> list[Problem]:
    """Every problem of a file. DataError names the line that cannot be used."""
    path = Path(file)
    if not path.is_file():
        raise DataError(f"there is no file {file}; give GSM8K's JSON lines (question, answer)")
    problems = []
    for number, line in enumerate(decode_utf8(path.read_bytes(), path).split("\n"), 1):
        if line.strip():
            problems.append(parse_gsm8k_line(line, f"{file}:{number}"))
    if not problems:
        raise DataError(f"{file} holds no problems")
    return problems


def parse_gsm8k_line(line: str, place: str) -> Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not an object with question and answer ({type(error).__name__}: {error})") from None
    return parse_gsm8k_row(row, place)


def parse_gsm8k_row(row: Any, place: str) -> Problem:
    """The problem of a row with question and answer."""
    try:
        question, worked = row["question"], row["answer"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: not an object with question and answer ({type(error).__name__}: {error})") from None
    for name, value in (("question", question), ("answer", worked)):
        if not isinstance(value, str):
            raise DataError(f"{place}: {name} is {value!r:.60}; text was expected")
        require_valid_text(value, place)
    reasoning, mark, answer = worked.rpartition(GSM8K_ANSWER_MARK)
    if not mark:
        raise DataError(f"{place}: the answer has no {GSM8K_ANSWER_MARK} before its number")
    steps = tuple(line for line in CALCULATOR_ANNOTATION.sub("", reasoning).strip().splitlines() if line)
    return Problem(question, answer.strip().replace(",", ""), "gsm8k", question, steps=steps)


def split_gsm8k_validation(problems: list[Problem], share: float = 0.05) -> tuple[list[Problem], list[Problem]]:
    """Training and validation parts, by the hash of the question: no seed, and the same for everybody."""
    limit = int(share * 2**32)
    kept = [int.from_bytes(hashlib.sha256(p.key.encode()).digest()[:4], "big") >= limit for p in problems]
    train = [problem for problem, stays in zip(problems, kept, strict=True) if stays]
    return train, [problem for problem, stays in zip(problems, kept, strict=True) if not stays]
