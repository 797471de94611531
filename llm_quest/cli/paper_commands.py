"""Commands for readers: the book, and the claims of papers, listed and measured again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from llm_quest.cli.options import JsonOption, QuietOption
from llm_quest.cli.output import print_lines, print_result, show_progress, status_printer
from llm_quest.machine.hardware import set_environment


def book(
    folder: Annotated[Path, typer.Argument(help="The folder of the site.")] = Path("site"),
    renew: Annotated[bool, typer.Option("--renew", help="Build it again.")] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in the browser.")] = True,
    quiet: QuietOption = False,
) -> None:
    """Open the book, a site that needs no network: chapters from tokens to reinforcement learning, and a page for every
    family, layer, technique, objective and paper. The first time it is built, which takes minutes."""
    set_environment(1, offline=True)
    from llm_quest.cli.book import open_book

    print_lines([open_book(folder, renew=renew, browser=browser, log=status_printer(quiet))])


def learn(
    action: Annotated[
        str | None, typer.Argument(metavar="[NAME|check|break]", help="An exercise to begin, or what to do.")
    ] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="With check, break: which one.")] = None,
    folder: Annotated[Path, typer.Option(help="Your folder.")] = Path("learn"),
) -> None:
    """Exercises that check themselves, and games of finding a wrong line. Without a name: the list. `quest learn
    attention` begins an exercise, `quest learn check attention` judges it, `quest learn break next` begins a game."""
    set_environment(1, offline=True)
    from llm_quest.cli.book import run_lesson

    right, lines = run_lesson(action, name, folder, log=status_printer(False))
    print_lines(lines)
    raise typer.Exit(0 if right else 3)


def papers(json: JsonOption = False) -> None:
    """List the papers whose claims are tested here, with their verdicts."""
    set_environment(0)
    from llm_quest.cli.papers import list_papers

    print_result(list_papers(), json)


def reproduce(
    paper: Annotated[str, typer.Argument(help="A name from `quest papers`.")],
    seeds: Annotated[int, typer.Option(min=1, max=10, help="The number of seeds.")] = 3,
    jobs: Annotated[int, typer.Option(min=0, help="Measurements in parallel; 0: one per core.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the card (default: docs/papers of the project, or the cache).")
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the experiment of a paper and write its card. Finished measurements are kept, so an interrupted command
    continues."""
    from llm_quest.cli.papers import reproduce_paper
    from llm_quest.machine.hardware import usable_cores

    os.environ["OMP_NUM_THREADS"] = "1"
    with show_progress(quiet):
        card = reproduce_paper(paper, seeds=seeds, out=out, jobs=jobs or usable_cores(), log=status_printer(quiet))
    print_result(card, json)
