"""Loads GSM8K from a local file of JSON lines, or from `openai/gsm8k` on the hub, whose files are parquet.

The hub's test file is for testing; `train` and `validation` are two parts of its training file, by the questions'
hashes."""

from __future__ import annotations

from pathlib import Path

from llm_quest.data.problems.gsm8k import read_gsm8k, split_gsm8k_validation
from llm_quest.data.problems.problem import Problem
from llm_quest.errors import DataError, MissingError
from llm_quest.hub.downloads import fetch_snapshot
from llm_quest.hub.locate import describe_download_failure, unreachable_reason

NAME = "openai/gsm8k"
FILES = {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"}


def is_gsm8k(task: str) -> bool:
    """Whether a task's name means GSM8K: a local file, or the hub's."""
    return task == "gsm8k" or task.endswith(".jsonl")


def load_gsm8k(task: str, part: str) -> list[Problem]:
    """Load the problems of GSM8K. part: train, validation or test. The test part of a file is all of it."""
    if part == "test":
        return gsm8k_from_hub(part) if task == "gsm8k" else read_gsm8k(task)
    train, held_out = train_validation_split(task)
    return train if part == "train" else held_out


def train_validation_split(task: str) -> tuple[list[Problem], list[Problem]]:
    """The rows for training, and those held out for validation."""
    train, validation = split_gsm8k_validation(gsm8k_from_hub("train") if task == "gsm8k" else read_gsm8k(task))
    if not train or not validation:
        raise DataError(f"{task} holds too few problems to keep some of them out of training")
    return train, validation


def gsm8k_from_hub(part: str) -> list[Problem]:
    """A published file, from the local cache or downloaded (HF_HOME and HF_HUB_OFFLINE are honored)."""
    return read_gsm8k(download_dataset_file(FILES[part]))


def download_dataset_file(file: str) -> Path:
    try:
        fetched = fetch_snapshot(NAME, repo_type="dataset", allow_patterns=[file]) / file
        fetched.stat()  # of a commit that is there in part, without a network
        return fetched
    except Exception as error:  # also what the packages below raise
        reason = unreachable_reason(describe_download_failure(error))
        raise MissingError(
            f"{NAME} lacks {file} in the local cache while {reason}: run `hf download --repo-type dataset {NAME}` "
            "where there is a network, or give a file of JSON lines (task=FILE.jsonl)"
        ) from None
