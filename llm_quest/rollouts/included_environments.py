"""Environments that come with the package: a calculator, a guessing game, search over local files, and a user's
functions as tools. `tools` describes each tool for chat templates that show tools.

A tool is called by its tag, `<calc>12*7</calc>`, or as published models write it,
`<tool_call>{"name": "calc", "arguments": {"expression": "12*7"}}</tool_call>`. `<answer>84</answer>` ends the episode;
so does a turn that calls nothing, which is the answer itself."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llm_quest.data.problems.answer_forms import last_tagged_answer
from llm_quest.data.problems.problem import Problem, make_rng
from llm_quest.errors import UsageError
from llm_quest.rollouts.expression import MalformedExpression, evaluate_expression
from llm_quest.rollouts.user_code import load_user_object
from llm_quest.rollouts.verifiers import CORRECT, verify_answer

Messages = list[dict[str, Any]]
Answered = tuple[Messages, float, bool]
TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,12}")
WORD = re.compile(r"\w+")


def tool_argument(completion: str, tool: str) -> str | None:
    """The argument of the last call of this tool; None without a call, "" for a call that cannot be parsed."""
    if tagged := re.findall(rf"<{tool}>(.*?)</{tool}>", completion, re.DOTALL):
        return str(tagged[-1]).strip()
    calls = TOOL_CALL.findall(completion)
    if not calls:
        return None
    try:
        call = json.loads(calls[-1])
        arguments = call["arguments"]
        return str(next(iter(arguments.values()))) if call["name"] == tool else ""
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration, RecursionError):
        return ""


def question_with_hint(row: Mapping[str, Any], hint: str, ask_for_tool: bool) -> Messages:
    """The row's messages, or its prompt as one; with ask_for_tool the hint is added to the last one."""
    given = row.get("messages") or [{"role": "user", "content": str(row["prompt"])}]
    messages = [dict(one) for one in given]
    if ask_for_tool:
        messages[-1]["content"] = f"{messages[-1]['content']}\n\n{hint}"
    return messages


def answer_reward(completion: str, gold: str) -> float:
    """1 for the right answer: in its tag, or the completion itself."""
    answer = last_tagged_answer(completion) or completion
    problem = Problem("", gold, "equal", "", grading="tolerant")
    return float(verify_answer(problem, answer) == CORRECT)


def tool_result(content: str) -> Messages:
    return [{"role": "tool", "content": content}]


def calc(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: numbers, + - * / and brackets, such as 12*(7+1)
    """
    try:
        value = evaluate_expression(expression).value
    except (MalformedExpression, OverflowError) as error:
        return f"error: {error}"
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def search(words: str) -> str:
    """Search the files for the paragraphs that fit the words best.

    Args:
        words: what to look for
    """
    raise NotImplementedError("it is described here for chat templates; FileSearch answers")


@dataclass
class Calculator:
    """Questions whose answer may be computed: `<calc>EXPRESSION</calc>` is answered with its value. hint: whether the
    question says so. The reward is 1 for the row's answer, 0 for another."""

    hint: bool = True
    gold: str = field(default="", init=False)
    tools: ClassVar[tuple[Any, ...]] = (calc,)

    def reset(self, row: Mapping[str, Any]) -> Messages:
        self.gold = str(row["answer"])
        return question_with_hint(row, "Compute with <calc>12*7</calc>. End with <answer>84</answer>.", self.hint)

    def step(self, completion: str) -> Answered:
        query = tool_argument(completion, "calc")
        if query is None:
            return [], answer_reward(completion, self.gold), True
        return tool_result(calc(query)), 0.0, False


@dataclass
class GuessingGame:
    """A number between low and high (the row's `secret`, or one that its content decides) is guessed: the answers are
    higher and lower. The reward is 1 for a hit."""

    low: int = 1
    high: int = 20
    secret: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise UsageError(f"environment_kwargs: low is {self.low} and high {self.high}; low must be the smaller")

    def reset(self, row: Mapping[str, Any]) -> Messages:
        content = json.dumps(dict(row), sort_keys=True, default=str)
        self.secret = int(row.get("secret", make_rng("secret", content).randint(self.low, self.high)))
        question = f"Guess my number between {self.low} and {self.high}. Say one number."
        return [{"role": "user", "content": question}]

    def step(self, completion: str) -> Answered:
        matches = WHOLE_NUMBER.findall(completion)
        if not matches:
            return [{"role": "user", "content": "Say one number."}], 0.0, False
        guess = int(matches[-1])
        if guess == self.secret:
            return [], 1.0, True
        return [{"role": "user", "content": "higher" if guess < self.secret else "lower"}], 0.0, False


@dataclass
class FileSearch:
    """Questions whose answer stands in the text files of a folder: `<search>WORDS</search>` is answered with the
    paragraphs that fit best (BM25). The reward is 1 for the row's answer, 0 for another."""

    folder: str
    num_results: int = 2
    max_characters: int = 400
    hint: bool = True
    gold: str = field(default="", init=False)
    tools: ClassVar[tuple[Any, ...]] = (search,)

    def __post_init__(self) -> None:
        self.paragraphs = read_paragraphs(self.folder)

    def reset(self, row: Mapping[str, Any]) -> Messages:
        self.gold = str(row["answer"])
        hint = "Search with <search>words</search>. End with <answer>what you found</answer>."
        return question_with_hint(row, hint, self.hint)

    def step(self, completion: str) -> Answered:
        query = tool_argument(completion, "search")
        if query is None:
            return [], answer_reward(completion, self.gold), True
        matches = rank_paragraphs(self.paragraphs, query)[: self.num_results]
        return (
            tool_result("\n\n".join(passage[: self.max_characters] for passage in matches) or "nothing found"),
            0.0,
            False,
        )


PARAGRAPHS: dict[str, tuple[str, ...]] = {}
"""The paragraphs of folders that were read: every episode of a run searches the same ones."""


def read_paragraphs(folder: str) -> tuple[str, ...]:
    """The paragraphs of a folder's .txt and .md files, read once."""
    if folder not in PARAGRAPHS:
        files = sorted(file for file in Path(folder).rglob("*") if file.suffix in (".txt", ".md"))
        if not files:
            raise UsageError(f"environment_kwargs: the folder {folder} holds no .txt or .md file to search")
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        parts = (part.strip() for text in texts for part in re.split(r"\n\s*\n", text))
        PARAGRAPHS[folder] = tuple(part for part in parts if part)
    return PARAGRAPHS[folder]


def rank_paragraphs(paragraphs: tuple[str, ...], query: str, k1: float = 1.5, b: float = 0.75) -> list[str]:
    """The paragraphs that share a word with the query, the best first: BM25 (Robertson and Zaragoza 2009), sum over
    words of idf f (k1 + 1) / (f + k1 (1 - b + b length / mean length)). Differs: idf is log(1 + (n - m + 0.5) /
    (m + 0.5)) for m of n paragraphs with the word, as in Lucene, which is never negative; theirs has no 1."""
    counted = [Counter(WORD.findall(paragraph.lower())) for paragraph in paragraphs]
    mean = sum(words.total() for words in counted) / max(1, len(counted))
    scores = [0.0] * len(paragraphs)
    for word in set(WORD.findall(query.lower())):
        frequency = sum(word in words for words in counted)
        idf = math.log(1 + (len(paragraphs) - frequency + 0.5) / (frequency + 0.5))
        for place, words in enumerate(counted):
            f = words[word]
            scores[place] += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * words.total() / mean)) if f else 0.0
    order = sorted(range(len(paragraphs)), key=lambda place: -scores[place])
    return [paragraphs[place] for place in order if scores[place] > 0]


@dataclass
class FunctionTools:
    """A user's functions as tools (functions: FILE.py:NAME of each). A call is answered with what the function
    returns, or with its error; a turn that calls nothing ends the episode. The reward is 1 for the row's answer, 0 for
    another and for rows without one."""

    functions: list[str]
    gold: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.tools = [load_user_object(reference) for reference in self.functions]
        self.by_name = {tool.__name__: tool for tool in self.tools}

    def reset(self, row: Mapping[str, Any]) -> Messages:
        self.gold = str(row.get("answer") or "")
        return question_with_hint(row, "", False)

    def step(self, completion: str) -> Answered:
        calls = read_tool_calls(completion)
        if not calls:
            return [], answer_reward(completion, self.gold) if self.gold else 0.0, True
        return [one for call in calls for one in tool_result(self.answer(call))], 0.0, False

    def answer(self, call: Any) -> str:
        """The result of one call as text, or its error."""
        try:
            function = self.by_name[call["name"]]
        except (LookupError, TypeError):
            return f"error: there is no such tool; call one of {', '.join(self.by_name)}"
        try:
            return str(function(**(call.get("arguments") or call.get("parameters") or {})))
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"


def read_tool_calls(completion: str) -> list[Any]:
    """The calls of a turn, as published models write them: JSON in <tool_call>, or nothing but a JSON object with a
    name (Llama 3.1). A call that is no JSON is None."""
    text = completion.strip()
    call_texts = TOOL_CALL.findall(completion) or ([text] if text.startswith("{") and '"name"' in text else [])
    calls = []
    for one in call_texts:
        try:
            calls.append(json.loads(one))
        except (ValueError, RecursionError):
            calls.append(None)
    return calls


ENVIRONMENTS: dict[str, Any] = {
    "calculator": Calculator, "guessing_game": GuessingGame, "file_search": FileSearch, "functions": FunctionTools,
}  # fmt: skip
"""Name -> the class: what `environment` may be besides FILE.py:CLASS."""
NEED_ROWS = ("calculator", "file_search", "functions")
"""Environments that ask what rows or a task ask."""
