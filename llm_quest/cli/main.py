"""`quest`: every command, its options, and nothing else. What a command does lies in the file it imports when it
runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_quest.cli.errors import run_with_exit_code
from llm_quest.cli.output import open_streams, print_json, print_lines, print_result, status_printer

app = typer.Typer(
    name="quest",
    help="Modern LLMs from scratch: train, generate, look inside.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing along the way.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda[:n], mps, xpu.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
SeedOption = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
ThreadsOption = Annotated[
    int, typer.Option(min=0, help="CPU threads; 0: as many as there are cores, or OMP_NUM_THREADS.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never ask the network (HF_HUB_OFFLINE=1).")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or hub id, or a run folder.")
]
ImageOption = Annotated[str | None, typer.Option(help="An image's file, for a model that looks (quest train vlm).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings on top, dotted: learning_rate=1e-3.")
]


def main() -> None:
    """The entry point: ends the process with the exit code of what happened."""
    open_streams()
    sys.exit(run_with_exit_code(lambda: app(standalone_mode=True, prog_name="quest")))


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
) -> None:
    """Modern LLMs from scratch: train, generate, look inside. Exit codes: 0 done, 1 a bug, 2 usage, 3 data or model
    files, 4 a training guard, 5 memory or disk, 6 something missing, 7 run folder busy, 130/143 interrupted and
    saved."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
) -> None:
    """The offline tour: text, tokenizer, pretraining, resuming, fine-tuning, DPO, a conversation, GRPO, exporting,
    reports. About five minutes on two cores."""
    set_environment(threads)
    from llm_quest.cli.quickstart import run_quickstart

    finding = run_quickstart(out, seed=seed, device=device, log=status_printer(quiet))
    print_result(finding, json)
    raise typer.Exit(finding.exit_code)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN", help="A name, a YAML file, a run folder.")],
    pairs: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one in runs/).")] = None,
    resume: Annotated[str, typer.Option(help="auto (go on if there is something), never, or a run folder.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the settings, print them, train nothing.")] = False,
    device: Annotated[str | None, typer.Option(help="Short for device=...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Short for precision=...: auto, float32, bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Short for seed=...")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="Short for threads=...")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    offline: OfflineOption = False,
) -> None:
    """Train by a recipe. Run the same command again to go on after an interruption."""
    set_environment(threads or 0, offline)
    from llm_quest.cli.train import start_training

    short = {"device": device, "precision": dtype, "seed": seed, "threads": threads}
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    outcome = start_training(
        recipe,
        [*(pairs or []), *given],
        out=out,
        resume=resume,
        dry_run=dry_run,
        quiet=quiet,
        log=status_printer(quiet),
    )
    if os.environ.get("RANK", "0") == "0":
        print_result(outcome, json)
    raise typer.Exit(outcome.exit_code)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to go on from; - reads stdin.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Many: a line each, or the key `prompt` of JSON lines.")] = None,
    out: Annotated[Path | None, typer.Option(help="With --prompts: a row for each, such as texts.jsonl.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="With --prompts: texts at once (default: 32).")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0.01)] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End where this text appears; may be repeated.")] = None,
    slide: Annotated[bool, typer.Option("--slide", help="Go on beyond the context, forgetting the oldest.")] = False,
    image: ImageOption = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|mtp|ngram", help="Speculative decoding: a smaller model, own modules, or the text itself."
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compiled passes: slow to begin, then faster.")] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Go on from a prompt; the text appears as it is made. Or from every prompt of a file (--prompts, --out): the same
    command again goes on with the rows that are missing."""
    set_environment(threads, offline)
    from llm_quest.cli.batch_generate import check_prompt_options, generate_batch
    from llm_quest.cli.chat import GenerationOptions, generate_text

    alone = {"--prompt": prompt, "--draft": draft, "--image": image}
    check_prompt_options(prompts, alone, {"--out": out}, {"--batch": batch})
    stops = tuple(stop or ())
    manner = GenerationOptions(
        tokens, temperature, top_k, top_p, min_p, repetition_penalty, stops, slide, seed, compile
    )
    if prompts is not None and out is not None:
        print_result(
            generate_batch(
                model, prompts, out, manner, batch=batch, device=device, dtype=dtype, log=status_printer(quiet)
            ),
            json,
        )
        return
    assert prompt is not None, "require_fitting asked for it"
    text = sys.stdin.read() if prompt == "-" else prompt
    if draft is not None:
        from llm_quest.cli.speculative_generate import generate_speculative

        if image is not None:
            from llm_quest.errors import UsageError

            raise UsageError("--draft guesses text and does not see --image: leave one of them out")
        generate_speculative(
            model, draft, text, manner, device=device, dtype=dtype, as_json=json, log=status_printer(quiet)
        )
        return
    if image is not None:
        from llm_quest.cli.vision import describe_image

        describe_image(model, image, text, manner, device=device, dtype=dtype, as_json=json, log=status_printer(quiet))
        return
    generate_text(model, text, manner, device=device, dtype=dtype, as_json=json, log=status_printer(quiet))


@app.command()
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many tokens an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = 0.95,
    template: Annotated[bool, typer.Option("--template/--no-template", help="Use the folder's chat template.")] = True,
    image: ImageOption = None,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Talk with a model in the terminal. /reset forgets the conversation, /quit or Ctrl-D leaves."""
    set_environment(threads, offline)
    from llm_quest.cli.chat import GenerationOptions, run_chat

    manner = GenerationOptions(tokens, temperature, None, top_p, None, 1.0, (), image is None, seed)
    if image is not None:
        from llm_quest.cli.vision import chat_about_image

        chat_about_image(model, image, manner, system=system, device=device, dtype=dtype, log=status_printer(quiet))
        return
    run_chat(model, manner, system=system, template=template, device=device, dtype=dtype, log=status_printer(quiet))


@app.command()
def classify(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT|IMAGE", help="The text (- reads stdin), or an image's file.")],
    json: JsonOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """What a classifier takes a text or an image for, and how sure it is."""
    set_environment(threads, offline)
    from llm_quest.cli.classify import classify_image, classify_text, is_image_path

    if is_image_path(text):
        print_result(classify_image(model, text, device=device), json)
        return
    print_result(classify_text(model, sys.stdin.read() if text == "-" else text, device=device), json)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help="builtin[:parts], a file, a folder; default: what the run held out.")] = "",
    tokens: Annotated[int, typer.Option(min=0, help="Look at so many tokens (0: all); of an answer: at most.")] = 0,
    task: Annotated[str, typer.Option(help="Problems to solve: countdown, addition:digits=3, gsm8k or its file.")] = "",
    problems: Annotated[int, typer.Option(min=1, help="With --task, --harness: how many.")] = 200,
    samples: Annotated[int, typer.Option(min=0, help="With --task: so many of each, for mean@k and pass@k.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --samples.")] = 1.0,
    part: Annotated[str, typer.Option(help="With --task: train, validation, test.")] = "test",
    harness: Annotated[str, typer.Option(help="Tasks of EleutherAI's lm-eval, with commas: hellaswag,arc_easy.")] = "",
    json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """On text: perplexity and bits per byte beside n-gram and compressor baselines on the same bytes. On problems
    (--task): greedy accuracy with its interval, mean@k and pass@k. A run that looks (vit, vlm): its score on the images
    it held out."""
    set_environment(threads, offline)
    from llm_quest.cli import evaluate as commands

    log, found = status_printer(quiet), None
    if harness:
        names = harness.split(",")
        found = commands.evaluate_with_lm_eval(model, names, limit=problems, device=device, dtype=dtype, log=log)
    elif task:
        options = commands.ProblemEvalOptions(task, part, problems, samples, temperature, tokens or 64, seed)
        found = commands.evaluate_problem_task(model, options, device=device, dtype=dtype, log=log)
    elif data or (found := commands.evaluate_images(model, device=device, log=log)) is None:
        found = commands.evaluate_text(model, data, max_tokens=tokens or None, device=device, dtype=dtype, log=log)
    print_result(found, json)


@app.command()
def models(json: JsonOption = False) -> None:
    """The published sizes that can be built by name."""
    from llm_quest.cli.models import list_presets as list_presets

    print_result(list_presets(), json)


@app.command("show")
def show_model(name: Annotated[str, typer.Argument(help="A preset's name.")], json: JsonOption = False) -> None:
    """A model's blocks, its parameters by part, its cache and its cost."""
    from llm_quest.cli.models import make_model_card as make_model_card

    print_result(make_model_card(name), json)


@app.command()
def diff(a: Annotated[str, typer.Argument(help="A page or preset.")], b: str, json: JsonOption = False) -> None:
    """Two families compared: what is new, the numbers, the code."""
    from llm_quest.cli.diff import diff_families as diff_families

    lesson = diff_families(a, b)
    if json or not sys.stdout.isatty():
        print_result(lesson, json)
    else:  # our own source in our own colours: nothing in it to be cleaned
        print("\n".join(lesson.lines(colour=True)))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN")],
    pairs: Overrides = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time three real steps.")] = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """What a run will cost before it starts: parameters, FLOPs, memory by kind, checkpoints, time."""
    set_environment(threads, offline)
    from llm_quest.cli.train import plan_recipe

    print_result(plan_recipe(recipe, pairs or [], measure=measure, log=status_printer(quiet)), json)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A model folder.")],
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """What a model folder holds, and everything that is wrong with it."""
    set_environment(0, offline)
    from llm_quest.hub.inspect import inspect_folder as inspected

    print_result(inspected(folder), json)


@app.command("inspect-batch")
def inspect_batch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN")],
    pairs: Overrides = None,
    step: Annotated[int, typer.Option(min=0, help="The optimiser step, counted from 0.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Show so many rows.")] = 4,
    json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """What a step trains on, token by token: what is learned, or read by the head (in green), positions, documents."""
    set_environment(threads, offline)
    from llm_quest.cli.inspect_batch import load_batch_view

    shown = load_batch_view(recipe, pairs or [], step=step, rows=rows, log=status_printer(quiet))
    if json or not sys.stdout.isatty():
        print_result(shown, json)
    else:  # the colours are ours; the text between them is cleaned already
        print("\n".join(shown.lines(colour=True)))


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A model folder.")], json: JsonOption = False, threads: ThreadsOption = 0
) -> None:
    """Our logits and tokens against transformers' (which must be installed)."""
    set_environment(threads)
    from llm_quest.hub.inspect import compare_with_transformers as verified

    finding = verified(folder)
    print_result(finding, json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    folder: Annotated[Path, typer.Argument(help="Where to write the Hugging Face layout.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of an adapted model: the whole, the adapter worked in.")
    ] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="Of an adapted model: the adapter, for PEFT.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a run's model as a folder that transformers and vLLM load."""
    from llm_quest.cli.export import export_run as exported

    print_result(exported(run, folder, dtype=dtype, overwrite=overwrite, merged=merge, adapter=adapter), json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    out: Annotated[Path | None, typer.Option(help="The page (default: report.html in the first run).")] = None,
    json: JsonOption = False,
) -> None:
    """One self-contained page: curves, samples, data, cost, environment."""
    from llm_quest.report.page import write_report as write_report

    page = write_report(runs, out=out)
    print_json({"report": str(page)}) if json else print_lines([str(page)])


@app.command()
def papers(json: JsonOption = False) -> None:
    """Papers with a claim, the experiment that tests it here, and the verdict."""
    set_environment(0)
    from llm_quest.cli.papers import list_papers

    print_result(list_papers(), json)


@app.command()
def reproduce(
    paper: Annotated[str, typer.Argument(help="A name from `quest papers`.")],
    seeds: Annotated[int, typer.Option(min=1, max=10, help="How many; the verdict rests on them.")] = 3,
    jobs: Annotated[int, typer.Option(min=0, help="Measurements at once; 0: one per core.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the card goes (default: docs/papers).")] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a paper's measurements again and draw its card. What was measured is kept: an interrupted run goes on."""
    from llm_quest.cli.papers import reproduce_paper
    from llm_quest.train.hardware import usable_cores

    os.environ["OMP_NUM_THREADS"] = "1"
    print_result(
        reproduce_paper(paper, seeds=seeds, out=out, jobs=jobs or usable_cores(), log=status_printer(quiet)), json
    )


@app.command()
def doctor(json: JsonOption = False) -> None:
    """This machine: python, torch, cores, memory, devices, and what to mend."""
    from llm_quest.cli.doctor import inspect_machine as inspect_machine

    print_result(inspect_machine(), json)


@app.command()
def data(
    source: Annotated[str | None, typer.Argument(help="builtin[:parts], a file, a folder; without: a list.")] = None,
    column: Annotated[str, typer.Option(help="The key of a JSONL line that holds its text.")] = "text",
    separator: Annotated[str | None, typer.Option(help="Splits a text file into documents.")] = None,
    json: JsonOption = False,
) -> None:
    """What a data source holds: documents, bytes, and what was dropped and why."""
    from llm_quest.cli.data import list_builtin_corpora, load_source

    print_result(
        list_builtin_corpora() if source is None else load_source(source, column=column, separator=separator), json
    )


def set_environment(threads: int, offline: bool = False) -> None:
    """What has to be set before torch and the hub are imported."""
    from llm_quest.train.hardware import usable_cores

    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if (
        threads or "OMP_NUM_THREADS" not in os.environ
    ):  # torch alone counts physical cores, and leaves half of a small box idle
        os.environ["OMP_NUM_THREADS"] = str(threads or usable_cores())
