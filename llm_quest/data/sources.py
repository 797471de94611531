"""Sources of rows: what `data.source` names.

    rows.jsonl, folder/     a file of rows (`data/row_files.py`), or a folder of such files; of those that are named
                            after splits, `train` (`data/folders.py`)
    hf:org/name             a data set of the Hugging Face hub; hf:FOLDER: one that `datasets` loads or saved
    my_data.py:rows         a function in a Python file that returns rows, each a dictionary
    builtin                 what comes with Python

Several sources have weights: 2 shows each row twice in an epoch, 0.5 half of the rows."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llm_quest.data.document import DropReport
from llm_quest.data.records import Record, find_text_error, iter_records, map_columns
from llm_quest.data.row_files import without_nulls
from llm_quest.errors import DataError, RowError, UsageError, import_extra, install_command
from llm_quest.files import absolute_path

HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class DataSource:
    """A source of rows. path: see above. weight: how often each row is seen in an epoch. name, split: of a data set of
    the hub, as `datasets.load_dataset` has them; split: of a folder too, whose file names say it."""

    path: str
    weight: float = 1.0
    name: str | None = None
    split: str | None = None


Builtin = Callable[[], Iterable[Record]]


def iter_source(source: DataSource, drop_report: DropReport, builtin: Builtin | None = None) -> Iterator[Record]:
    """The rows of one source; the report counts what is skipped. UsageError for a name or a split that it cannot
    have."""
    check_parts(source)
    if source.path == "builtin" and builtin is not None:
        rows = iter(builtin())
    elif source.path.partition(":")[0] == "builtin":
        raise UsageError(f"data.source {source.path}: for this recipe it is builtin alone, or a file")
    elif source.path.startswith(HUB_PREFIX) or is_saved_dataset(source.path):
        rows = checked(iter_hub_rows(source), drop_report)
    elif split_function(source.path) is not None:
        rows = checked(iter_function_rows(source.path), drop_report)
    else:
        rows = iter_records(source.path, drop_report, source.split)
    return (record._replace(weight=source.weight) for record in rows)


def check_parts(source: DataSource) -> None:
    """UsageError for a name or a split of a source that has no such parts."""
    is_hub, is_folder = source.path.startswith(HUB_PREFIX), Path(source.path).is_dir()
    for key, value, has in (("name", source.name, is_hub), ("split", source.split, is_hub or is_folder)):
        if value is not None and not has:
            of = "a data set of the hub (hf:NAME)" + (" or a folder" if key == "split" else "")
            raise UsageError(f"data.source {source.path}: {key} {value!r} belongs to {of}; leave it out")


def iter_sources(
    sources: Sequence[DataSource],
    drop_report: DropReport,
    *,
    builtin: Builtin | None = None,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Record]:
    """The rows of all sources, one after another. columns: see `map_columns`."""
    records = chain.from_iterable(iter_source(source, drop_report, builtin) for source in sources)
    return map_columns(records, columns or {}, drop_report)


T = TypeVar("T")


def load_rows(
    sources: Sequence[DataSource],
    read: Callable[[Iterable[Record], DropReport], list[T]],
    drop_report: DropReport,
    *,
    builtin: Builtin | None = None,
    columns: Mapping[str, str] | None = None,
    strict: bool = False,
    limit: int | None = None,
) -> list[T]:
    """What `read` makes of the rows of all sources. columns: see `map_columns`. strict: DataError with all rows that
    cannot be used, in place of leaving them out. limit: of rows. DataError where none is left, with the reasons."""
    records = iter_sources(sources, drop_report, builtin=builtin, columns=columns)
    rows = read(islice(records, limit), drop_report)
    name = ", ".join(source.path for source in sources)
    drop_report.require_rows(len(rows), name, strict=strict)
    if not rows:
        reasons = "; ".join(f"{count:,} x {reason}" for reason, (count, _) in drop_report.dropped.items())
        raise DataError(f"{name}: no row is left to learn from ({reasons or 'it holds no rows'})")
    return rows


def checked(rows: Iterable[tuple[Any, str]], drop_report: DropReport) -> Iterator[Record]:
    """Rows that are objects of text; the report counts others."""
    for given, where in rows:
        row = plain_value(given)
        if not isinstance(row, dict):
            drop_report.skip(RowError(where, "not an object", f"is a {type(given).__name__}, expected a dictionary"))
        elif error := find_text_error(row, where):
            drop_report.skip(error)
        else:
            yield Record(row, where)


def plain_value(value: Any) -> Any:
    """A value of a row with numbers and lists in place of numpy's, but for what may be an image (two dimensions)."""
    if isinstance(value, Mapping):
        return {key: plain_value(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(one) for one in value]
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim < 2):
        return plain_value(value.tolist())
    return value


def is_saved_dataset(path: str) -> bool:
    """Whether a folder is what `save_to_disk` of the package `datasets` wrote."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def iter_hub_rows(source: DataSource) -> Iterator[tuple[Any, str]]:
    """The rows of a data set that the package `datasets` loads."""
    datasets = import_extra("datasets", f"{source.path} needs it: {install_command('datasets')}")
    path = source.path.removeprefix(HUB_PREFIX)
    try:
        loaded = datasets.load_from_disk(path) if is_saved_dataset(path) else datasets.load_dataset(path, source.name)
    except Exception as error:  # each of its builders has errors of its own
        cause = error.__cause__ or error  # of a table that it cannot build, the cause names the columns
        reason = " ".join(str(cause).split())[:300]
        raise DataError(f"{source.path} cannot be loaded: {type(cause).__name__}: {reason}") from None
    table = choose_split(loaded, source) if isinstance(loaded, Mapping) else loaded
    yield from ((without_nulls(row), f"{source.path}:{number}") for number, row in enumerate(table, start=1))


def choose_split(loaded: Mapping[str, Any], source: DataSource) -> Any:
    """The split that is named, otherwise `train` or the only one."""
    split = source.split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else "train")
    if split not in loaded:
        raise UsageError(
            f"{source.path} has no split {split!r}; it has {', '.join(map(str, loaded))}: "
            f"data.source='[{{path: {source.path}, split: {next(iter(loaded), 'train')}}}]'"
        )
    return loaded[split]


def split_function(path: str) -> tuple[Path, str] | None:
    """(file, function) of `my_data.py:rows`; None for anything else."""
    file, colon, function = path.rpartition(":")
    return (Path(file), function) if colon and file.endswith(".py") else None


def iter_function_rows(path: str) -> Iterator[tuple[Any, str]]:
    """The rows that a function of the user returns or yields. DataError with the line at which it failed."""
    file, name = split_function(path) or (Path(path), "")
    if not file.is_file():
        raise DataError(f"{file} does not exist; data.source={path} names a function in it")
    try:
        function = load_function(file, name)
        yield from ((row, f"{path}:{number}") for number, row in enumerate(function(), start=1))
    except (DataError, UsageError):
        raise
    except (Exception, SystemExit) as error:
        lines = [one.lineno for one in traceback.extract_tb(error.__traceback__) if one.filename == str(file)]
        line = f":{lines[-1]}" if lines else ""
        raise DataError(f"{file}{line}: {name} failed with {type(error).__name__}: {error}") from error


def load_function(file: Path, name: str) -> Callable[[], Iterable[Any]]:
    """A function of a Python file, which is run. UsageError with the functions that it has."""
    spec = importlib.util.spec_from_file_location(f"llm_quest_data_{file.stem}", file)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = vars(module).get(name)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UsageError(f"{file} has no function {name!r}; it has {', '.join(own) or 'none'}")
    return function  # type: ignore[no-any-return]


def absolute_source(path: str) -> str:
    """The same source under a name that holds from every working directory."""
    if path.startswith(HUB_PREFIX):
        return HUB_PREFIX + absolute_path(path.removeprefix(HUB_PREFIX))
    if (function := split_function(path)) is not None:
        return f"{absolute_path(str(function[0]))}:{function[1]}"
    return absolute_path(path)
