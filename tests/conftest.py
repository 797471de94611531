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
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"  # two workers with two threads each on two cores wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from _pytest.runner import runtestprotocol

if TYPE_CHECKING:
    import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.fsync = lambda descriptor: None  # of thousands of checkpoints: no test takes the power away
sys.dont_write_bytecode = False  # or this process, and every one that a test starts, compiles all files anew
CHECKED = ("layers", "models", "generation", "objectives", "techniques", "hub")
FEW_ROWS: dict[Any, Any] = {}
"""The package's own choice of the form of products."""


def pytest_configure(config: pytest.Config) -> None:
    """A process that only starts workers and counts what they tell needs no torch, whose import takes seconds."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        prepare_process()


def prepare_process() -> None:
    """Everything that holds for all tests of a process, before the first of them is imported."""
    from tests.machine import use_kept_profile
    from tests.rendered import render_once
    from tests.shapes import check_imports

    gc.disable()  # until the tests are collected: what they import stays
    check_imports([f"llm_quest.{package}" for package in CHECKED])
    import torch
    import typer.main
    from hypothesis import HealthCheck, settings

    from llm_quest.layers import linear

    torch.set_num_threads(1)
    FEW_ROWS.update(linear.FEW_ROWS)
    use_kept_profile()
    settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")
    render_once()
    # Four fifths of a command's time in this process would go into building the tree of all commands again.
    typer.main.get_command = functools.cache(typer.main.get_command)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """A worker tells each test by one message; of six, four say that it began, was set up, was torn down and ended."""
    option = item.config.option
    if not hasattr(item.config, "workerinput") or option.xmlpath or option.durations is not None:
        return None
    for report in runtestprotocol(item, log=False, nextitem=nextitem):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    """pytest collects garbage five times at the end of a process, over the objects of all tests: that takes seconds."""
    gc.freeze()


LONG = ("test_experiment.py", "test_compiled.py", "test_option_grid.py", "test_engine_grid.py", "test_one_law.py")
"""Files whose single tests take tens of seconds: first, so that no worker ends with one while the others have none."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    gc.freeze()  # a later collection need not walk through every imported library again
    gc.set_threshold(5_000, 10, 40)  # nor through every model that laws share after each few thousand objects
    gc.enable()


@pytest.fixture(autouse=True)
def process_settings() -> None:
    """The form of products with few rows, layers in C++ and the number of threads are set for the whole process; every
    test begins with the package's own forms and with one thread. (A fixture of a whole module that trains sets them
    before the test begins.)"""
    import torch

    from llm_quest.layers import linear, training_kernels

    torch.set_num_threads(1)
    linear.KERNEL_ROWS.clear()
    linear.FEW_ROWS.clear()
    linear.FEW_ROWS.update(FEW_ROWS)
    training_kernels.TrainingKernels.enabled = False


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
    import torch

    return torch.Generator().manual_seed(0)
