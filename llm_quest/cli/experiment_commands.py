"""`quest ablate`, `quest ladder`, `quest race` and `quest ledger`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_quest.cli.options import JsonOption, OfflineOption, Overrides, QuietOption
from llm_quest.cli.output import print_result, show_progress, status_printer
from llm_quest.machine.hardware import set_environment

LedgerOption = Annotated[Path, typer.Option(help="The ledger.")]
LEDGER = Path("ablations/ledger.jsonl")


def ablate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="The recipe of the control.")] = "",
    pairs: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B", help="An arm for each value; may be repeated.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(metavar="NAME='KEY=VALUE ...'", help="An arm of several settings.")
    ] = None,
    code: Annotated[
        list[str] | None, typer.Option(metavar="PATCH|WORKTREE", help="An arm that runs an edit of this package.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="The metric of the verdict (eval/loss; policies: eval/accuracy); further ones are reported."),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="The smallest difference worth having (losses, shares: 0.03).")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="linear; log compares logarithms of the metric, and --delta is a ratio above 1.")
    ] = "linear",
    cap: Annotated[int, typer.Option(help="The largest number of pairs: 8, 12, 16, 20, 30.")] = 12,
    budget: Annotated[
        str, typer.Option(help="What arms spend alike: flops (policies: steps), steps, tokens, seconds, parameters.")
    ] = "",
    rates: Annotated[int, typer.Option(min=1, max=9, help="Learning rates that each arm is tuned over; 1: none.")] = 3,
    tuning_seeds: Annotated[int, typer.Option(min=1, max=9, help="Seeds of each learning rate that is tried.")] = 2,
    aa_pairs: Annotated[int, typer.Option(min=0, max=20, help="Pairs of the control with itself; 0: none.")] = 3,
    first_seed: Annotated[int, typer.Option(min=1, help="The first of the reported seeds; 401 for a repetition.")] = 1,
    question: Annotated[str, typer.Option(help="The question, for the ledger.")] = "",
    confirm: Annotated[
        str, typer.Option(metavar="EXPERIMENT", help="Ask its decided verdicts once more: test half, fresh seeds.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings, runs and cost; write nothing.")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: one per core.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of experiments, runs and the ledger.")] = Path("ablations"),
    for_agents: Annotated[bool, typer.Option("--for-agents", help="Print the protocol that an agent follows.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    offline: OfflineOption = False,
) -> None:
    """Compare arms of a recipe with a control: pairs of runs that share seed, data order and start weights, equal
    budgets and equal tuning, until a sequential test says better, worse, no difference, or undecided. The same command
    again goes on after an interruption."""
    set_environment(1, offline)
    with show_progress(quiet or for_agents):
        from llm_quest.cli import ablate as commands
        from llm_quest.machine.hardware import usable_cores

        if for_agents:
            print_result(commands.AgentProtocol(), json)
            return
        options = commands.AblateOptions(
            vary or (), arm or (), code or (), metric or (), delta, cap, budget, rates, tuning_seeds, aa_pairs,
            first_seed, question, jobs or usable_cores(), confirm, scale,
        )  # fmt: skip
        action = commands.preview_ablation if dry_run else commands.run_ablation
        result = action(recipe, pairs or [], options, out=out, log=status_printer(quiet))
    print_result(result, json)


def ladder(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="The recipe of the model to predict.")] = "",
    pairs: Overrides = None,
    rungs: Annotated[int, typer.Option(help="Smaller sizes, at least 4.")] = 5,
    smallest: Annotated[str, typer.Option(help="Parameters of the smallest, such as 50k; a 64th of the model's.")] = "",
    largest: Annotated[str, typer.Option(help="Parameters of the largest; a 4th of the model's.")] = "",
    tokens_per_parameter: Annotated[
        str, typer.Option(help="Tokens for each parameter; several (5,10,20) fit L(N, D). The recipe's own.")
    ] = "",
    tokens: Annotated[
        str, typer.Option(help="The same tokens for all sizes instead, such as 2M; several (1M,2M,4M) fit L(N, D).")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Runs of each size.")] = 2,
    rates: Annotated[int, typer.Option(min=1, max=9, help="Learning rates tried on each tuned size; 1: none.")] = 3,
    tuned_rungs: Annotated[
        int, typer.Option(min=1, max=2, help="Sizes whose rate is tuned: the smallest; and the middle one.")
    ] = 2,
    parametrization: Annotated[
        str, typer.Option(help="What carries the rate to larger sizes: standard, mup, completep.")
    ] = "completep",
    scale: Annotated[
        str, typer.Option(help="How rungs are smaller: width (fewer heads, equal layers), both (fewer layers too).")
    ] = "width",
    run: Annotated[int, typer.Option(min=0, max=20, help="Then train the model itself, with so many seeds.")] = 0,
    jobs: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: one per core.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of ladders, runs and the ledger.")] = Path("ladders"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    offline: OfflineOption = False,
) -> None:
    """Predict the loss of a recipe's model from smaller models of its family: each is trained on the same number of
    tokens per parameter (or of tokens: --tokens), a scaling law is fitted, and the prediction is written down before
    the model is trained. The same command again goes on after an interruption."""
    set_environment(1, offline)
    with show_progress(quiet):
        from llm_quest.cli import ladder as commands
        from llm_quest.formatting import parse_quantity
        from llm_quest.machine.hardware import usable_cores

        options = commands.LadderOptions(
            rungs, parse_quantity(smallest or "0", "--smallest"), parse_quantity(largest or "0", "--largest"),
            commands.parse_budgets(tokens_per_parameter, tokens), seeds, rates, tuned_rungs, parametrization, scale,
            run, jobs or usable_cores(),
        )  # fmt: skip
        result = commands.run_ladder(recipe, pairs or [], options, out=out, log=status_printer(quiet))
    print_result(result, json)


def race(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE", help="The entry: a recipe of pretrain.")],
    pairs: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Runs; a record needs five.")] = 5,
    jobs: Annotated[int, typer.Option(min=0, help="Runs side by side; 0: one per core.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of entries, runs and the ledger.")] = Path("race"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    offline: OfflineOption = False,
) -> None:
    """Enter the race: held-out bits per byte of the builtin corpus, from random weights, within 1e15 counted FLOPs and
    2 GB (docs/race.md)."""
    set_environment(1, offline)
    with show_progress(quiet):
        from llm_quest.cli import race as commands
        from llm_quest.machine.hardware import usable_cores

        result = commands.enter_race(
            recipe, pairs or [], seeds, jobs or usable_cores(), out=out, log=status_printer(quiet)
        )
    print_result(result, json)


def list_ledger(file: LedgerOption = LEDGER, json: JsonOption = False) -> None:
    """List the experiments with their verdicts."""
    from llm_quest.cli.ledger import list_experiments

    print_result(list_experiments(file, status_printer(False)), json)


def show_ledger(
    experiment: Annotated[str, typer.Argument(help="A name from `quest ledger list`, or its beginning.")],
    file: LedgerOption = LEDGER,
    json: JsonOption = False,
) -> None:
    """Show an experiment: its claim, verdicts, runs, and the command that repeats it."""
    from llm_quest.cli.ledger import show_experiment

    print_result(show_experiment(file, experiment, status_printer(False)), json)


def merge_ledger(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Ledgers to add.")],
    file: LedgerOption = LEDGER,
    json: JsonOption = False,
) -> None:
    """Add the rows of other ledgers to this one, each row once."""
    from llm_quest.cli.ledger import merge_into_ledger

    print_result(merge_into_ledger(files, file, status_printer(False)), json)


def export_ledger(
    format: Annotated[
        str, typer.Option(help="csv (verdicts), or runs to a tracker: tensorboard, wandb, trackio.")
    ] = "csv",
    out: Annotated[Path | None, typer.Option(help="csv: the file. tensorboard: the folder.")] = None,
    file: LedgerOption = LEDGER,
    json: JsonOption = False,
) -> None:
    """Export the ledger."""
    from llm_quest.cli.ledger import export_ledger_rows

    print_result(export_ledger_rows(file, format, out, status_printer(False)), json)
