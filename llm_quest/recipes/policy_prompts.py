"""Prompts of a policy: problems of a task or of rows, encoded as ids.

Prompts go through the model's chat template, with a system prompt that asks for the form of the answer, or are plain
text after the start token."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from pydantic import Field, model_validator

from llm_quest.contracts import LogFn
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.conversation_forms import RowForm
from llm_quest.data.document import DropReport
from llm_quest.data.loader import repeat_by_weight
from llm_quest.data.problems import Problem, TaskSplit, draw_problem, parse_task
from llm_quest.data.problems.answer_forms import ANSWER_FORMS, TASK_INSTRUCTIONS
from llm_quest.data.problems.problem import make_rng
from llm_quest.data.prompt_rows import hash_of_rows, read_prompt_rows
from llm_quest.data.row_forms import PROMPT_FORMS
from llm_quest.data.template_sandbox import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.gsm8k import is_gsm8k, train_validation_split
from llm_quest.recipes.assembly import load_split_rows, log_remarks, source_name
from llm_quest.recipes.chat_template_config import ChatTemplateConfig, open_chat_template
from llm_quest.recipes.finetuning import ConversationDataConfig
from llm_quest.recipes.row_source import Sources
from llm_quest.rollouts.rollouts import PromptSource
from llm_quest.rollouts.sampler import PolicyPrompt

PROMPTS_PER_RENDERING = 64
MAX_CACHED_PROMPTS = 100_000


class PromptDataConfig(ConversationDataConfig):
    """Rows with a prompt, perhaps an answer, and whatever columns rewards read."""

    forms: ClassVar[Sequence[RowForm]] = PROMPT_FORMS
    source: Sources = Field(description="a file of rows, a folder, hf:DATASET, FILE.py:FUNCTION, or a list of them")
    held_out: float = Field(default=0.1, ge=0, lt=0.5, description="the part of the prompts that is never trained on")

    @model_validator(mode="after")
    def check_held_out(self) -> PromptDataConfig:
        if not self.held_out and self.validation is None:
            raise ValueError("a policy needs held-out prompts: give data.validation, or data.held_out above 0")
        return self


@dataclass(frozen=True)
class ProblemSet:
    """An endless list of training problems, and the held-out ones. identity: what a resumed run may not change; facts:
    for the report. num_prompts: how many different training problems there are; None: they are drawn without end.
    content: the hash of problems that are read from a file whose name is the identity."""

    train_problem: Callable[[int], Problem]
    held_out: list[Problem]
    identity: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    is_conversational: bool = False
    num_prompts: int | None = None
    content: str = ""

    @property
    def has_answers(self) -> bool:
        """Whether any held-out problem can be checked."""
        return any(problem.answer for problem in self.held_out)


def problems_of_task(task: str, answer_form: str, grading: str, number: int, seed: int) -> ProblemSet:
    """The problems of a task by its own splits, or of GSM8K: its training part in a new order every epoch, a part of it
    held out."""
    form = partial(with_answer_form, answer_form=answer_form, grading=grading)
    if not is_gsm8k(task):
        problem_task = parse_task(task)
        split = TaskSplit(problem_task)
        return ProblemSet(
            lambda index: form(split(seed, index)),
            [form(draw_problem(problem_task, "validation", index, seed)) for index in range(number)],
            repr(problem_task),
        )
    train, held_out = train_validation_split(task)
    return ProblemSet(
        lambda index: form(shuffled_problem(train, seed, index)),
        [form(problem) for problem in held_out[:number]],
        f"{task}: {len(train)}",
        num_prompts=len(train),
        content=hashlib.sha256(repr([train, held_out]).encode()).hexdigest(),
    )


def with_answer_form(problem: Problem, *, answer_form: str, grading: str) -> Problem:
    """The problem with this form of answer; "": the task's own. It replaces the form of GSM8K."""
    if not answer_form:
        return problem
    verifier = "number" if problem.verifier == "gsm8k" else problem.verifier
    return replace(problem, answer_form=answer_form, grading=grading, verifier=verifier)


def problems_of_rows(
    data: PromptDataConfig, answer_form: str, grading: str, number: int, seed: int, log: LogFn
) -> ProblemSet:
    """The problems of rows: a part held out by prompt, the others in a new order every epoch."""
    report = DropReport()
    train, held_out = load_split_rows(data, read_prompt_rows, report, limit=data.max_samples)
    rows, train = [*train, *held_out], repeat_by_weight(train)
    answered = sum(row.answer is not None for row in rows)
    dropped = {reason: count for reason, (count, _) in sorted(report.dropped.items())}
    lost = "".join(f"; dropped, {reason}: {count:,}" for reason, count in dropped.items())
    log(f"prompts: {len(train):,} to train on, {len(held_out):,} held out, {answered:,} with an answer{lost}")
    log_remarks(report, log)
    problems = [row.to_problem(answer_form or "plain", grading) for row in train]
    return ProblemSet(
        partial(shuffled_problem, problems, seed),
        [row.to_problem(answer_form or "plain", grading) for row in held_out[:number]],
        hash_of_rows(rows),
        {"source": source_name(data), "train_rows": len(train), "held_out_rows": len(held_out), **report.row_facts()},
        any(row.is_conversational for row in rows),
        len(problems),
    )


def shuffled_problem(problems: Sequence[Problem], seed: int, index: int) -> Problem:
    """Problem number `index` of an endless list: each once per epoch, in an order of its own."""
    epoch, place = divmod(index, len(problems))
    return problems[epoch_order(len(problems), seed, epoch)[place]]


@functools.lru_cache(maxsize=4)
def epoch_order(number: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(number))
    make_rng("order", seed, epoch).shuffle(order)
    return tuple(order)


class PromptEncoder:
    """`PromptEncoder(tokenizer, chat, system_prompt)(problem) -> ids`. chat: None for plain text after the start token.
    system_prompt: for every problem; None: what the form of its answer asks for, "": none. A template is rendered for
    many problems at once (`encode_problems`), and each only once."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate | None = None, system_prompt: str | None = None):
        self.tokenizer, self.chat, self.system_prompt = tokenizer, chat, system_prompt
        self.known: dict[str, list[int]] = {}

    def __call__(self, problem: Problem) -> list[int]:
        return self.encode_problems([problem])[0]

    def encode_problems(self, problems: Sequence[Problem]) -> list[list[int]]:
        """The ids of each problem's prompt."""
        if self.chat is None:
            return [self.plain_prompt(problem.prompt) for problem in problems]
        conversations = [(self.messages(problem), problem.tools) for problem in problems]
        if len(self.known) > MAX_CACHED_PROMPTS:
            self.known.clear()
        new = {
            repr(conversation): conversation for conversation in conversations if repr(conversation) not in self.known
        }
        if new:
            messages, tools = zip(*new.values(), strict=True)
            self.known |= dict(zip(new, self.chat.encode_prompts(messages, tools), strict=True))
        return [self.known[repr(conversation)] for conversation in conversations]

    def knows(self, problem: Problem) -> bool:
        """Whether nothing has to be rendered for this problem."""
        return self.chat is None or repr((self.messages(problem), problem.tools)) in self.known

    def identity(self, problems: ProblemSet) -> dict[str, str]:
        """Name -> hash of the prompts and the template, which a resumed run may not change."""
        content = {"problems": problems.content} if problems.content else {}
        template = "" if self.chat is None else self.chat.template or ""
        return {"task": problems.identity, **content, "chat_template": hashlib.sha256(template.encode()).hexdigest()}

    def shows_tools(self) -> bool:
        """Whether the chat template reads `tools`."""
        return self.chat is not None and not self.chat.writer.unknown_keys([], has_tools=True)

    def plain_prompt(self, text: str) -> list[int]:
        return [self.tokenizer.start_token_id, *self.tokenizer.encode(text, add_special_tokens=False)]

    def messages(self, problem: Problem) -> Messages:
        """The prompt as messages; the system prompt is appended to one that the row has."""
        turns = [dict(message) for message in problem.messages] or [{"role": "user", "content": problem.prompt}]
        wanted = answer_instruction(problem) if self.system_prompt is None else self.system_prompt
        if not wanted:
            return turns
        if turns[0]["role"] != "system":
            return [{"role": "system", "content": wanted}, *turns]
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{wanted}"}, *turns[1:]]


def answer_instruction(problem: Problem) -> str:
    """The instruction about the form of the answer; "" for rows, which say it themselves."""
    if problem.answer_form and problem.answer_form != "plain":
        return ANSWER_FORMS[problem.answer_form].instruction
    return TASK_INSTRUCTIONS.get(problem.verifier, "")


def make_prompt_encoder(
    tokenizer: Tokenizer, problems: ProblemSet, template: ChatTemplateConfig, *, apply_chat_template: bool | None,
    system_prompt: str | None,
) -> PromptEncoder:  # fmt: skip
    """Make the encoder of prompts. template: of the rows, or of a task's prompts. apply_chat_template: None for rows
    with messages, for rows and a model that has a template, and where there is a system prompt or something for the
    template."""
    template_is_set = bool(system_prompt or template.chat_template_path or template.chat_template_kwargs)
    wanted = (
        template_is_set
        or problems.is_conversational
        or (isinstance(template, PromptDataConfig) and tokenizer.chat_template is not None)
    )
    use = wanted if apply_chat_template is None else apply_chat_template
    if not use and template_is_set:
        raise UsageError(
            "system_prompt, chat_template_kwargs and data.chat_template_path have no effect with "
            "apply_chat_template=false"
        )
    return PromptEncoder(tokenizer, open_chat_template(template, tokenizer) if use else None, system_prompt)


def make_prompt(problems: ProblemSet, encode: PromptEncoder, index: int) -> PolicyPrompt:
    """The prompt of training problem number `index`. Chat templates are rendered for the next ones too."""
    problem = problems.train_problem(index)
    if not encode.knows(problem):
        encode.encode_problems([problems.train_problem(index + more) for more in range(PROMPTS_PER_RENDERING)])
    return PolicyPrompt(tuple(encode(problem)), problem)


def log_tools(problems: ProblemSet, encode: PromptEncoder, log: LogFn) -> None:
    """Log the tools of the prompts, and whether the model sees them."""
    names = {str(tool.get("function", tool).get("name")) for one in problems.held_out for tool in one.tools}
    if names:
        shown = "shown by the chat template" if encode.shows_tools() else "which this chat template does not show"
        log(f"tools: {', '.join(sorted(names))}; {shown}")


def drop_long_prompts(problems: ProblemSet, encode: PromptEncoder, max_prompt_length: int, log: LogFn) -> ProblemSet:
    """Drop the held-out problems whose prompt has more than `max_prompt_length` tokens. DataError if none is left."""
    lengths = [len(ids) for ids in encode.encode_problems(problems.held_out)]
    kept = [one for one, length in zip(problems.held_out, lengths, strict=True) if length <= max_prompt_length]
    longer = f"more than {max_prompt_length:,} tokens"
    if not kept:
        raise DataError(f"every held-out prompt has {longer}: no room for max_new_tokens is left")
    if lost := len(lengths) - len(kept):
        log(f"held-out prompts of {longer}, which leave no room for an answer: {lost} left out")
    return replace(problems, held_out=kept)


def log_long_prompts(source: PromptSource, max_prompt_length: int, log: LogFn) -> PromptSource:
    """Wrap a source of prompts: it logs the first of more than `max_prompt_length` tokens, which rollouts skip."""
    was_logged = False

    def next_prompt(index: int) -> PolicyPrompt:
        nonlocal was_logged
        prompt = source(index)
        if not was_logged and (length := len(prompt.prompt_ids)) > max_prompt_length:
            was_logged = True
            what = f"prompts of more than {max_prompt_length:,} tokens leave no room for an answer and are skipped"
            log(f"{what}; the first has {length:,}")
        return prompt

    return next_prompt
