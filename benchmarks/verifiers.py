"""How many answers a verifier judges in a second, in process, and what a hostile answer costs it.

    OMP_NUM_THREADS=1 python -m benchmarks.verifiers [--gsm8k FILE.jsonl]

Each verifier judges right answers (of the tasks that ship, or worked ones of a GSM8K file) and as many wrong ones; the
median of five rounds of the process's own seconds. Hostile are the answers of tests/rollouts/hostile.py, each the least
of three tries. math-verify, where it is installed, reads the same GSM8K answers, for scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_quest.data.problems import draw_problem, make_task, teacher_demonstration
from llm_quest.data.problems.gsm8k import GSM8K_ANSWER_MARK, read_gsm8k
from llm_quest.data.problems.problem import Problem
from llm_quest.rollouts.verifiers import VERIFIERS, is_well_formed, verify_answer
from tests.rollouts.hostile import HOSTILE

COUNT, ROUNDS = 1000, 5
Answers = Sequence[tuple[Problem, str]]
Judge = Callable[[Problem, str], object]


def answers(gsm8k: Path | None) -> dict[str, Answers]:
    """For every verifier, right answers and the same ones answering another's question."""
    right: dict[str, Answers] = {name: of_task(name) for name in ("reverse", "addition", "countdown", "chained")}
    right["registers"] = of_task("registers")
    right["fraction"] = [
        (Problem("", f"{n}/{n + 7}", "fraction", ""), f"{2 * n}/{2 * n + 14}") for n in range(1, COUNT)
    ]
    right["tagged"] = [
        (Problem("", f"{n}/{n + 7}", "tagged", ""), f"<think>{n}, twice</think><answer>{2 * n}/{2 * n + 14}</answer>")
        for n in range(1, COUNT)
    ]
    if gsm8k is not None:
        problems = read_gsm8k(gsm8k)
        worked = ["\n".join([*p.steps, f"{GSM8K_ANSWER_MARK} {p.answer}"]) for p in problems]
        right[f"worked answers of {gsm8k.name}"] = list(zip(problems, worked, strict=True))
        right["their numbers alone"] = [(Problem("", p.answer, "number", ""), p.answer) for p in problems]
    return {name: [*rows, *swapped(rows)] for name, rows in right.items()}


def of_task(name: str) -> Answers:
    made = make_task(name)
    problems = [draw_problem(made, "train", index) for index in range(COUNT)]
    return [(problem, teacher_demonstration(made, problem, index)) for index, problem in enumerate(problems)]


def swapped(rows: Answers) -> Answers:
    texts = [text for _, text in rows]
    return [(problem, text) for (problem, _), text in zip(rows, texts[1:] + texts[:1], strict=True)]


def rate(judge: Judge, rows: Answers) -> float:
    """Answers a second."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for problem, text in rows:
            judge(problem, text)
        rounds.append(time.process_time() - start)
    return len(rows) / statistics.median(rounds)


def slowest(check: str) -> tuple[float, str]:
    """Seconds of the hostile answer that costs most, and how it begins."""
    problem = Problem("", "3", check, "", (3,), ("1+2=3",))

    def seconds(text: str) -> float:
        tries = []
        for _ in range(3):
            start = time.perf_counter()
            verify_answer(problem, text)
            tries.append(time.perf_counter() - start)
        return min(tries)

    return max((seconds(text), text[:12]) for text in HOSTILE)


def peer() -> Judge | None:
    try:
        import math_verify  # noqa: F401
    except ImportError:
        return None
    from llm_quest.rollouts.verifier_process import verify_with_math_verify as verify_with_math_verify

    return verify_with_math_verify


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gsm8k", type=Path)
    gsm8k = parser.parse_args().gsm8k
    print("| answers | verifier | judged, answers/s | form alone, answers/s | right |\n| --- | --- | --- | --- | --- |")
    for name, rows in answers(gsm8k).items():
        right = sum(verify_answer(problem, text) == 1.0 for problem, text in rows) / len(rows)
        check = rows[0][0].verifier
        print(
            f"| {name} | {check} | {rate(verify_answer, rows):,.0f} | {rate(is_well_formed, rows):,.0f} | {right:.0%} |"
        )
    judge = peer()
    if judge is not None and gsm8k is not None:
        few = [(p, text) for p, text in answers(gsm8k)["their numbers alone"][:200]]
        print(f"| their numbers alone | math-verify | {rate(judge, few):,.0f} | | |")
    print("\n| verifier | slowest hostile answer, ms | begins with |\n| --- | --- | --- |")
    for name in VERIFIERS:
        seconds, text = slowest(name)
        print(f"| {name} | {1000 * seconds:.3f} | `{text}` |")


if __name__ == "__main__":
    main()
