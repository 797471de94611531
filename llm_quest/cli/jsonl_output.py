"""The output file of `quest generate --prompts`: JSON lines, appended as they are generated and finally sorted into the
prompts' order. NAME.settings.json next to it records the settings that the rows depend on: a command that was killed
continues with the same settings or is refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llm_quest.data.row_files import parse_json_object
from llm_quest.errors import BusyError, DataError, UsageError
from llm_quest.files import append_lines, atomic_write_json, atomic_write_text, iter_lines

OutputRow = Mapping[str, Any]
IGNORED_SETTING = "model"
"""The path of the model may change; its weights may not."""


class JsonlOutput:
    """A file of rows and the settings that they depend on. Open it with `open_jsonl_output`, which holds a lock."""

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self.file, self.settings = file, json.loads(json.dumps(settings))
        self.settings_file = file.with_name(f"{file.name}.settings.json")

    def load_existing(self) -> dict[int, OutputRow]:
        """The rows of an earlier command, by number. UsageError if it had other settings."""
        if not self.file.exists() or self.file.stat().st_size == 0:
            atomic_write_json(self.settings_file, self.settings)
            return {}
        if not self.settings_file.is_file():
            raise UsageError(
                f"{self.file} exists without {self.settings_file.name}, which records its settings; choose another "
                "--out"
            )
        self.require_same_settings(parse_json_object(self.settings_file.read_bytes(), str(self.settings_file)))
        return self.read_rows()

    def require_same_settings(self, saved: dict[str, Any]) -> None:
        changed = [
            f"{name} {shorten_hash(saved.get(name))}, now {shorten_hash(self.settings.get(name))}"
            for name in saved | self.settings
            if name != IGNORED_SETTING and saved.get(name) != self.settings.get(name)
        ]
        if changed:
            raise UsageError(
                f"{self.file} was written with {'; '.join(changed)}: give the same settings, or choose another --out"
            )

    def read_rows(self) -> dict[int, OutputRow]:
        """All complete lines. A partial last line, left by a process that was killed, is removed."""
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.file, len(whole))
        rows: dict[int, OutputRow] = {}
        for number, line in iter_lines(io.BytesIO(whole)):
            row = parse_json_object(line, f"{self.file}:{number}")
            if type(row.get("row")) is not int or row["row"] in rows:
                raise DataError(
                    f"{self.file}:{number} is not a row of this command, or repeats one; choose another --out"
                )
            rows[row["row"]] = row
        return rows

    def append(self, rows: Sequence[OutputRow]) -> None:
        """Append rows in one write, so that none is lost if this process is killed."""
        append_lines(self.file, [json.dumps(row, ensure_ascii=False) for row in rows])

    def sort_rows(self) -> dict[int, OutputRow]:
        """All rows, with the file sorted into the prompts' order."""
        rows = self.read_rows() if self.file.exists() else {}
        if list(rows) != sorted(rows):
            rows = {number: rows[number] for number in sorted(rows)}
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()]
            atomic_write_text(self.file, "".join(lines))
        return rows


@contextmanager
def open_jsonl_output(file: Path, settings: Mapping[str, Any]) -> Iterator[JsonlOutput]:
    """Open the file for one process at a time."""
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


def shorten_hash(value: Any) -> str:
    """A setting as shown in a message: the first 8 digits of a sha256."""
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)
