"""Loads the tokenizer and the image processor beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quest.errors import DataError, UsageError
from llm_quest.hub.adapter_config import adapter_base
from llm_quest.hub.config import read_json
from llm_quest.hub.locate import ModelLocation, locate_model

if TYPE_CHECKING:
    from llm_quest.data.images import ImageProcessor
    from llm_quest.data.tokenizer import Tokenizer


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a published folder, a run, a GGUF file, or a hub id. DataError if there is none."""
    from llm_quest.data.tokenizer import Tokenizer
    from llm_quest.data.tokenizer_files import has_tokenizer, other_format_hint

    base = adapter_base(name_or_path)
    if base is not None and not (Path(name_or_path).expanduser() / "tokenizer.json").exists():
        return load_tokenizer(base)
    location = (
        ModelLocation(Path(name_or_path), str(name_or_path))
        if base is not None
        else locate_model(name_or_path, revision=revision)
    )
    if location.gguf_file is not None:
        from llm_quest.hub.gguf_load import open_model_file
        from llm_quest.hub.gguf_read_tokenizer import read_tokenizer

        return read_tokenizer(open_model_file(location.gguf_file))
    folders = (
        [location.folder]
        if location.run_dir is None
        else [location.run_dir, location.run_dir / "tokenizer", location.folder]
    )
    for home in folders:
        if has_tokenizer(home):
            return Tokenizer.load(home)
    raise DataError(
        f"{name_or_path} has no tokenizer (no tokenizer.json, no vocab.json with merges.txt, no tokenizer.model, no "
        "spiece.model)"
        f"{other_format_hint(location.folder)}"
    )


def load_preprocess(name_or_path: str | Path, *, revision: str | None = None) -> ImageProcessor:
    """Load the image processor of a published folder, a run, or a hub id: `image_processor` of processor_config.json
    (transformers 5), otherwise preprocessor_config.json. DataError if there is none, or an unsupported one."""
    processor = find_preprocess(name_or_path, revision=revision)
    if processor is None:
        raise DataError(
            f"{name_or_path} has no preprocessor_config.json (nor an image_processor in processor_config.json), which "
            "says how its images are made"
        )
    return processor


def find_preprocess(name_or_path: str | Path, *, revision: str | None = None) -> ImageProcessor | None:
    """Load the image processor of a folder, as `load_preprocess`; None if it has none."""
    from llm_quest.data.preprocessor_config import parse_preprocessor_config

    location = locate_model(name_or_path, revision=revision)
    if location.gguf_file is not None:
        return None
    for home in [location.folder] if location.run_dir is None else [location.run_dir, location.folder]:
        both, alone = (
            read_json_if_there(home / f"{name}.json") for name in ("processor_config", "preprocessor_config")
        )
        published = both.get("image_processor") or alone
        if published:
            model_type = read_json_if_there(home / "config.json").get("model_type")
            try:
                return parse_preprocessor_config(published, model_type)
            except DataError as error:
                raise DataError(f"{name_or_path}: {error}") from None
    return None


def read_json_if_there(file: Path) -> dict[str, Any]:
    """The object of a JSON file; empty without the file."""
    return read_json(file) if file.exists() else {}


def check_vocabulary(tokenizer: Tokenizer | None, rows: int) -> None:
    """UsageError for a tokenizer of another model. An added token may be without a row, as Gemma 3's image token is."""
    if tokenizer is not None and tokenizer.base_vocab_size > rows:
        largest = tokenizer.base_vocab_size - 1
        raise UsageError(
            f"the tokenizer has ids up to {largest}, the embedding only {rows} rows: they are not of one model"
        )
