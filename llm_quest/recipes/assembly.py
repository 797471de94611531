"""Steps that recipes share when they assemble a job: tokenizing text, applying techniques, splitting a batch into
micro-batches."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from llm_quest.atomic_dirs import atomic_dir
from llm_quest.cache_dirs import cache_dir, tolerate_cache_errors
from llm_quest.contracts import Callback, LogFn
from llm_quest.data.conversations import first_question_hash, split_by_prompt
from llm_quest.data.corpus import Corpus, is_builtin, load_corpus
from llm_quest.data.document import DropReport
from llm_quest.data.loader import ShardedLoader, SourceT, repeat_by_weight
from llm_quest.data.records import Record
from llm_quest.data.sources import Builtin, DataSource, iter_sources, load_rows
from llm_quest.data.split import CorpusSplit, choose_eval_part, shingle_overlap, split_corpus
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import TokenFolder, open_token_folder, prepare_token_folder
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.locate import resolve_checkpoint
from llm_quest.progress import phase
from llm_quest.recipes.config import RECIPES_DIR
from llm_quest.recipes.config_schema import BatchedConfig, TextDataConfig, TokenizerConfig
from llm_quest.recipes.dependent_defaults import is_own_choice
from llm_quest.recipes.row_source import RowsConfig
from llm_quest.recipes.technique_entry import known_techniques
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.techniques.adapter_targets import describe_addresses
from llm_quest.techniques.lora import adapter_addresses
from llm_quest.techniques.score_head import find_score_head
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed

ConfigT = TypeVar("ConfigT", bound=Any)


@dataclass(frozen=True)
class TextData:
    """The tokens that a run reads. split: the documents themselves, None where only numbers were given or another
    process prepared them."""

    tokens: TokenFolder
    tokenizer: Tokenizer
    facts: dict[str, Any]
    split: CorpusSplit | None = None


def load_text_data(data: TextDataConfig, choice: TokenizerConfig, parallel: DistributedContext, log: LogFn) -> TextData:
    """Load the text of a run; the main process prepares it for all."""
    text = prepare_text_data(data, choice, log) if parallel.is_main_process else None
    where, facts = parallel.broadcast((str(text.tokens.path), text.facts) if text is not None else None)
    if text is not None:
        return text
    folder = open_token_folder(where, verify="size")
    return TextData(folder, folder.load_tokenizer(), facts)


def prepare_text_data(data: TextDataConfig, choice: TokenizerConfig, log: LogFn) -> TextData:
    """Prepare the text of a run from documents, or open a folder of tokens that was prepared before."""
    if (prepared := token_folder(data)) is not None:
        folder = open_token_folder(prepared)
        if choice.load is not None and Tokenizer.load(choice.load).hash != folder.load_tokenizer().hash:
            raise DataError(
                f"{source_name(data)} was prepared with another tokenizer than {choice.load}; leave tokenizer.load out"
            )
        return TextData(folder, folder.load_tokenizer(), text_facts(folder))
    key = json.dumps([str(cache_dir("tokens")), data.model_dump(mode="json"), choice.model_dump(mode="json")])
    text = PREPARED.get(key)
    if text is None or not text.tokens.path.is_dir():
        text = prepare_documents(data, choice, log)
        PREPARED.clear()
        if (
            choice.load is None
            and data.validation is None
            and all(is_builtin(source.path) for source in data_sources(data))
        ):
            PREPARED[key] = text
    facts = text.facts
    log(
        f"text: {facts['train_bytes']:,} bytes in {facts['train_documents']} documents to train on, "
        f"{facts['val_bytes']:,} in {facts['val_documents']} held out; {facts['train_tokens']:,} tokens"
        + f" of {text.tokenizer.vocab_size:,} kinds"
    )
    if text.split is not None:
        log_remarks(text.split.corpus.drop_report, log)
    return text


PREPARED: dict[str, TextData] = {}
"""The builtin text of the last run of this process, by its settings: it can't change, so a process of many runs reads
it once. Other text may change, and is read for each."""


def prepare_documents(data: TextDataConfig, choice: TokenizerConfig, log: LogFn) -> TextData:
    """Read documents, choose what is held out, train a tokenizer, write token files."""
    with phase(f"reading {source_name(data)}"):
        corpus = load_config_corpus(data)
    with phase("choosing what is held out"):
        with report_skipped_rows(corpus.drop_report):
            parts = split_text(corpus, data)
        parts = replace(parts, train=tuple(repeat_by_weight(parts.train)))
    with phase("training a tokenizer" if choice.load is None else "reading the tokenizer"):
        tokenizer = (
            load_any_tokenizer(choice.load)
            if choice.load is not None
            else train_or_load_tokenizer(parts, choice.vocab_size, log)
        )
    with phase(f"turning {sum(document.nbytes for document in corpus.documents):,} bytes into tokens"):
        folder = prepare_token_folder(parts, tokenizer)
    facts = text_facts(folder) | {"corpus": corpus.as_json()}  # the cache's manifest names its first source
    return TextData(folder, tokenizer, facts, parts)


def data_sources(data: RowsConfig) -> tuple[DataSource, ...]:
    """The sources of a config, one or more."""
    if isinstance(data.source, str):
        return (DataSource(data.source),)
    return tuple(DataSource(one.path, one.weight, one.name, one.split) for one in data.source)


def source_name(data: RowsConfig) -> str:
    """The sources in words."""
    return ", ".join(source.path for source in data_sources(data))


def token_folder(data: RowsConfig) -> Path | None:
    """The folder of prepared tokens, where the source is one."""
    folder = Path(source_name(data))
    return folder if (folder / "manifest.json").is_file() else None


def iter_config_records(
    config: RowsConfig, drop_report: DropReport, builtin: Builtin | None = None
) -> Iterator[Record]:
    """The rows that a config names."""
    return iter_sources(data_sources(config), drop_report, builtin=builtin, columns=config.columns)


def load_config_rows(
    config: RowsConfig, read: Any, drop_report: DropReport, *, builtin: Builtin | None = None, limit: int | None = None
) -> list[Any]:
    """Read the rows that a config names by `read`. DataError if none is left."""
    named = partial(load_rows, data_sources(config), read, drop_report, builtin=builtin, limit=limit)
    return named(columns=config.columns, strict=config.strict)


def load_split_rows(
    config: Any,
    read: Any,
    drop_report: DropReport,
    *,
    builtin: Builtin | None = None,
    limit: int | None = None,
    split: Callable[[list[Any], float], tuple[list[Any], list[Any]]] = split_by_prompt,
) -> tuple[list[Any], list[Any]]:
    """(training, held out): a part of the rows, the rows of data.validation, or none (held_out=0). config: a RowsConfig
    with `held_out`. split: which rows are that part."""
    rows = load_config_rows(config, read, drop_report, builtin=builtin, limit=limit)
    if config.validation is None:
        with report_skipped_rows(drop_report):
            rows, held_out = split(rows, config.held_out) if config.held_out else (rows, [])
    else:
        held_out = load_config_rows(config.of_validation, read, drop_report, builtin=builtin)
        known = {first_question_hash(row.prompt) for row in rows}
        if shared := sum(first_question_hash(one.prompt) in known for one in held_out):
            drop_report.note(
                f"{shared:,} of the {len(held_out):,} rows of data.validation: their prompt is trained on too"
            )
    part = choose_eval_part(
        [1] * len(held_out), [first_question_hash(one.prompt) for one in held_out], config.eval_part
    )
    return rows, [held_out[number] for number in part]


@contextmanager
def report_skipped_rows(drop_report: DropReport) -> Iterator[None]:
    """Add the skipped rows to an error about too few rows: they may be the reason."""
    try:
        yield
    except DataError as error:
        if not drop_report.skipped:
            raise
        summary = f"{drop_report.describe_skipped()}, first: {drop_report.skipped_rows[0]}"
        raise DataError(f"{error}\n{summary}") from None


def log_remarks(drop_report: DropReport, log: LogFn) -> None:
    """Log the parts of the rows that are not used."""
    for line in drop_report.remarks():
        log(line)


def load_config_corpus(data: TextDataConfig) -> Corpus:
    """The documents that a config names."""
    return load_corpus(data_sources(data), columns=data.columns, separator=data.separator, strict=data.strict)


def split_text(corpus: Corpus, data: TextDataConfig) -> CorpusSplit:
    """Documents to train on and held-out ones: a part of them, those of data.validation, or none (held_out=0)."""
    if data.validation is None:
        return split_corpus(corpus, held_out=data.held_out)
    validation = load_config_corpus(data.of_validation)
    held_out = validation.documents
    for line in validation.drop_report.remarks():
        corpus.drop_report.note(f"data.validation: {line}")
    overlap = shingle_overlap(corpus.documents, held_out)
    corpus.drop_report.note(f"overlap: {overlap:.1%} of the runs of words of data.validation are trained on too")
    return CorpusSplit(corpus, corpus.documents, tuple(held_out))


def load_any_tokenizer(name_or_path: str) -> Tokenizer:
    """A tokenizer from its file, or from a model's folder, run or hub id."""
    from llm_quest.hub.load_tokenizer import load_tokenizer

    return Tokenizer.load(name_or_path) if name_or_path.endswith(".json") else load_tokenizer(name_or_path)


def train_or_load_tokenizer(parts: CorpusSplit, vocab: int, log: LogFn) -> Tokenizer:
    """Train a BPE on the training documents alone, or load it from the cache."""
    cache_key = json.dumps([[document.hash for document in parts.train], vocab, version("tokenizers")])
    folder = cache_dir("tokenizers") / hashlib.sha256(cache_key.encode()).hexdigest()[:32]
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    log(f"training a tokenizer of {vocab:,} tokens on {sum(document.nbytes for document in parts.train):,} bytes")
    tokenizer = train_bpe((document.text for document in parts.train), vocab)
    with (
        tolerate_cache_errors(folder.parent),
        suppress(UsageError),  # another process was first
        atomic_dir(folder, overwrite=False, replaceable=lambda name: False, required_bytes=0) as stage,
    ):
        tokenizer.save(stage)
    return tokenizer


def text_facts(folder: TokenFolder) -> dict[str, Any]:
    """Facts about the data, for the report."""
    counted = {
        f"{name}_{what}": number
        for name, tokens in (("train", folder.train), ("val", folder.val))
        for what, number in (
            ("documents", tokens.num_documents),
            ("bytes", tokens.num_bytes),
            ("tokens", tokens.num_targets),
        )
    }
    manifest = folder.manifest
    hashes = {
        "train_sha256": folder.train.hash,
        "val_sha256": folder.val.hash,
        "tokenizer_sha256": manifest["tokenizer"],
    }
    return {
        **counted,
        **hashes,
        "vocab_size": manifest["vocab_size"],
        "corpus": manifest.get("corpus"),
        "folder": str(folder.path),
    }


MICRO_BATCH_TOKENS = 8192
"""Tokens of a micro-batch where micro_batch_size is null."""


def micro_batch_rows(config: BatchedConfig, parallel: DistributedContext, length: int) -> int:
    """Rows of a micro-batch: the given number, else the largest equal part of this process's rows within
    MICRO_BATCH_TOKENS. length: tokens of the longest row."""
    own_rows = config.batch_size // parallel.world_size
    if config.micro_batch_size is not None:
        return min(config.micro_batch_size, own_rows)
    most = max(1, min(own_rows, MICRO_BATCH_TOKENS // length))
    return max(number for number in range(1, most + 1) if own_rows % number == 0)


def make_sharded_loader(
    config: BatchedConfig, source: SourceT, parallel: DistributedContext, micro_batch_size: int | None = None
) -> ShardedLoader[SourceT]:
    """This process's rows of every step, in an order that the run's seed decides. micro_batch_size: None for the
    config's, or where that is null for all rows at once."""
    whole = config.batch_size // parallel.world_size
    return ShardedLoader(
        source,
        batch_size=config.batch_size,
        micro_batch_size=micro_batch_size or min(config.micro_batch_size or whole, whole),
        seed=derive_seed(config.seed, "order"),
        shard=parallel.data_shard,
    )


def require_run_exists(name_or_path: str, key: str, command: str) -> None:
    """Raise UsageError for a run that does not exist (it would be searched on the hub). key: of the recipe; command:
    the command that trains one."""
    if name_or_path.startswith("runs/") and not resolve_checkpoint(name_or_path).is_dir():
        raise UsageError(f"there is no run {name_or_path}: train one first ({command}), or give {key}=FOLDER")


def count_epochs(config: ConfigT, settings: RawConfig, rows: int | None, log: LogFn) -> ConfigT:
    """Replace num_train_epochs of a config by max_steps. rows: of an epoch (a policy's prompts); None: they are drawn
    without end. A warm-up that the user did not set keeps its share of a shorter run."""
    epochs = config.num_train_epochs
    if epochs is None:
        return config
    if rows is None:
        raise UsageError("num_train_epochs has no effect on rows that are drawn without end; give max_steps")
    steps = math.ceil(epochs * rows / config.rows_per_step) * config.steps_per_batch
    warmup = config.warmup_steps
    if not is_own_choice(settings, "warmup_steps", str(RECIPES_DIR)):
        warmup = min(warmup, math.ceil(warmup * steps / config.max_steps))
    often = f" and {config.steps_per_batch} steps each" if config.steps_per_batch > 1 else ""
    log(f"epochs: {epochs:g} of {rows:,} rows, {config.rows_per_step} at a time{often}, are {steps:,} steps")
    update = {"num_train_epochs": None, "max_steps": steps, "warmup_steps": min(warmup, steps)}
    return config.model_copy(update=update)


def fit_sequence_length(config: ConfigT, settings: RawConfig, context: int, log: LogFn = lambda text: None) -> ConfigT:
    """Limit sequence_length of a config to the model's context. UsageError for a longer one that the user set; the
    recipe's own is lowered."""
    length = config.sequence_length
    if length <= context:
        return config
    if is_own_choice(settings, "sequence_length", str(RECIPES_DIR)):
        raise UsageError(
            f"sequence_length {length} is longer than the model's context of {context}; lower sequence_length"
        )
    log(f"rows of {context} tokens: the model's context ends there (sequence_length of this recipe is {length})")
    return config.model_copy(update={"sequence_length": context})


def apply_techniques(
    entries: Sequence[Mapping[str, Any]], model: Any, log: LogFn, *, scores: bool = False
) -> list[Callback]:
    """Apply techniques to the model, in place and in order, and log what became trainable; returns those that act after
    every step. scores: whether the recipe trains a score head; the others need the head over the vocabulary."""
    callbacks: list[Callback] = []
    summary = trainable_summary(model) if entries else ""
    for entry in entries:
        options = {key: value for key, value in entry.items() if key != "name"}
        one: Any = TypeAdapter(known_techniques()[entry["name"]]).validate_python(options)
        if callable(one):
            try:
                edited = one(model)
            except ValueError as error:
                raise UsageError(f"technique {entry['name']}: {error}") from None
            assert edited is model, "a recipe's techniques edit in place"
        if isinstance(one, Callback):
            callbacks.append(one)
        before, summary = summary, trainable_summary(model)
        log(f"technique: {entry['name']}{summary if summary != before else ''}")
    if not scores and find_score_head(model) is not None:
        raise UsageError(
            "the model has a score head in place of the head over the vocabulary, which this recipe trains: leave the "
            "technique score_head out, or begin with a language model (scores are trained by classify, reward and prm)"
        )
    return callbacks


def trainable_summary(model: Any) -> str:
    """A phrase that names the adapted matrices, and the trained share of the model if it is not all of it."""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    addresses = adapter_addresses(model)
    where = f" of {describe_addresses(addresses)} ({len(addresses)} matrices)" if addresses else ""
    return where + (
        f"; {learned:,} of {whole:,} numbers are trained ({learned / whole:.3%})" if learned < whole else ""
    )
