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

from llm_quest.data.corpus import gather
from llm_quest.data.split import Split, split
from llm_quest.data.tokenizer import Tokenizer, train_bpe
from llm_quest.data.tokens import TokenFolder, default_cache, open_tokens, prepare
from llm_quest.errors import DataError
from llm_quest.recipes.parts import Data, TokenizerPart
from llm_quest.train.parallel import Parallel

Say = Callable[[str], None]


@dataclass(frozen=True)
class Text:
    """What a run reads. parts: the documents themselves, None where only numbers were given or another process
    prepared them."""

    folder: TokenFolder
    tokenizer: Tokenizer
    facts: dict[str, Any]
    parts: Split | None = None


def ready(data: Data, choice: TokenizerPart, parallel: Parallel, say: Say) -> Text:
    """The text of a run, for every process."""
    text = made(data, choice, say) if parallel.leader else None
    where = parallel.broadcast(str(text.folder.path) if text is not None else None)
    if text is not None:
        return text
    folder = open_tokens(where, verify="size")
    return Text(folder, folder.tokenizer(), facts_of(folder))


def made(data: Data, choice: TokenizerPart, say: Say) -> Text:
    """From documents, or from a token folder that was prepared before."""
    if (Path(data.source) / "manifest.json").is_file():
        folder = open_tokens(data.source)
        if choice.load is not None and Tokenizer.load(choice.load).hash != folder.tokenizer().hash:
            raise DataError(
                f"{data.source} was prepared with another tokenizer than {choice.load}; leave tokenizer.load out"
            )
        return Text(folder, folder.tokenizer(), facts_of(folder))
    parts = split(gather(data.source, column=data.column, separator=data.separator), held_out=data.held_out)
    tokenizer = loaded(choice.load) if choice.load is not None else trained(parts, choice.vocab, say)
    folder = prepare(parts, tokenizer, default_cache())
    facts = facts_of(folder)
    say(
        f"text: {facts['train_bytes']:,} bytes in {facts['train_documents']} documents to train on, "
        f"{facts['val_bytes']:,} in {facts['val_documents']} held out; {facts['train_tokens']:,} tokens"
        + f" of {tokenizer.vocab_size:,} kinds"
    )
    return Text(folder, tokenizer, facts, parts)


def loaded(where: str) -> Tokenizer:
    """A tokenizer from its file, or from a model's folder, run or hub id."""
    from llm_quest.hub.files import load_tokenizer

    return Tokenizer.load(where) if where.endswith(".json") else load_tokenizer(where)


def trained(parts: Split, vocab: int, say: Say) -> Tokenizer:
    """A BPE trained on the training documents alone, remembered by what it was trained on."""
    told = json.dumps([[document.hash for document in parts.train], vocab, version("tokenizers")])
    place = default_cache().parent / "tokenizers" / hashlib.sha256(told.encode()).hexdigest()[:32]
    if (place / "tokenizer.json").is_file():
        return Tokenizer.load(place)
    say(f"training a tokenizer of {vocab:,} tokens on {sum(document.nbytes for document in parts.train):,} bytes")
    tokenizer = train_bpe((document.text for document in parts.train), vocab)
    place.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        tokenizer.save(stage)
        os.rename(stage, place)
    except OSError:
        # Another process was first, or the cache can't be written; it is only a cache.
        shutil.rmtree(stage, ignore_errors=True)
    return tokenizer


def facts_of(folder: TokenFolder) -> dict[str, Any]:
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
