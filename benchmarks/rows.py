"""Time and memory of reading 20 MB of ten-turn conversations: `python -m benchmarks.rows`."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

from llm_quest.data.conversations import read_conversations
from llm_quest.data.document import DropReport
from llm_quest.data.sources import DataSource, load_rows

SIZE = 20_000_000


def main() -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": "some words of a turn " * 9} for n in range(10)]
    with tempfile.TemporaryDirectory() as folder:
        file, line = Path(folder, "rows.jsonl"), json.dumps({"messages": turns}) + "\n"
        file.write_text(line * (SIZE // len(line)))
        before = time.process_time()
        found = load_rows([DataSource(str(file))], read_conversations, DropReport())
        seconds = time.process_time() - before
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(found):,} conversations, {seconds:.1f} s of one core, {megabytes:.0f} MB at the peak")


if __name__ == "__main__":
    main()
