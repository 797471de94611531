"""Forms of rows: the tables of what the recipes read, each form with its keys and an example. Detection, messages and
documentation (docs/rows.md) all read these tables.

The first form whose keys a row has is taken. `system`, `history` and `tools` go with every form of conversations and
preferences; any further key is counted as one that nothing reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from llm_quest.data.conversation_forms import (
    CONVERSATION_FORMS,
    PROMPT_FORMS,
    RATED_FORMS,
    SHAREGPT_TURNS,
    Row,
    RowForm,
)
from llm_quest.data.message_parsing import parse_messages, read_cell, text_field
from llm_quest.data.preference_forms import PREFERENCE_FORMS
from llm_quest.errors import RowError


def select_form(forms: Sequence[RowForm], row: Row, where: str) -> RowForm:
    """The first form whose keys the row has. RowError with the known forms, and the recipes that read such a row."""
    for form in forms:
        if all(key in row for key in form.keys):
            return form
    known = "; ".join(", ".join(form.keys) for form in forms)
    elsewhere = [kind for kind, others in ROW_FORMS.items() if any(set(other.keys) <= set(row) for other in others)]
    meant = f" (such rows are for {elsewhere[0]})" if elsewhere else ""
    has = ", ".join(map(str, row)) or "(none)"
    reason = f"has the keys {has}; expected those of one form: {known}{meant}"
    raise RowError(where, "no known form", f"{reason}; data.columns={{KEY: COLUMN}} gives a column another name")


def parse_image_conversation(row: Row, where: str) -> tuple[tuple[str | None, str], ...]:
    """LLaVA's turns of human and gpt, without the placeholder `<image>` in them."""
    turns = parse_messages(row, "conversations", where)
    texts = [turn.content.replace("<image>", "").strip() for turn in turns]
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        roles = ", ".join(turn.role for turn in turns)
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
    steps, labels = (read_cell(row, key, where) for key in ("completions", "labels"))
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise RowError(where, "completions of another form", "'completions' is no list of texts, one for each step")
    if not isinstance(labels, list) or not all(
        isinstance(label, bool | int | float) and 0 <= label <= 1 for label in labels
    ):
        reason = f"'labels' is {labels!r:.60}, expected true, false or numbers from 0 to 1"
        raise RowError(where, "labels of another form", reason)
    if len(labels) != len(steps):
        reason = f"{len(steps)} steps in 'completions' and {len(labels)} labels; one each is needed"
        raise RowError(where, "steps without labels", reason)
    return StepParts(text_field(row, "prompt", where), tuple(steps), tuple(map(float, labels)))


STEP_EXAMPLE = {"prompt": "2+2*2?", "completions": ["2*2=4", "2+4=7"], "labels": [True, False]}
STEP_FORMS = (RowForm("labeled steps (TRL's stepwise supervision)", tuple(STEP_EXAMPLE), parse_steps, STEP_EXAMPLE),)

LABELED_TEXT_FORMS = (
    RowForm("text and label", ("text", "label"), lambda row, where: row, {"text": "Good.", "label": "positive"}),
    RowForm("text and label", ("text", "labels"), lambda row, where: row, {"text": "Good.", "labels": ["joy", "love"]}),
)
"""A list under either key is of several labels (multi-label)."""

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
