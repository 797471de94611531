"""`quest eval MODEL_FILE`: the model on a text, beside what counting and compressing reach on the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llm_quest.cli.chat import load_model_and_tokenizer
from llm_quest.data.corpus import load_corpus
from llm_quest.data.documents import Document
from llm_quest.data.split import split_corpus
from llm_quest.errors import UsageError
from llm_quest.eval.perplexity import PerplexityReport, evaluate_documents
from llm_quest.recipes.config import load_raw_config as load_raw_config
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.pretrain_config import PretrainConfig

LogFn = Callable[[str], None]


def evaluate_text(
    name_or_path: str, source: str, *, max_tokens: int | None, device: str, dtype: str, log: LogFn
) -> PerplexityReport:
    """On a source; without one, a run is judged on what it held out, and the baselines read what it was trained on."""
    train, documents, name = load_eval_documents(name_or_path, source)
    model, tokenizer = load_model_and_tokenizer(name_or_path, device, dtype, log)
    return evaluate_documents(model, tokenizer, documents, train=train, source=name, max_tokens=max_tokens, log=log)


def load_eval_documents(name_or_path: str, source: str) -> tuple[Sequence[Document], Sequence[Document], str]:
    """Training and held-out documents, and what to call them."""
    if source:
        corpus = load_corpus(source)
        return (), corpus.documents, corpus.name
    run = Path(name_or_path).resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run
    if not (run / "config.yaml").is_file():
        raise UsageError(
            f"{name_or_path} is no run with held-out text of its own; say what to read (--data builtin:topics, FILE)"
        )
    data = parse_config(PretrainConfig, load_raw_config(str(run))).data
    if (Path(data.source) / "manifest.json").is_file():
        raise UsageError(f"{name_or_path} was trained on prepared numbers, not on text; say what to read: --data FILE")
    parts = split_corpus(load_corpus(data.source, column=data.column, separator=data.separator), held_out=data.held_out)
    return parts.train, parts.val, f"what {name_or_path} held out of {data.source}"
