"""Uploads a model folder to a repository of the hub, in one commit (`quest push FOLDER OWNER/NAME`).

The token is that of `hf auth login` or of HF_TOKEN. It is no option, because options are visible in the list of
processes."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.errors import DataError, MissingError, UsageError
from llm_quest.hub.adapter_config import CONFIG as ADAPTER_CONFIG
from llm_quest.hub.inspect import inspect_folder
from llm_quest.hub.load_save import SAVED_FILES
from llm_quest.hub.locate import describe_download_failure, is_hub_offline, unreachable_reason
from llm_quest.hub.model_card import PLACE
from llm_quest.hub.save_adapter import WEIGHTS as ADAPTER_WEIGHTS

CARD = "README.md"
REPOSITORY = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}")
OTHER_FILES = re.compile(
    rf"{re.escape(ADAPTER_CONFIG)}|{re.escape(ADAPTER_WEIGHTS)}|.*\.gguf|LICENSE(\.\w+)?|tokenizer\.model"
)
"""Files of a model's folder besides those that `save` writes."""


@dataclass(frozen=True)
class PushReport:
    """The result of an upload. left_out: files of the folder that belong to no model."""

    url: str
    files: dict[str, int]
    left_out: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        lines = [
            f"{self.url}: {len(self.files)} files",
            *(f"  {n:>14,} bytes  {name}" for name, n in self.files.items()),
        ]
        return lines + ([f"left out: {', '.join(self.left_out)}"] if self.left_out else [])


def push_folder(folder: Path, repository: str, *, private: bool = False) -> PushReport:
    """Upload a model folder: one commit to a repository, which is created if it does not exist.

    Raises UsageError for a name that is none, DataError for a folder that does not load or may not be written to,
    MissingError where the hub cannot be reached."""
    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"{repository!r} is no repository: give OWNER/NAME, such as me/my-model")
    if is_hub_offline():
        raise UsageError("HF_HUB_OFFLINE is set: unset it to push")
    files, left_out = files_to_push(folder)
    url = upload_files(files, repository, private=private)
    return PushReport(url, {file.name: file.stat().st_size for file in files}, tuple(left_out))


def files_to_push(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a model, and the names of all others. DataError where the model would not load from them."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one that quest export wrote")
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise DataError(f"{folder} is no model folder (it has no config.json): quest export RUN FOLDER writes one")
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if is_model_file(entry.name) and entry.is_file() and not entry.is_symlink()]
    if not (folder / ADAPTER_CONFIG).is_file() and (problems := inspect_folder(str(folder)).problems):
        raise DataError(f"{folder} does not load: {problems[0]}")
    return files, [entry.name for entry in entries if entry not in files]


def is_model_file(name: str) -> bool:
    return bool(SAVED_FILES.fullmatch(name) or OTHER_FILES.fullmatch(name))


def upload_files(files: list[Path], repository: str, *, private: bool) -> str:
    """Create the repository if needed and commit the files; return its URL. The card names the repository in place of
    the folder."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, errors

    operations = [CommitOperationAdd(file.name, file_content(file, repository)) for file in files]
    hub = huggingface_hub.HfApi()
    try:
        repo = hub.create_repo(repository, private=private, exist_ok=True)
        hub.create_commit(repository, operations, commit_message="Upload with quest push")
    except errors.LocalTokenNotFoundError:
        raise MissingError("you are not logged in: run `hf auth login`, or set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            why = "the hub does not accept the token" if status == 401 else "this token may not write there"
            raise DataError(
                f"{repository}: {why}: run `hf auth login` with one that may write, or set HF_TOKEN"
            ) from None
        raise MissingError(f"{repository}: the hub answered {status}; nothing is committed, try again") from None
    except Exception as error:  # what the packages below raise: httpx's errors, an answer that is no JSON
        if isinstance(cause := error.__cause__, errors.HfHubHTTPError):  # of a large file, which goes to a storage
            reason = f"the hub's storage answered {cause.response.status_code}"
            raise MissingError(f"{repository}: {reason}; nothing is committed, try again") from None
        why = unreachable_reason(describe_download_failure(error))
        raise MissingError(f"{repository}: {why}; the same command again sends what is missing") from None
    return str(repo)


def file_content(file: Path, repository: str) -> Path | bytes:
    """The content to upload for a file."""
    if file.name != CARD:
        return file
    return file.read_text(encoding="utf-8").replace(PLACE, repository).encode()
