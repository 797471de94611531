"""Forms of rows: the tables of what the recipes read, each form with its keys and an example. Detection, messages and
documentation (docs/rows.md) all read these tables.

The first form whose keys a row has is taken. `system`, `history` and `tools` go with every form of conversations and
preferences; any further key is counted as one that nothing reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from llm_quest.data.message_parsing import parse_messages, parse_transcript, text_field, text_or_messages
from llm_quest.data.messages import Message
from llm_quest.errors import RowError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowForm:
    """keys: those that every row of the form has. optional: further keys that it reads. parse(row, where): its
    content."""

    name: str
    keys: tuple[str, ...]
    parse: Callable[[Row, str], Any]
    example: Row
    optional: tuple[str, ...] = ()


def select_form(forms: Sequence[RowForm], row: Row, where: str) -> RowForm:
    """The first form whose keys the row has. RowError with the known forms, and the recipes that read such a row."""
    for form in forms:
        if all(key in row for key in form.keys):
            return form
    known = "; ".join(", ".join(form.keys) for form in forms)
    elsewhere = [kind for kind, others in ROW_FORMS.items() if any(set(one.keys) <= set(row) for one in others)]
    meant = f" (such rows are for {elsewhere[0]})" if elsewhere else ""
    has = ", ".join(map(str, row)) or "(none)"
    reason = f"has the keys {has}; expected those of one form: {known}{meant}"
    raise RowError(where, "no known form", f"{reason}; data.columns={{KEY: COLUMN}} gives a column another name")


COMMON_KEYS = ("system", "history", "tools")


def begin_turns(row: Row, where: str) -> list[Message]:
    """The system message and the earlier turns (pairs of question and answer) that stand beside the others."""
    system = text_field(row, "system", where)
    turns = [Message("system", system)] if system.strip() else []
    history = row.get("history", [])
    if not isinstance(history, list) or any(not is_text_pair(pair) for pair in history):
        raise RowError(where, "history of another form", "history is no list of pairs [question, answer]")
    for question, answer in history:
        turns += [Message("user", question), Message("assistant", answer)]
    return turns


def is_text_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(one, str) for one in pair)


def join_turns(before: list[Message], turns: list[Message], where: str) -> list[Message]:
    """Earlier turns and these. RowError for two system messages that differ."""
    systems = [one for one in (*before, *turns) if one.role == "system"]
    if len(systems) < 2 or not before:
        return [*before, *turns]
    if len({one.content.strip() for one in systems}) > 1:
        raise RowError(where, "two system messages", "has a key system and another system message in its messages")
    return [*before, *(one for one in turns if one.role != "system")]


def instruction_text(row: Row, where: str) -> str:
    """An instruction with its input (Alpaca) or context (Dolly) below it."""
    parts = (text_field(row, key, where).strip() for key in ("instruction", "input", "context"))
    return "\n\n".join(part for part in parts if part)


def question_turns(row: Row, where: str, key: str) -> list[Message]:
    """What is asked under a key, with what stands before it."""
    asked = (
        [Message("user", instruction_text(row, where))]
        if key == "instruction"
        else text_or_messages(row, key, "user", where)
    )
    return join_turns(begin_turns(row, where), asked, where)


def parse_chat(row: Row, where: str, key: str) -> list[Message]:
    return join_turns(begin_turns(row, where), parse_messages(row, key, where), where)


def parse_pair(row: Row, where: str, asked: str, answered: str) -> list[Message]:
    return [*question_turns(row, where, asked), *text_or_messages(row, answered, "assistant", where)]


def chat_form(key: str, name: str, turns: Sequence[Mapping[str, str]]) -> RowForm:
    return RowForm(name, (key,), partial(parse_chat, key=key), {key: turns}, COMMON_KEYS)


def pair_form(asked: str, answered: str, name: str, *optional: str) -> RowForm:
    parse = partial(parse_pair, asked=asked, answered=answered)
    return RowForm(name, (asked, answered), parse, {asked: "2+2?", answered: "4"}, (*optional, *COMMON_KEYS))


OPENAI_TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT_TURNS = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]

CONVERSATION_FORMS = (
    chat_form("messages", "messages (OpenAI, TRL)", OPENAI_TURNS),
    chat_form("conversations", "conversations (ShareGPT)", SHAREGPT_TURNS),
    chat_form("conversation", "conversation", OPENAI_TURNS),
    pair_form("prompt", "completion", "prompt and completion (TRL; text or messages)"),
    pair_form("prompt", "response", "prompt and response"),
    pair_form("query", "response", "query and response"),
    pair_form("question", "answer", "question and answer"),
    pair_form("question", "response", "question and response"),
    pair_form("instruction", "output", "Alpaca", "input"),
    pair_form("instruction", "response", "Dolly", "context", "input"),
)


class PreferenceParts(NamedTuple):
    """A question and its answers, the best first."""

    question: list[Message]
    answers: tuple[str, ...]


def parse_choice(row: Row, where: str, asked: str) -> PreferenceParts:
    """A question with a chosen and a rejected answer."""
    chat = asked in CHAT_KEYS
    question = parse_chat(row, where, asked) if chat else question_turns(row, where, asked)
    whole = [text_or_messages(row, key, "assistant", where, extra=False) for key in ("chosen", "rejected")]
    return PreferenceParts(question, tuple(answer_text(one, question, where) for one in whole))


CHAT_KEYS = ("messages", "conversations", "conversation")


def parse_whole_choice(row: Row, where: str) -> PreferenceParts:
    """Two whole conversations, as messages or transcripts: the question is what both begin with."""
    whole = [
        parse_transcript(row[key], where) if isinstance(row[key], str) else parse_messages(row, key, where, extra=False)
        for key in ("chosen", "rejected")
    ]
    chosen, rejected = whole
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        reason = "chosen and rejected do not begin with the same question; give it as prompt"
        raise RowError(where, "no common question", reason)
    question = join_turns(begin_turns(row, where), chosen[:-1], where)
    return PreferenceParts(question, tuple(answer_text(one[-1:], question, where) for one in whole))


def parse_ranking(row: Row, where: str, asked: str, key: str) -> PreferenceParts:
    """A question with two answers or more, the best first."""
    question, found = question_turns(row, where, asked), row[key]
    if not isinstance(found, list) or len(found) < 2:
        raise RowError(where, f"{key} of another form", f"{key!r} is no list of two answers or more")
    if all(isinstance(one, str) for one in found):
        return PreferenceParts(question, tuple(found))
    whole = [parse_messages(row, key, where, value=one, extra=False) for one in found]
    return PreferenceParts(question, tuple(answer_text(one, question, where) for one in whole))


def answer_text(one: list[Message], question: list[Message], where: str) -> str:
    """The text of the last message, which must be the assistant's; what stands before it must be the question."""
    if not one or one[-1].role != "assistant":
        last = one[-1].role if one else ""
        reason = f"an answer is one message of the assistant; got {len(one)}, the last by {last!r}"
        raise RowError(where, "no answer", reason)
    spoken = [message for message in one[:-1] if message.role != "system"]
    asked = [message for message in question if message.role != "system"]
    if spoken and [(m.role, m.content) for m in spoken] != [(m.role, m.content) for m in asked]:
        raise RowError(where, "answers to another question", "chosen or rejected answers another question than prompt")
    return one[-1].content


def choice_form(asked: str, name: str, *optional: str) -> RowForm:
    example = {asked: SHAREGPT_TURNS[:1] if asked in CHAT_KEYS else "2+2?", "chosen": "4", "rejected": "5"}
    keys = (asked, "chosen", "rejected")
    return RowForm(name, keys, partial(parse_choice, asked=asked), example, (*optional, "margin", *COMMON_KEYS))


def ranking_form(asked: str, key: str, name: str, *optional: str) -> RowForm:
    parse, example = partial(parse_ranking, asked=asked, key=key), {asked: "2+2?", key: ["4", "5", "6"]}
    return RowForm(name, (asked, key), parse, example, (*optional, "margin", *COMMON_KEYS))


PREFERENCE_FORMS = (
    ranking_form("prompt", "ranked", "ranked answers, the best first"),
    ranking_form("instruction", "ranked", "ranked answers to an instruction", "input"),
    choice_form("prompt", "prompt, chosen, rejected (TRL; text or messages)"),
    choice_form("messages", "messages with a chosen and a rejected answer"),
    choice_form("conversations", "LLaMA-Factory's ranking"),
    choice_form("question", "orca pairs"),
    choice_form("query", "query, chosen, rejected"),
    choice_form("instruction", "instruction, chosen, rejected", "input"),
    RowForm(
        "chosen and rejected alone: whole conversations, or hh-rlhf's text",
        ("chosen", "rejected"),
        parse_whole_choice,
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        ("margin", *COMMON_KEYS),
    ),
    ranking_form("instruction", "output", "Alpaca with a list of outputs, the best first", "input"),
)


class RatedParts(NamedTuple):
    """A conversation whose last answer is good or not."""

    messages: list[Message]
    desirable: bool


ANSWER_KEYS = ("answer", "ground_truth", "solution")
"""Where the answer of a prompt stands that a reward may check."""


def parse_prompt(row: Row, where: str, key: str) -> list[Message]:
    """A prompt, or a conversation without the answer that it ends with."""
    turns = parse_chat(row, where, key) if key in CHAT_KEYS else question_turns(row, where, key)
    return turns[:-1] if turns and turns[-1].role == "assistant" else turns


def prompt_form(key: str, name: str, *optional: str) -> RowForm:
    example = {key: SHAREGPT_TURNS if key in CHAT_KEYS else "2+2?", "answer": "4"}
    keys = (*optional, *ANSWER_KEYS, "system", "history")
    return RowForm(name, (key,), partial(parse_prompt, key=key), example, keys)


PROMPT_FORMS = (
    prompt_form("prompt", "prompt (text or messages)"),
    prompt_form("messages", "messages, up to the last answer"),
    prompt_form("conversations", "conversations, up to the last answer"),
    prompt_form("question", "question"),
    prompt_form("problem", "problem"),
    prompt_form("query", "query"),
    prompt_form("instruction", "instruction", "input", "context"),
)
"""Prompts of GRPO; every further key goes to the rewards."""

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes", "good"), ("false", "0", "no", "bad")


def parse_rating(row: Row, where: str, form: RowForm, key: str) -> RatedParts:
    """A conversation of another form, with a key that rates its answer."""
    value = str(row[key]).strip().lower()
    if value not in TRUE_WORDS + FALSE_WORDS:
        raise RowError(where, f"{key} of another form", f"{key!r} is {row[key]!r:.40}, expected true or false")
    return RatedParts(form.parse(row, where), value in TRUE_WORDS)


def rated_form(form: RowForm, key: str) -> RowForm:
    parse = partial(parse_rating, form=form, key=key)
    return RowForm(f"{form.name}, rated", (*form.keys, key), parse, {**form.example, key: True}, form.optional)


RATED_FORMS = tuple(rated_form(form, key) for form in CONVERSATION_FORMS for key in ("label", "kto_tag"))
"""KTO's rows: any conversation with `label` (TRL) or `kto_tag` (LLaMA-Factory)."""


def parse_image_conversation(row: Row, where: str) -> tuple[tuple[str | None, str], ...]:
    """LLaVA's turns of human and gpt, without the placeholder `<image>` in them."""
    turns = parse_messages(row, "conversations", where)
    texts = [one.content.replace("<image>", "").strip() for one in turns]
    if [one.role for one in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        roles = ", ".join(one.role for one in turns)
        raise RowError(where, "roles out of order", f"the roles are {roles}; expected user and assistant in turn")
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def parse_caption(row: Row, where: str) -> tuple[tuple[str | None, str], ...]:
    return ((None, text_field(row, "caption", where)),)


def parse_image_question(row: Row, where: str) -> tuple[tuple[str | None, str], ...]:
    return ((text_field(row, "question", where), text_field(row, "answer", where)),)


IMAGE_QUESTION = {"image": "a.png", "question": "How many?", "answer": "two"}
IMAGE_TEXT_FORMS = (
    RowForm("image and caption", ("image", "caption"), parse_caption, {"image": "a.png", "caption": "a red circle"}),
    RowForm("image, question and answer", tuple(IMAGE_QUESTION), parse_image_question, IMAGE_QUESTION),
    RowForm(
        "LLaVA's conversations",
        ("image", "conversations"),
        parse_image_conversation,
        {"image": "a.png", "conversations": SHAREGPT_TURNS},
    ),
)
"""Rows of images: pairs of question and answer; a caption has None for its question."""

TEXT_FORMS = (RowForm("text", ("text",), lambda row, where: text_field(row, "text", where), {"text": "Once ..."}),)


class StepParts(NamedTuple):
    """A question, the steps of a solution, and how right each of them is, 0 to 1."""

    question: str
    steps: tuple[str, ...]
    labels: tuple[float, ...]


def parse_steps(row: Row, where: str) -> StepParts:
    """Stepwise supervision (TRL): a label for each step."""
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not all(isinstance(one, str) for one in steps):
        raise RowError(where, "completions of another form", "'completions' is no list of texts, one for each step")
    if not isinstance(labels, list) or not all(isinstance(one, bool | int | float) and 0 <= one <= 1 for one in labels):
        reason = f"'labels' is {labels!r:.60}, expected true, false or numbers from 0 to 1"
        raise RowError(where, "labels of another form", reason)
    if len(labels) != len(steps):
        reason = f"{len(steps)} steps in 'completions' and {len(labels)} labels; one each is needed"
        raise RowError(where, "steps without labels", reason)
    return StepParts(text_field(row, "prompt", where), tuple(steps), tuple(map(float, labels)))


STEP_EXAMPLE = {"prompt": "2+2*2?", "completions": ["2*2=4", "2+4=7"], "labels": [True, False]}
STEP_FORMS = (RowForm("labelled steps (TRL's stepwise supervision)", tuple(STEP_EXAMPLE), parse_steps, STEP_EXAMPLE),)

LABELED_TEXT_KEYS = ("text", "label")
LABELED_TEXT_FORMS = (
    RowForm("text and label", LABELED_TEXT_KEYS, lambda row, where: row, {"text": "Good.", "label": "positive"}),
)

ROW_FORMS: dict[str, Sequence[RowForm]] = {
    "pretrain": TEXT_FORMS,
    "sft": CONVERSATION_FORMS,
    "reward, dpo": PREFERENCE_FORMS,
    "kto": RATED_FORMS,
    "grpo": PROMPT_FORMS,
    "prm": STEP_FORMS,
    "classify": LABELED_TEXT_FORMS,
    "vlm": IMAGE_TEXT_FORMS,
}
"""Recipes -> the forms that they read."""


def describe_forms() -> list[str]:
    """The forms as the table of docs/rows.md, one line each."""
    lines = ["| recipe | form | keys | also read |", "| --- | --- | --- | --- |"]
    for recipe, forms in ROW_FORMS.items():
        for name, same in groupby(forms, key=lambda form: form.name):
            form, *others = same
            keys, optional = (", ".join(f"`{key}`" for key in names) for names in (form.keys, form.optional))
            either = "".join(f" or `{other.keys[-1]}`" for other in others)
            lines.append(f"| {recipe} | {name} | {keys}{either} | {optional} |")
    return lines
