"""For every test: no network, one thread per worker, and shape annotations that are checked.

The hook rewrites the annotated functions of these packages while they are imported, so it has to be installed before
any of them is; ordinary runs do not pay. Laws about `torch.compile` run in a process of their own, without it.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch
import typer.main
from hypothesis import HealthCheck, settings

from tests.shapes import check_imports

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.fsync = lambda descriptor: None  # of thousands of checkpoints: no test takes the power away
sys.dont_write_bytecode = False  # or this process, and every one that a test starts, compiles all files anew
gc.disable()  # until the tests are collected: what they import stays

CHECKED = ("layers", "models", "generation", "objectives", "techniques", "hub")
check_imports([f"llm_quest.{package}" for package in CHECKED])

from llm_quest.data import template_sandbox  # noqa: E402
from llm_quest.layers import linear  # noqa: E402
from tests.machine import use_kept_profile  # noqa: E402

torch.set_num_threads(1)
FEW_ROWS = dict(linear.FEW_ROWS)
use_kept_profile()
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

RENDERED: dict[str, Any] = {}
"""What templates made of conversations in this process."""


def render_once() -> None:
    """A chat template is rendered in a process of its own, a fifth of a second each time: here the same conversations
    are rendered once by the same template under the same limits. (An error is never kept.)"""
    render = template_sandbox.run_batch

    def run_once(settings: Any, jobs: Any) -> Any:
        key = f"{template_sandbox.WORKER_COMMAND} {template_sandbox.CPU_SECONDS} {settings} {jobs}"
        if key not in RENDERED:
            RENDERED[key] = render(settings, jobs)
        return RENDERED[key]

    template_sandbox.run_batch = run_once


render_once()
typer.main.get_command = functools.cache(typer.main.get_command)
"""Four fifths of a command's time in this process would go into building the tree of all commands again."""


LONG = ("test_experiment.py", "test_compiled.py", "test_option_grid.py", "test_engine_grid.py", "test_one_law.py")
"""Files whose single tests take tens of seconds: first, so that no worker ends with one while the others have none."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    gc.freeze()  # a later collection need not walk through every imported library again
    gc.set_threshold(5_000, 10, 40)  # nor through every model that laws share after each few thousand objects
    gc.enable()


@pytest.fixture(autouse=True)
def few_row_products() -> None:
    """The form of products with few rows is set for the whole process; every test begins with the package's own. (A
    fixture of a whole module that trains sets it before the test begins.)"""
    linear.KERNEL_ROWS.clear()
    linear.FEW_ROWS.clear()
    linear.FEW_ROWS.update(FEW_ROWS)


class LogCapture(logging.Handler):
    """What was logged, as `text`."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{self.format(record)}\n"


@pytest.fixture
def caplog() -> Iterator[LogCapture]:
    """Warnings that reach the root logger. pytest's own plugin (switched off in pyproject.toml) puts a handler on each
    of PyTorch's forty loggers three times a test, a quarter of a millisecond for each of 19,000 tests."""
    logging.getLogger().addHandler(handler := LogCapture())
    yield handler
    logging.getLogger().removeHandler(handler)


@pytest.fixture
def generator() -> torch.Generator:
    """The randomness of a test, the same every time."""
    return torch.Generator().manual_seed(0)
