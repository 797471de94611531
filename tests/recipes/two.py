"""A run by two processes, each forked from one that has torch and has not used it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forked import processes
from tests.rendered import RENDERED, render_once


def by_two(base: str, pairs: Sequence[str], out: Path) -> None:
    """A pretraining, of a base in YAML. Both must end well."""
    together(child, base, list(pairs), str(out))


def recipe_by_two(recipe: str, pairs: Sequence[str], out: Path) -> None:
    """Any recipe, by its name. Both must end well."""
    together(recipe_child, recipe, list(pairs), str(out))


def together(target: Callable[..., None], *args: Any) -> None:
    """`target(*args)` in two processes that know of each other. Both must end well."""
    assert both_exit_codes(target, *args) == [0, 0]


def both_exit_codes(target: Callable[..., None], *args: Any) -> list[int | None]:
    """The same; the exit codes of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [processes.Process(target=join_and_call, args=(rank, port, RENDERED, target, *args)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=500)
    return [process.exitcode for process in both]


def start_agent(pids: Path, target: Callable[..., None], *args: Any) -> BaseProcess:
    """The agent that `torchrun --nproc-per-node 2` starts, with two workers that call `target(*args)`: each is forked
    from a process that has torch, and nothing of one is open in another. pids: a folder for files of a worker's rank
    and process id."""
    pids.mkdir(exist_ok=True)
    agent = processes.Process(target=agent_main, args=(str(pids), target, *args))
    agent.start()
    return agent


def agent_main(*args: Any) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    try:
        elastic_launch(LaunchConfig(1, 1, 2, start_method="forkserver", max_restarts=0, **where), worker_main)(*args)
    except ChildFailedError:
        sys.exit(1)


def worker_main(pids: str, target: Callable[..., None], *args: Any) -> None:
    import torch

    (Path(pids) / os.environ["RANK"]).write_text(str(os.getpid()))
    torch.set_num_threads(1)
    target(*args)


def join_and_call(rank: int, port: int, rendered: dict[str, Any], target: Callable[..., None], *args: Any) -> None:
    """rendered: the conversations that the tests' process has rendered, which are not rendered again."""
    RENDERED.update(rendered)
    join(rank, port)
    target(*args)


def child(base: str, pairs: list[str], out: str) -> None:
    from llm_quest.recipes.config import parse_config
    from llm_quest.recipes.engine import run_recipe
    from llm_quest.recipes.pretrain import PretrainConfig
    from llm_quest.recipes.recipe import get_recipe
    from llm_quest.recipes.yaml_io import apply_overrides, read_yaml

    settings = apply_overrides(read_yaml(base, "base.yaml"), pairs)
    sys.exit(
        run_recipe(
            get_recipe("pretrain"), parse_config(PretrainConfig, settings), settings, Path(out), quiet=True
        ).exit_code
    )


def recipe_child(recipe: str, pairs: list[str], out: str) -> None:
    from llm_quest.recipes.engine import run_recipe
    from llm_quest.recipes.recipe import load_recipe

    found, config, settings = load_recipe(recipe, pairs)
    sys.exit(run_recipe(found, config, settings, Path(out), quiet=True).exit_code)


def join(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    render_once()
