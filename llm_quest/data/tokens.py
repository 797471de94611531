"""Token folders: tokenized documents on disk, memory-mapped, verified, and reused as long as data and tokenizer are the
same.

    manifest.json          format, sizes and sha256 of the files, vocabulary, tokenizer's hash, corpus, bytes per split
    train.bin  val.bin     little-endian uint16 (uint32 above 65,536 tokens): each document is  start token ... token
    end train.offsets.npy      (documents + 1) where each document begins in the .bin
    train.bytes.npy        (documents) its bytes of UTF-8, for bits per byte
    tokenizer/             the tokenizer, in the Hugging Face layout

A folder is written under another name and renamed at the end: it is complete or it does not exist.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from llm_quest.cache_dirs import write_to_cache
from llm_quest.data.document import Document
from llm_quest.data.split import CorpusSplit, choose_eval_part
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, ResourceError
from llm_quest.files import damaged_file_errors, file_sha256, fsync_path, load_json

TOKEN_FOLDER_FORMAT = 1
SPLITS = ("train", "val")


@dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """The documents of one split. ids: start, tokens, end of each document, one after another; offsets (documents +
    1): where each begins; nbytes (documents): its bytes as text; hash: of all of it. Each id but a document's last is
    an input, and the id after it is its target: every byte of a document and its end are predicted."""

    ids: np.ndarray
    offsets: np.ndarray
    nbytes: np.ndarray
    vocab_size: int
    hash: str

    @classmethod
    def from_token_lists(
        cls, documents: Sequence[Sequence[int]], *, vocab_size: int, start: int, end: int
    ) -> TokenizedDocuments:
        """From lists of ids, in memory; a document counts as many bytes as it has tokens."""
        whole = [np.array([start, *document, end], dtype=np.int64) for document in documents]
        ids = np.concatenate(whole) if whole else np.zeros(0, dtype=np.int64)
        offsets = np.cumsum([0, *map(len, whole)], dtype=np.int64)
        nbytes = np.diff(offsets) - 2
        digest = hashlib.sha256(ids.tobytes() + offsets.tobytes()).hexdigest()
        return cls(ids, offsets, nbytes, vocab_size, digest).validate("these documents")

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_targets(self) -> int:
        """The number of predictions in one pass over the split."""
        return len(self.ids) - self.num_documents

    @property
    def num_bytes(self) -> int:
        return int(self.nbytes.sum())

    def document(self, number: int) -> np.ndarray:
        """The tokens of a document, without start and end."""
        return np.asarray(self.ids[self.offsets[number] + 1 : self.offsets[number + 1] - 1])

    def documents(self) -> Iterator[np.ndarray]:
        return (self.document(number) for number in range(self.num_documents))

    def eval_part(self, part: str) -> TokenizedDocuments:
        """The documents of `dev` or `test`, the halves of a held-out split; `all`: itself. One document is cut into
        two, whose bytes are counted by their tokens."""
        if part == "all":
            return self
        if self.num_documents == 1 and len(self.ids) >= 8:
            middle, size = len(self.ids) // 2, len(self.ids)
            ids, share = (self.ids[:middle], middle / size) if part == "dev" else (self.ids[middle:], 1 - middle / size)
            documents, nbytes = [np.asarray(ids)], np.array([max(1, round(share * int(self.nbytes[0])))])
        else:
            whole = [self.ids[begin:end] for begin, end in pairwise(self.offsets.tolist())]
            keys = [hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest() for ids in whole]
            numbers = choose_eval_part([len(ids) for ids in whole], keys, part)
            documents, nbytes = [whole[number] for number in numbers], self.nbytes[numbers]
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        digest = hashlib.sha256(f"{self.hash} {part}".encode()).hexdigest()
        return TokenizedDocuments(np.concatenate(documents), offsets, nbytes, self.vocab_size, digest)

    def validate(self, name: str) -> TokenizedDocuments:
        """Itself; DataError if an id lies outside the vocabulary or the documents do not fill the ids."""
        filled = len(self.offsets) and self.offsets[0] == 0 and self.offsets[-1] == len(self.ids)
        if not filled or np.any(np.diff(self.offsets) < 2) or len(self.nbytes) != self.num_documents:
            raise DataError(f"{name}: the documents do not fill the {len(self.ids)} tokens; prepare the data again")
        for at in range(0, len(self.ids), 1 << 22):
            part = self.ids[at : at + (1 << 22)]
            if int(part.max()) >= self.vocab_size or int(part.min()) < 0:
                wrong = at + int(np.argmax((part >= self.vocab_size) | (part < 0)))
                raise DataError(
                    f"{name}: token {int(self.ids[wrong])} at place {wrong} is outside the vocabulary of "
                    f"{self.vocab_size}; prepare the data again with the model's tokenizer"
                )
        return self


@dataclass(frozen=True)
class TokenFolder:
    """An opened token folder."""

    path: Path
    manifest: dict[str, Any]
    train: TokenizedDocuments
    val: TokenizedDocuments

    def load_tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer")


def prepare_token_folder(split: CorpusSplit, tokenizer: Tokenizer, root: str | Path | None = None) -> TokenFolder:
    """The token folder of a split below `root`, named by the hash of its texts and tokenizer: made if it does not
    exist, opened if it does. Of concurrent processes one makes it and the others wait. A damaged one is made anew,
    which the report says. root: None for the cache folder, or a temporary one where that cannot be written."""
    make = partial(_find_or_write, split, tokenizer)
    try:
        return write_to_cache("tokens", make) if root is None else make(Path(root))
    except OSError as error:
        where = root or error.filename or tempfile.gettempdir()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left for the tokens in {where}; free some or name another folder") from error
        reason = error.strerror or error
        raise ResourceError(
            f"the tokens cannot be written to {where}: {reason}; name another folder in LLM_QUEST_CACHE"
        ) from error


def _find_or_write(split: CorpusSplit, tokenizer: Tokenizer, root: Path) -> TokenFolder:
    """A folder that is there is whole, and opened without the lock, which needs a folder that can be written."""
    folder = root / _folder_key(split, tokenizer)
    with contextlib.suppress(DataError, OSError):
        return open_token_folder(folder)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        if (folder / "manifest.json").exists():
            try:
                return open_token_folder(folder)
            except DataError as error:
                split.corpus.drop_report.note(f"prepared data was damaged and is made anew: {error}")
        shutil.rmtree(folder, ignore_errors=True)
        return _write_folder(split, tokenizer, folder)


def open_token_folder(folder: str | Path, *, verify: Literal["full", "size"] = "full") -> TokenFolder:
    """Open a token folder without reading it into memory. full: check the sha256 of every file and every id against
    the vocabulary; size: only the length of each file. DataError names what is missing, damaged or of another
    format."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    with damaged_file_errors(folder, "prepare the data again"):
        _verify_files(folder, manifest, verify)
        train, val = (_open_split(folder, name, manifest, verify) for name in SPLITS)
    return TokenFolder(folder, manifest, train, val)


def _verify_files(folder: Path, manifest: dict[str, Any], verify: str) -> None:
    for name, facts in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing; prepare the data again")
        if (size := file.stat().st_size) != facts["size"]:
            raise DataError(f"{file} has {size} bytes, its manifest says {facts['size']}; prepare the data again")
        if verify == "full" and file_sha256(file) != facts["sha256"]:
            raise DataError(f"{file} has changed since it was written (sha256 differs); prepare the data again")


def _write_folder(split: CorpusSplit, tokenizer: Tokenizer, folder: Path) -> TokenFolder:
    stage = folder.with_name(f".{folder.name}.part")  # one name: the lock is held, so what lies there is dead
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir()
        tokenizer.save(stage / "tokenizer")
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        counts = {name: _write_split(stage, name, getattr(split, name), tokenizer, dtype) for name in SPLITS}
        manifest = {
            "format": TOKEN_FOLDER_FORMAT,
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.hash,
            "start": tokenizer.start_token_id,
            "end": tokenizer.eos_token_id,
            "splits": counts,
            "corpus": split.corpus.as_json(),
            "python": platform.python_version(),
            "files": {
                file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
                for file in sorted(stage.glob("*.*"))
            },
        }
        (stage / "manifest.json").write_text(
            json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for file in stage.iterdir():
            if file.is_file():
                fsync_path(file)
        os.rename(stage, folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return open_token_folder(folder, verify="size")


def _write_split(
    stage: Path, name: str, documents: Sequence[Document], tokenizer: Tokenizer, dtype: str
) -> dict[str, int]:
    start, end = tokenizer.start_token_id, tokenizer.eos_token_id
    lengths, nbytes = [], []
    with (stage / f"{name}.bin").open("wb") as file:
        for batch in _group_documents(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
            for document, ids in zip(batch, encoded, strict=True):
                file.write(np.array([start, *ids, end], dtype=dtype).tobytes())
                lengths.append(len(ids) + 2)
                nbytes.append(document.nbytes)
    _write_array(stage / f"{name}.offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    _write_array(stage / f"{name}.bytes.npy", np.array(nbytes, dtype=np.int64))
    return {"documents": len(lengths), "tokens": sum(lengths) - 2 * len(lengths), "bytes": sum(nbytes)}


def _write_array(file: Path, array: np.ndarray) -> None:
    """A .npy file. (`np.save` and `tofile` on a full disk raise an error that has no number.)"""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    file.write_bytes(content.getvalue())


def _group_documents(documents: Sequence[Document], size: int = 4 << 20) -> Iterator[list[Document]]:
    """Runs of documents of about `size` bytes."""
    batch: list[Document] = []
    group_size = 0
    for document in documents:
        batch.append(document)
        group_size += document.nbytes
        if group_size >= size:
            yield batch
            batch, group_size = [], 0
    if batch:
        yield batch


def _open_split(folder: Path, name: str, manifest: dict[str, Any], verify: str) -> TokenizedDocuments:
    file = folder / f"{name}.bin"
    empty = file.stat().st_size == 0
    ids = np.zeros(0, dtype=manifest["dtype"]) if empty else map_numbers(file, manifest["dtype"])
    offsets, nbytes = (_load_array(folder / f"{name}.{part}.npy") for part in ("offsets", "bytes"))
    facts = [manifest["files"][f"{name}{end}"]["sha256"] for end in (".bin", ".offsets.npy", ".bytes.npy")]
    tokens = TokenizedDocuments(
        ids, offsets, nbytes, manifest["vocab_size"], hashlib.sha256("".join(facts).encode()).hexdigest()
    )
    return tokens.validate(str(file)) if verify == "full" else tokens


def _load_array(file: Path) -> np.ndarray:
    """Mapped first: a header that claims more numbers than the file holds is refused before memory is taken."""
    try:
        return np.array(np.load(file, mmap_mode="r", allow_pickle=False))
    except OSError:  # a file system that maps nothing
        return np.load(file, allow_pickle=False)  # type: ignore[no-any-return]
    except Exception as error:  # numpy reads the header as Python: ValueError, tokenize.TokenError and others
        raise DataError(f"{file} is damaged ({str(error)[:80]}); prepare the data again") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "manifest.json"
    if not file.is_file():
        raise DataError(f"{folder} is not a token folder: it has no manifest.json")
    manifest: dict[str, Any] = load_json(file, remedy="prepare the data again")
    if manifest.get("format") != TOKEN_FOLDER_FORMAT:
        raise DataError(
            f"{file} is not of format {TOKEN_FOLDER_FORMAT}, which this version reads; prepare the data again"
        )
    expected = {f"{name}{end}" for name in SPLITS for end in (".bin", ".offsets.npy", ".bytes.npy")}
    types = {"dtype": str, "vocab_size": int, "files": dict}
    missing = [key for key, kind in types.items() if not isinstance(manifest.get(key), kind)] or (
        expected - set(manifest["files"])
    )
    if missing or manifest["dtype"] not in ("<u2", "<u4"):
        raise DataError(f"{file} is incomplete ({', '.join(sorted(missing)) or 'dtype'}); prepare the data again")
    return manifest


def _folder_key(split: CorpusSplit, tokenizer: Tokenizer) -> str:
    sides = [[document.hash for document in side] for side in (split.train, split.val)]
    return hashlib.sha256(json.dumps([TOKEN_FOLDER_FORMAT, tokenizer.hash, sides]).encode()).hexdigest()[:32]


def map_numbers(file: Path, dtype: str) -> np.ndarray:
    """The numbers of a file, mapped; read where the file system maps nothing."""
    try:
        return np.memmap(file, dtype=dtype, mode="r")
    except OSError:
        return np.fromfile(file, dtype=dtype)
