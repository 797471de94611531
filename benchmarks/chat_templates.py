"""Conversations of ten turns through a chat template: processor time and memory of ours and of the template's process.

OMP_NUM_THREADS=1 python -m benchmarks.chat_templates [MEGABYTES] [chatml | a name of trl's chat_templates]
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

import psutil

from llm_quest.data.chat import CHATML_TEMPLATE, ChatTemplate
from llm_quest.data.conversations import Conversation
from llm_quest.data.documents import DropReport
from llm_quest.data.messages import Message
from llm_quest.data.vocabulary import train_bpe

TURNS = 10


def template_source(name: str) -> str:
    """ChatML without generation tags, or a template that trl ships."""
    if name == "chatml":
        return CHATML_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    spec = find_spec("trl")
    assert spec is not None, "trl is not installed"
    assert spec.origin is not None, "trl is not installed"
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def conversations(megabytes: float) -> list[Conversation]:
    """Questions of one line, answers of 300 words."""
    return [
        Conversation(
            tuple(
                message
                for turn in range(TURNS)
                for message in (
                    Message("user", f"question {row} {turn}"),
                    Message("assistant", f"{row} {turn} " + "word " * 300),
                )
            ),
            f"rows:{row}",
        )
        for row in range(int(megabytes * 1e6 / (TURNS * 1550)))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("megabytes", type=float, nargs="?", default=20)
    parser.add_argument("template", nargs="?", default="chatml")
    given = parser.parse_args()
    tokenizer = train_bpe(["a few words of text, again and again. " * 500], 300)
    chat, rows = ChatTemplate(tokenizer, template_source(given.template)), conversations(given.megabytes)
    report, began, cpu = DropReport(), time.monotonic(), time.process_time()
    examples = chat.encode_conversations(rows, report)
    own, child = psutil.Process(), psutil.Process().cpu_times()
    print(f"{len(rows):,} conversations -> {len(examples):,} rows, {sum(len(e.input_ids) for e in examples):,} tokens")
    print(
        f"{time.monotonic() - began:.0f} s; CPU {time.process_time() - cpu:.1f} s, template {child.children_user:.1f} s"
    )
    print(f"{own.memory_info().rss / 2**20:.0f} MB held at the end", *report.notes, sep="\n")


if __name__ == "__main__":
    main()
