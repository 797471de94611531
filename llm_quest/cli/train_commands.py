"""Commands about runs: train, plan, inspect batches, settings and data, write reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_quest.cli.options import (
    DeviceOption,
    JsonOption,
    OfflineOption,
    Overrides,
    QuietOption,
    SeedOption,
    ThreadsOption,
)
from llm_quest.cli.output import (
    print_colored_result,
    print_json,
    print_lines,
    print_result,
    show_progress,
    status_printer,
)
from llm_quest.errors import UsageError
from llm_quest.machine.hardware import set_environment


def quickstart(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
) -> None:
    """Run the whole workflow once, offline: tokenizer, pretraining, resume, SFT, DPO, a conversation, GRPO, export,
    reports. Three to nine minutes on two cores."""
    set_environment(threads)
    with show_progress(quiet):
        from llm_quest.cli.quickstart import run_quickstart

        result = run_quickstart(out, seed=seed, device=device, log=status_printer(quiet))
    print_result(result, json)
    raise typer.Exit(result.exit_code)


class RecipeCommand(typer.core.TyperCommand):
    """A command about a recipe, whose help with a recipe's name is about that recipe: `quest train sft --help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = [arg for arg in args if not arg.startswith("-")]
        if names and {"-h", "--help"} & set(args):
            from llm_quest.recipes.settings_reference import make_page

            print_lines([*self.get_help(ctx).splitlines(), "", *make_page(names[0]).lines()])
            ctx.exit()
        return super().parse_args(ctx, args)


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN", help="A name, a YAML file, a run folder.")],
    pairs: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one in runs/).")] = None,
    resume: Annotated[
        str, typer.Option(help="auto (if there is a checkpoint), never, or a run, or its checkpoint (RUN@good).")
    ] = "auto",
    accept: Annotated[
        str, typer.Option(help="What may have changed since the checkpoint, by comma: settings, model.load.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings and print them; do not train.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Short for device=...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Short for precision=...: auto, float32, bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Short for seed=...")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="Short for threads=...")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    offline: OfflineOption = False,
) -> None:
    """Train with a recipe. Run the same command again to resume after an interruption. `quest train RECIPE --help`
    lists the recipe's settings."""
    set_environment(threads or 0, offline)
    short = {"device": device, "precision": dtype, "seed": seed, "threads": threads}
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    with show_progress(quiet):  # importing torch takes seconds too
        from llm_quest.cli.train import start_training

        outcome = start_training(
            recipe,
            [*(pairs or []), *given],
            out=out,
            resume=resume,
            accept=[name.strip() for name in accept.split(",") if name.strip()],
            dry_run=dry_run,
            quiet=quiet,
            log=status_printer(quiet),
        )
    if os.environ.get("RANK", "0") == "0":
        print_result(outcome, json)
    raise typer.Exit(outcome.exit_code)


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN")],
    pairs: Overrides = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time three real steps.")] = True,
    ladder: Annotated[Path | None, typer.Option(help="A ladder's result.json: predict the loss too.")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Estimate the cost of a run: parameters, FLOPs, memory by kind, checkpoints, time."""
    set_environment(threads, offline)
    with show_progress(quiet):
        from llm_quest.cli.train import estimate_cost

        cost = estimate_cost(recipe, pairs or [], measure=measure, log=status_printer(quiet), ladder=ladder)
    print_result(cost, json)


def settings(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; without it: their names.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write a page for each recipe into this folder.")] = None,
    json: JsonOption = False,
) -> None:
    """List the settings of a recipe: what each takes, its default, what it is for."""
    set_environment(0)
    from llm_quest.recipes import settings_reference as reference

    if write is not None:
        print_result(reference.write_pages(write), json)
    else:
        print_result(reference.list_pages() if recipe is None else reference.make_page(recipe), json)


def techniques(
    words: Annotated[list[str] | None, typer.Argument(help="Only those that hold all of these: lora.")] = None,
    json: JsonOption = False,
) -> None:
    """List the techniques, or search them, each with its options and the words that switch it on."""
    set_environment(0)
    from llm_quest.cli.techniques import list_techniques

    print_result(list_techniques(words or ()), json)


def inspect_batch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN")],
    pairs: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="The optimizer step, counted from 0.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="The number of rows to show.")] = 4,
    json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Show the batch of a step token by token: targets (in green), positions, documents."""
    set_environment(threads, offline)
    from llm_quest.cli.inspect_batch import load_batch_view

    shown = load_batch_view(recipe, pairs or [], step=step, rows=rows, log=status_printer(quiet))
    print_colored_result(shown, json)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    out: Annotated[Path | None, typer.Option(help="The output file (default: report.html in the first run).")] = None,
    json: JsonOption = False,
) -> None:
    """Write an HTML report: curves, samples, data, cost, environment."""
    from llm_quest.report.page import write_report

    file = write_report(runs, out=out)
    print_json({"report": str(file)}) if json else print_lines([str(file)])


def data(
    source: Annotated[
        str | None,
        typer.Argument(help="builtin[:parts], a file, a folder, hf:DATASET, FILE.py:FUNCTION; without it: a list."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Read it as this recipe does: sft, dpo, ... rows, vit images.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="MAPPING", help="With --recipe, its data.columns: '{prompt: question, completion: reply}'."
        ),
    ] = None,
    forms: Annotated[bool, typer.Option("--forms", help="List the forms of rows that each recipe reads.")] = False,
    column: Annotated[str, typer.Option(help="The key of the text in a JSONL line.")] = "text",
    separator: Annotated[str | None, typer.Option(help="The separator between documents in a text file.")] = None,
    json: JsonOption = False,
) -> None:
    """Summarize a data source: documents, bytes, and what was dropped and why."""
    from llm_quest.cli.data import RowFormList, list_builtin_corpora, load_source, parse_columns, summarize_rows

    if columns is not None and (recipe is None or source is None):
        raise UsageError("--columns has no effect without SOURCE and --recipe: give both, or leave it out")
    if forms:
        print_result(RowFormList(), json)
    elif source is None:
        print_result(list_builtin_corpora(), json)
    elif recipe is not None:
        print_result(summarize_rows(source, recipe, parse_columns(columns)), json)
    else:
        print_result(load_source(source, column=column, separator=separator), json)


def doctor(
    renew: Annotated[bool, typer.Option("--renew", help="Measure the machine's profile anew.")] = False,
    json: JsonOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Describe this machine: python, torch, cores, memory, devices, measured rates and what `auto` makes of them, with
    warnings."""
    set_environment(threads)
    from llm_quest.cli.doctor import diagnose_machine

    print_result(diagnose_machine(renew=renew, log=status_printer(json)), json)
