"""Commands for readers: the book, and the claims of papers, listed and measured again."""

from __future__ import annotations

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
    size: Annotated[str, typer.Option(help="0.3M, 1M, 4M, or several by comma; default: the smallest.")] = "",
    minutes: Annotated[float, typer.Option(min=0, help="Begin no run later; the same command goes on.")] = 60,
    first_seed: Annotated[
        int, typer.Option(min=1, help="The first of the reported seeds; 401 for a confirmation.")
    ] = 1,
    jobs: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: one per core.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The folder of the card (default: the cache).")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure the claim of a paper again: pairs of runs of an arm and a control with equal tuning, until a sequential
    test decides, and write its card. Finished runs are kept, so an interrupted command continues."""
    set_environment(1)
    from llm_quest.cli.papers import reproduce_paper
    from llm_quest.machine.hardware import usable_cores

    sizes = [part.strip() for part in size.split(",") if part.strip()]
    with show_progress(quiet):
        card = reproduce_paper(
            paper, sizes=sizes, out=out, jobs=jobs or usable_cores(), minutes=minutes, first_seed=first_seed,
            log=status_printer(quiet),
        )  # fmt: skip
    print_result(card, json)
