"""Token folders: whole or not there, checked when opened, made once for the same texts and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm_quest.cache_dirs import cache_dir
from llm_quest.data.corpus import Corpus
from llm_quest.data.document import Document, DropReport
from llm_quest.data.split import CorpusSplit
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.tokens import (
    TokenFolder,
    TokenizedDocuments,
    open_token_folder,
    prepare_token_folder,
)
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError, ResourceError

TRAIN = tuple(Document(text, f"doc{i}") for i, text in enumerate(["one two", "drei é", "four " * 5]))
VAL = (Document("five six", "doc3"),)
PARTS = CorpusSplit(Corpus("test", TRAIN + VAL, DropReport(), "0" * 64), TRAIN, VAL)
TOKENIZER = train_bpe([d.text for d in TRAIN], 280)


def test_dev_and_test_are_halves_of_what_is_held_out():
    documents = [[number] * (number + 3) for number in range(40)]
    whole = TokenizedDocuments.from_token_lists(documents, vocab_size=64, start=62, end=63)
    dev, test = whole.eval_part("dev"), whole.eval_part("test")
    found = sorted([*map(list, dev.documents()), *map(list, test.documents())])
    assert found == documents, "each document in one half"
    assert dev.num_bytes + test.num_bytes == whole.num_bytes
    assert abs(dev.num_targets - test.num_targets) < 45, "halves by tokens, not by documents"
    assert whole.eval_part("all") is whole
    assert len({whole.hash, dev.hash, test.hash}) == 3


def test_one_document_is_cut_into_halves():
    whole = TokenizedDocuments.from_token_lists([list(range(40))], vocab_size=64, start=62, end=63)
    dev, test = whole.eval_part("dev"), whole.eval_part("test")
    assert [*dev.ids, *test.ids] == whole.ids.tolist()
    assert dev.num_bytes + test.num_bytes == whole.num_bytes
    assert dev.validate("dev").num_documents == test.validate("test").num_documents == 1
    with pytest.raises(DataError, match=r"can't be halved.*hold out more"):
        TokenizedDocuments.from_token_lists([[1]], vocab_size=64, start=62, end=63).eval_part("dev")


def test_documents_come_back_with_their_bytes(tmp_path: Path):
    folder = prepare_token_folder(PARTS, TOKENIZER, tmp_path)
    assert [TOKENIZER.decode(ids) for ids in folder.train.documents()] == [d.text for d in TRAIN]
    assert folder.train.nbytes.tolist() == [7, 7, 25]
    assert folder.manifest["splits"]["train"] == {
        "documents": 3,
        "tokens": sum(len(TOKENIZER.encode(d.text)) for d in TRAIN),
        "bytes": 39,
    }
    assert folder.val.num_bytes == 8
    assert folder.manifest["tokenizer"] == TOKENIZER.hash == folder.load_tokenizer().hash


def test_each_document_lies_between_start_and_end(tmp_path: Path):
    train = prepare_token_folder(PARTS, TOKENIZER, tmp_path).train
    assert train.ids.dtype == np.uint16
    assert train.ids[train.offsets[:-1]].tolist() == [0, 0, 0] == train.ids[train.offsets[1:] - 1].tolist()
    assert train.num_targets == len(train.ids) - 3


def test_the_second_time_nothing_is_written(tmp_path: Path):
    first = prepare_token_folder(PARTS, TOKENIZER, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in first.path.rglob("*")}
    second = prepare_token_folder(PARTS, TOKENIZER, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in second.path.rglob("*")} == before
    assert second.train.hash == first.train.hash
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [first.path.name]


def test_another_text_tokenizer_or_split_is_another_folder(tmp_path: Path):
    first = prepare_token_folder(PARTS, TOKENIZER, tmp_path)
    others = [
        prepare_token_folder(PARTS, train_bpe(["one one two two"], 270), tmp_path),
        prepare_token_folder(CorpusSplit(PARTS.corpus, TRAIN + VAL, ()), TOKENIZER, tmp_path),
    ]
    assert len({folder.path for folder in (first, *others)}) == 3
    assert (others[1].val.num_documents, others[1].val.num_targets) == (0, 0)


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    endless = Tokenizer(TOKENIZER.backend_tokenizer, bos_token="<|im_start|>")
    with pytest.raises(DataError, match="names no end-of-text token"):
        prepare_token_folder(PARTS, endless, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def damage_ids(folder: TokenFolder) -> None:
    ids = np.fromfile(folder.path / "train.bin", dtype="<u2")
    ids[3] = 9999
    ids.tofile(folder.path / "train.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_ids, "train.bin has changed"),
        (lambda folder: (folder.path / "val.bin").write_bytes(b""), "val.bin has 0 bytes, its manifest says"),
        (lambda folder: (folder.path / "train.bytes.npy").unlink(), "train.bytes.npy is missing"),
        (lambda folder: (folder.path / "manifest.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder.path / "manifest.json").write_text('{"format": 0}'), "not of format 1"),
        (lambda folder: (folder.path / "manifest.json").write_text('{"format": 1}'), "is incomplete"),
        (lambda folder: (folder.path / "manifest.json").unlink(), "not a token folder"),
    ],
)
def test_damage_is_seen_and_prepared_data_are_made_anew(tmp_path: Path, damage, message: str):
    folder = prepare_token_folder(PARTS, TOKENIZER, tmp_path)
    damage(folder)
    with pytest.raises(DataError, match=message):
        open_token_folder(folder.path)
    again = prepare_token_folder(PARTS, TOKENIZER, tmp_path)
    assert again.train.hash == folder.train.hash
    assert [TOKENIZER.decode(ids) for ids in again.train.documents()] == [d.text for d in TRAIN]


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="token 9 at place 2 is outside the vocabulary of 9"):
        TokenizedDocuments.from_token_lists([[3, 9]], vocab_size=9, start=0, end=0)
    folder = prepare_token_folder(PARTS, TOKENIZER, tmp_path).path
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 100}))
    with pytest.raises(DataError, match="outside the vocabulary of 100; prepare the data again"):
        open_token_folder(folder)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path):
    large = train_bpe(["a"], 264)
    large.backend_tokenizer.add_tokens([f"<{i}>" for i in range(70_000)])
    large = type(large)(large.backend_tokenizer, eos_tokens=["<|endoftext|>"])
    folder = prepare_token_folder(CorpusSplit(PARTS.corpus, (Document("a<69999>", "doc"),), VAL), large, tmp_path)
    assert folder.train.ids.dtype == np.uint32
    assert folder.train.ids.max() == large.vocab_size - 1


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"cannot be written to .*file"):
        prepare_token_folder(PARTS, TOKENIZER, tmp_path / "file" / "below")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("LLM_QUEST_CACHE", raising=False)
    assert cache_dir("tokens") == Path("/x/llm-quest/tokens")
    monkeypatch.setenv("LLM_QUEST_CACHE", "/y")
    assert cache_dir("tokens") == Path("/y/tokens")
