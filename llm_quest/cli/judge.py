"""`quest eval MODEL`: the model on a text, beside what counting and compressing reach on the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llm_quest.cli.evaluation import Evaluation, evaluate_documents
from llm_quest.cli.talk import opened
from llm_quest.data.corpus import gather
from llm_quest.data.documents import Document
from llm_quest.data.split import split
from llm_quest.errors import UsageError
from llm_quest.recipes.config import gather as settings_of
from llm_quest.recipes.config import resolve
from llm_quest.recipes.pretrain_config import Pretrain

Say = Callable[[str], None]


def judge(where: str, source: str, *, tokens: int | None, device: str, dtype: str, say: Say) -> Evaluation:
    """On a source; without one, a run is judged on what it held out, and the baselines read what it was trained on."""
    train, documents, name = texts(where, source)
    model, tokenizer = opened(where, device, dtype, say)
    return evaluate_documents(model, tokenizer, documents, train=train, source=name, limit=tokens, say=say)


def texts(where: str, source: str) -> tuple[Sequence[Document], Sequence[Document], str]:
    """Training and held-out documents, and what to call them."""
    if source:
        corpus = gather(source)
        return (), corpus.documents, corpus.name
    run = Path(where).resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    if not (run / "config.yaml").is_file():
        raise UsageError(
            f"{where} is no run with held-out text of its own; say what to read (--data builtin:topics, FILE)"
        )
    data = resolve(Pretrain, settings_of(str(run))).data
    if (Path(data.source) / "manifest.json").is_file():
        raise UsageError(f"{where} was trained on prepared numbers, not on text; say what to read: --data FILE")
    parts = split(gather(data.source, column=data.column, separator=data.separator), held_out=data.held_out)
    return parts.train, parts.val, f"what {where} held out of {data.source}"
