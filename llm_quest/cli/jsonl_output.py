"""The file that `quest generate --prompts` writes: JSON lines, appended as they are made, in the prompts' order when
all are there. Beside it, NAME.settings.json says what the rows depend on, so that a killed command goes on as it was
begun or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_quest.data.documents import parse_json_object
from llm_quest.errors import BusyError, DataError, UsageError
from llm_quest.files import atomic_write_json, atomic_write_text

OutputRow = Mapping[str, Any]
IGNORED_SETTING = "model"
"""Where the model lay may change; its weights may not."""


class JsonlOutput:
    """settings: name -> what decides a row. Use `open_jsonl_output`, which holds the lock."""

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self.file, self.settings = file, json.loads(json.dumps(settings))
        self.beside = file.with_name(f"{file.name}.settings.json")

    def load_existing(self) -> dict[int, OutputRow]:
        """The rows that are there, by number. UsageError if they were made in another way."""
        if not self.file.exists() or self.file.stat().st_size == 0:
            atomic_write_json(self.beside, self.settings)
            return {}
        if not self.beside.is_file():
            raise UsageError(
                f"{self.file} exists, and without {self.beside.name} nobody knows how it was made; choose another --out"
            )
        self.require_same_settings(parse_json_object(self.beside.read_bytes().replace(b"\n", b" "), self.beside, 1))
        return self.read_rows()

    def require_same_settings(self, saved: Mapping[str, Any]) -> None:
        changed = [
            f"{name} {shorten_hash(saved.get(name))}, now {shorten_hash(value)}"
            for name, value in self.settings.items()
            if name != IGNORED_SETTING and saved.get(name) != value
        ]
        if changed:
            raise UsageError(
                f"{self.file} was begun with {'; '.join(changed)}: give the same again, or choose another --out"
            )

    def read_rows(self) -> dict[int, OutputRow]:
        """All whole lines; what a killed process left of one is cut off."""
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.file, len(whole))
        found: dict[int, OutputRow] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            row = parse_json_object(line, self.file, number)
            if type(row.get("row")) is not int or row["row"] in found:
                raise DataError(
                    f"{self.file}:{number} is no row of this command, or a second one; choose another --out"
                )
            found[row["row"]] = row
        return found

    def append(self, rows: Sequence[OutputRow]) -> None:
        """Handed to the system as a whole, so that nothing is lost when this process is killed."""
        with self.file.open("ab") as file:
            file.write("".join(map(to_json_line, rows)).encode())

    def sort_rows(self) -> dict[int, OutputRow]:
        """All rows, in the prompts' order."""
        rows = self.read_rows() if self.file.exists() else {}
        if list(rows) != sorted(rows):
            rows = {number: rows[number] for number in sorted(rows)}
            atomic_write_text(self.file, "".join(map(to_json_line, rows.values())))
        return rows


@contextmanager
def open_jsonl_output(file: Path, settings: Mapping[str, Any]) -> Iterator[JsonlOutput]:
    """The file, for one process at a time."""
    if not file.name.lower().endswith((".jsonl", ".ndjson")):
        raise UsageError(f"--out {file}: the rows are JSON lines; call the file {file.with_suffix('.jsonl').name}")
    if file.exists() and not file.is_file():
        raise UsageError(f"--out {file} is not a regular file")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BusyError(f"{file} is being written by another process; wait for it, or choose another --out") from None
    try:
        yield JsonlOutput(file, settings)
    finally:
        lock.release()


def to_json_line(row: OutputRow) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def shorten_hash(value: Any) -> str:
    """A setting in a message: of a sha256 its beginning."""
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)
