"""The `quest` command and the table of its subcommands. A subcommand imports its implementation when it runs, so that
`quest --help` does not import torch."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from llm_quest.cli import (
    experiment_commands,
    generate_commands,
    model_commands,
    paper_commands,
    serve_commands,
    train_commands,
)
from llm_quest.cli.output import (
    explain_failure,
    failure_json,
    open_streams,
    print_json,
    print_status,
    run_with_exit_code,
    show_warnings,
)
from llm_quest.train.signals import end_on_signals

ClickUsageError: Any = typer.BadParameter.__base__
"""click's UsageError, of the copy of click that typer brings."""


class RootCommand(typer.core.TyperGroup):
    """The group of all commands. With `--json` a mistake that click finds (an unknown option, a value of another type)
    is JSON on stdout too, as every other failure is."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ClickUsageError as error:
            if "--json" in sys.argv:
                print_json(failure_json(type(error).__name__, error.format_message(), error.exit_code))
            raise
        except KeyboardInterrupt as stop:  # of which click makes its own exit code, without a word
            code, lines = explain_failure(stop)
            for line in lines:
                print_status(line)
            raise typer.Exit(code) from None


app = typer.Typer(
    name="quest",
    cls=RootCommand,
    help="Modern LLMs from scratch: train, generate, evaluate, inspect.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokens_app = typer.Typer(help="Change a model's tokens.", no_args_is_help=True, rich_markup_mode=None)
ledger_app = typer.Typer(help="The ledger of experiments.", no_args_is_help=True, rich_markup_mode=None)

COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": train_commands.quickstart,
    "train": train_commands.train,
    "generate": generate_commands.generate,
    "chat": generate_commands.chat,
    "serve": serve_commands.serve,
    "classify": generate_commands.classify,
    "score": generate_commands.score,
    "eval": generate_commands.evaluate,
    "models": model_commands.models,
    "settings": train_commands.settings,
    "techniques": train_commands.techniques,
    "show": model_commands.show_model,
    "diff": model_commands.diff,
    "plan": train_commands.plan,
    "inspect": model_commands.inspect,
    "inspect-batch": train_commands.inspect_batch,
    "verify": model_commands.verify,
    "export": model_commands.export,
    "push": model_commands.push,
    "consolidate": model_commands.consolidate,
    "ablate": experiment_commands.ablate,
    "ladder": experiment_commands.ladder,
    "race": experiment_commands.race,
    "report": train_commands.report,
    "book": paper_commands.book,
    "learn": paper_commands.learn,
    "papers": paper_commands.papers,
    "reproduce": paper_commands.reproduce,
    "doctor": train_commands.doctor,
    "data": train_commands.data,
}
RECIPE_COMMANDS = ("train", "plan", "ablate", "ladder", "race")

for name, command in COMMANDS.items():
    app.command(name, cls=train_commands.RecipeCommand if name in RECIPE_COMMANDS else None)(command)
tokens_app.command("add")(model_commands.add_tokens)
app.add_typer(tokens_app, name="tokens")
ledger_app.command("list")(experiment_commands.list_ledger)
ledger_app.command("show")(experiment_commands.show_ledger)
ledger_app.command("merge")(experiment_commands.merge_ledger)
ledger_app.command("export")(experiment_commands.export_ledger)
app.add_typer(ledger_app, name="ledger")


def main() -> None:
    """The entry point: runs a command and ends the process with its exit code."""
    open_streams()
    show_warnings()
    arguments = sorted(sys.argv[1:], key=lambda one: one != "--allow-pickle")  # it may stand behind the command too
    with end_on_signals():
        code = run_with_exit_code(lambda: app(arguments, standalone_mode=True, prog_name="quest"))
    end_process(code)


INTERRUPTED = (130, 143)


def end_process(code: int) -> None:
    """End the process. The interpreter's own end takes a second of CPU with torch, two thirds of it in collecting
    garbage among the objects of all modules, which are left out. After a signal, where a machine under load stretches
    the rest to seconds, only the threads and the registered functions of the end are waited for."""
    if code in INTERRUPTED:
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.current_thread():
                thread.join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    gc.freeze()
    sys.exit(code)


def print_version(wanted: bool) -> None:
    if wanted:
        from llm_quest import __version__

        print(f"llm-quest {__version__}")
        raise typer.Exit


@app.callback()
def root_options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read pickled weights (pytorch_model.bin), tensors alone; off by default."),
    ] = False,
) -> None:
    """Modern LLMs from scratch: train, generate, evaluate, inspect. Exit codes: 0 done, 1 a bug in LLM Quest, 2 usage,
    3 data or model files, 4 a training guard, 5 memory or disk, 6 a missing package, network or device, 7 run folder
    busy, 130/143 interrupted and saved."""
    if allow_pickle:
        os.environ["LLM_QUEST_ALLOW_PICKLE"] = "1"
