"""Prompts from a file: the lines of a text, or the `prompt` of each row."""

from __future__ import annotations

from pathlib import Path

from llm_quest.data.documents import JSON_LINES_SUFFIXES, Document, DropReport, read_text, text_column
from llm_quest.data.records import TABLE_DELIMITERS, read_records
from llm_quest.errors import DataError

RECORD_SUFFIXES = (*JSON_LINES_SUFFIXES, *TABLE_DELIMITERS, ".json")


def read_prompts(file: str | Path, column: str = "prompt") -> list[Document]:
    """The prompts in the file's order. Of JSON lines, a JSON list or a table: the column, which may be empty (a text
    from its very beginning). Of any other file: its lines, without blank ones."""
    file = Path(file)
    if file.name.lower().endswith(RECORD_SUFFIXES):
        rows = read_records(file)
        return [Document(text_column(one.row, column, one.where), one.where) for one in rows]
    found = list(read_text(file, DropReport(), separator="\n"))
    if not found:
        raise DataError(f"{file} holds no prompts: write one a line, or rows with {column!r} in a .jsonl file")
    return [Document(one.text, f"{one.source}:{one.line}", one.line) for one in found]
