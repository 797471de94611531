"""From a data source to numbers on disk: documents, split, tokenizer, token folder. The leader prepares, the others
open."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm_quest.data.corpus import load_corpus
from llm_quest.data.split import CorpusSplit, split_corpus
from llm_quest.data.tokenizer import Tokenizer, train_bpe
from llm_quest.data.tokens import TokenFolder, default_cache_dir, open_token_folder, prepare_token_folder
from llm_quest.errors import DataError
from llm_quest.recipes.config_schema import TextDataConfig, TokenizerConfig
from llm_quest.train.parallel import DistributedContext

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class TextData:
    """What a run reads. split: the documents themselves, None where only numbers were given or another process
    prepared them."""

    tokens: TokenFolder
    tokenizer: Tokenizer
    facts: dict[str, Any]
    split: CorpusSplit | None = None


def load_text_data(data: TextDataConfig, choice: TokenizerConfig, parallel: DistributedContext, log: LogFn) -> TextData:
    """The text of a run, for every process."""
    text = prepare_text_data(data, choice, log) if parallel.is_main_process else None
    where = parallel.broadcast(str(text.tokens.path) if text is not None else None)
    if text is not None:
        return text
    folder = open_token_folder(where, verify="size")
    return TextData(folder, folder.load_tokenizer(), text_facts(folder))


def prepare_text_data(data: TextDataConfig, choice: TokenizerConfig, log: LogFn) -> TextData:
    """From documents, or from a token folder that was prepared before."""
    if (Path(data.source) / "manifest.json").is_file():
        folder = open_token_folder(data.source)
        if choice.load is not None and Tokenizer.load(choice.load).hash != folder.load_tokenizer().hash:
            raise DataError(
                f"{data.source} was prepared with another tokenizer than {choice.load}; leave tokenizer.load out"
            )
        return TextData(folder, folder.load_tokenizer(), text_facts(folder))
    parts = split_corpus(
        load_corpus(data.source, column=data.text_column, separator=data.separator), held_out=data.held_out
    )
    tokenizer = (
        load_any_tokenizer(choice.load)
        if choice.load is not None
        else train_or_load_tokenizer(parts, choice.vocab_size, log)
    )
    folder = prepare_token_folder(parts, tokenizer, default_cache_dir())
    facts = text_facts(folder)
    log(
        f"text: {facts['train_bytes']:,} bytes in {facts['train_documents']} documents to train on, "
        f"{facts['val_bytes']:,} in {facts['val_documents']} held out; {facts['train_tokens']:,} tokens"
        + f" of {tokenizer.vocab_size:,} kinds"
    )
    return TextData(folder, tokenizer, facts, parts)


def load_any_tokenizer(name_or_path: str) -> Tokenizer:
    """A tokenizer from its file, or from a model's folder, run or hub id."""
    from llm_quest.hub.load_save import load_tokenizer

    return Tokenizer.load(name_or_path) if name_or_path.endswith(".json") else load_tokenizer(name_or_path)


def train_or_load_tokenizer(parts: CorpusSplit, vocab: int, log: LogFn) -> Tokenizer:
    """A BPE trained on the training documents alone, remembered by what it was trained on."""
    cache_key = json.dumps([[document.hash for document in parts.train], vocab, version("tokenizers")])
    cache_dir = default_cache_dir().parent / "tokenizers" / hashlib.sha256(cache_key.encode()).hexdigest()[:32]
    if (cache_dir / "tokenizer.json").is_file():
        return Tokenizer.load(cache_dir)
    log(f"training a tokenizer of {vocab:,} tokens on {sum(document.nbytes for document in parts.train):,} bytes")
    tokenizer = train_bpe((document.text for document in parts.train), vocab)
    cache_dir.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=cache_dir.parent))
    try:
        tokenizer.save(stage)
        os.rename(stage, cache_dir)
    except OSError:
        # Another process was first, or the cache can't be written; it is only a cache.
        shutil.rmtree(stage, ignore_errors=True)
    return tokenizer


def text_facts(folder: TokenFolder) -> dict[str, Any]:
    """What the report tells about the data."""
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
