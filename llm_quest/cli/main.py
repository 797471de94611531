"""`quest`: every command, its options, and nothing else. What a command does lies in the file it imports when it
runs."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_quest.cli.door import guarded
from llm_quest.cli.screen import open_streams, show, show_json, show_lines, voice

app = typer.Typer(
    name="quest",
    help="Modern LLMs from scratch: train, generate, look inside.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing along the way.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda[:n], mps, xpu.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same result.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as there are cores, or OMP_NUM_THREADS.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the network (HF_HUB_OFFLINE=1).")]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder or hub id, or a run folder.")]
Image = Annotated[str | None, typer.Option(help="An image's file, for a model that looks (quest train vlm).")]
Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings on top, dotted: optimizer.lr=1e-3.")
]


def main() -> None:
    """The entry point: ends the process with the exit code of what happened."""
    open_streams()
    sys.exit(guarded(lambda: app(standalone_mode=True, prog_name="quest")))


def version(wanted: bool) -> None:
    if wanted:
        from llm_quest import __version__

        print(f"llm-quest {__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Modern LLMs from scratch: train, generate, look inside. Exit codes: 0 done, 1 a bug, 2 usage, 3 data or model
    files, 4 a training guard, 5 memory or disk, 6 something missing, 7 run folder busy, 130/143 interrupted and
    saved."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """The offline tour: text, tokenizer, pretraining, resuming, fine-tuning, DPO, a conversation, GRPO, exporting,
    reports. About five minutes on two cores."""
    prepare(threads)
    from llm_quest.cli.tour import tour

    finding = tour(out, seed=seed, device=device, say=voice(quiet))
    show(finding, json)
    raise typer.Exit(finding.exit_code)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN", help="A name, a YAML file, a run folder.")],
    pairs: Pairs = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one in runs/).")] = None,
    resume: Annotated[str, typer.Option(help="auto (go on if there is something), never, or a run folder.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the settings, print them, train nothing.")] = False,
    device: Annotated[str | None, typer.Option(help="Short for device=...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Short for precision=...: auto, float32, bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Short for seed=...")] = None,
    threads: Annotated[int | None, typer.Option(min=0, help="Short for threads=...")] = None,
    json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Train by a recipe. Run the same command again to go on after an interruption."""
    prepare(threads or 0, offline)
    from llm_quest.cli.training import start

    short = {"device": device, "precision": dtype, "seed": seed, "threads": threads}
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    outcome = start(
        recipe, [*(pairs or []), *given], out=out, resume=resume, dry_run=dry_run, quiet=quiet, say=voice(quiet)
    )
    if os.environ.get("RANK", "0") == "0":
        show(outcome, json)
    raise typer.Exit(outcome.exit_code)


@app.command()
def generate(
    model: ModelPath,
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
    image: Image = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|mtp|ngram", help="Speculative decoding: a smaller model, own modules, or the text itself."
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compiled passes: slow to begin, then faster.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    threads: Threads = 0,
    offline: Offline = False,
) -> None:
    """Go on from a prompt; the text appears as it is made. Or from every prompt of a file (--prompts, --out): the same
    command again goes on with the rows that are missing."""
    prepare(threads, offline)
    from llm_quest.cli.talk import Manner, go_on
    from llm_quest.cli.writing import require_fitting, write_texts

    alone = {"--prompt": prompt, "--draft": draft, "--image": image}
    require_fitting(prompts, alone, {"--out": out}, {"--batch": batch})
    stops = tuple(stop or ())
    manner = Manner(tokens, temperature, top_k, top_p, min_p, repetition_penalty, stops, slide, seed, compile)
    if prompts is not None and out is not None:
        show(write_texts(model, prompts, out, manner, batch=batch, device=device, dtype=dtype, say=voice(quiet)), json)
        return
    assert prompt is not None, "require_fitting asked for it"
    text = sys.stdin.read() if prompt == "-" else prompt
    if draft is not None:
        from llm_quest.cli.drafting import go_on_drafting

        if image is not None:
            from llm_quest.errors import UsageError

            raise UsageError("--draft guesses text and does not see --image: leave one of them out")
        go_on_drafting(model, draft, text, manner, device=device, dtype=dtype, as_json=json, say=voice(quiet))
        return
    if image is not None:
        from llm_quest.cli.looking import describe

        describe(model, image, text, manner, device=device, dtype=dtype, as_json=json, say=voice(quiet))
        return
    go_on(model, text, manner, device=device, dtype=dtype, as_json=json, say=voice(quiet))


@app.command()
def chat(
    model: ModelPath,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many tokens an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = 0.95,
    template: Annotated[bool, typer.Option("--template/--no-template", help="Use the folder's chat template.")] = True,
    image: Image = None,
    quiet: Quiet = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    threads: Threads = 0,
    offline: Offline = False,
) -> None:
    """Talk with a model in the terminal. /reset forgets the conversation, /quit or Ctrl-D leaves."""
    prepare(threads, offline)
    from llm_quest.cli.talk import Manner, converse

    manner = Manner(tokens, temperature, None, top_p, None, 1.0, (), image is None, seed)
    if image is not None:
        from llm_quest.cli.looking import converse_about

        converse_about(model, image, manner, system=system, device=device, dtype=dtype, say=voice(quiet))
        return
    converse(model, manner, system=system, template=template, device=device, dtype=dtype, say=voice(quiet))


@app.command()
def classify(
    model: ModelPath,
    text: Annotated[str, typer.Argument(metavar="TEXT|IMAGE", help="The text (- reads stdin), or an image's file.")],
    json: Json = False,
    device: Device = "auto",
    threads: Threads = 0,
    offline: Offline = False,
) -> None:
    """What a classifier takes a text or an image for, and how sure it is."""
    prepare(threads, offline)
    from llm_quest.cli.looking import classify_image, is_image

    if is_image(text):
        show(classify_image(model, text, device=device), json)
        return
    from llm_quest.cli.classifying import classify as classified

    show(classified(model, sys.stdin.read() if text == "-" else text, device=device), json)


@app.command("eval")
def evaluate(
    model: ModelPath,
    data: Annotated[str, typer.Option(help="builtin[:parts], a file, a folder; default: what the run held out.")] = "",
    tokens: Annotated[int, typer.Option(min=0, help="Look at so many tokens (0: all); of an answer: at most.")] = 0,
    task: Annotated[str, typer.Option(help="Problems to solve: countdown, addition:digits=3, gsm8k or its file.")] = "",
    problems: Annotated[int, typer.Option(min=1, help="With --task, --harness: how many.")] = 200,
    samples: Annotated[int, typer.Option(min=0, help="With --task: so many of each, for mean@k and pass@k.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --samples.")] = 1.0,
    part: Annotated[str, typer.Option(help="With --task: train, validation, test.")] = "test",
    harness: Annotated[str, typer.Option(help="Tasks of EleutherAI's lm-eval, with commas: hellaswag,arc_easy.")] = "",
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    threads: Threads = 0,
    offline: Offline = False,
) -> None:
    """On text: perplexity and bits per byte beside n-gram and compressor baselines on the same bytes. On problems
    (--task): greedy accuracy with its interval, mean@k and pass@k. A run that looks (vit, vlm): its score on the images
    it held out."""
    prepare(threads, offline)
    if harness:
        judged = optional("llm_quest.cli.harness", "lm_eval", "harness").judged
        show(judged(model, harness.split(","), limit=problems, device=device, dtype=dtype, say=voice(quiet)), json)
        return
    if task:
        from llm_quest.cli.problems import Exam, examine

        exam = Exam(task, part, problems, samples, temperature, tokens or 64, seed)
        show(examine(model, exam, device=device, dtype=dtype, say=voice(quiet)), json)
        return
    from llm_quest.cli.judge import judge
    from llm_quest.cli.looking import looked

    if not data and (marks := looked(model, device=device, say=voice(quiet))) is not None:
        show(marks, json)
        return
    show(judge(model, data, tokens=tokens or None, device=device, dtype=dtype, say=voice(quiet)), json)


@app.command()
def models(json: Json = False) -> None:
    """The published sizes that can be built by name."""
    from llm_quest.cli.catalog import models as listed

    show(listed(), json)


@app.command("show")
def show_model(name: Annotated[str, typer.Argument(help="A preset's name.")], json: Json = False) -> None:
    """A model's blocks, its parameters by part, its cache and its cost."""
    from llm_quest.cli.catalog import show as shown

    show(shown(name), json)


@app.command()
def diff(a: Annotated[str, typer.Argument(help="A page or preset.")], b: str, json: Json = False) -> None:
    """Two families compared: what is new, the numbers, the code."""
    from llm_quest.cli.lesson import diff as compared

    lesson = compared(a, b)
    if json or not sys.stdout.isatty():
        show(lesson, json)
    else:  # our own source in our own colours: nothing in it to be cleaned
        print("\n".join(lesson.lines(colour=True)))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN")],
    pairs: Pairs = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time three real steps.")] = True,
    json: Json = False,
    quiet: Quiet = False,
    threads: Threads = 0,
    offline: Offline = False,
) -> None:
    """What a run will cost before it starts: parameters, FLOPs, memory by kind, checkpoints, time."""
    prepare(threads, offline)
    from llm_quest.cli.training import foresee

    show(foresee(recipe, pairs or [], measure=measure, say=voice(quiet)), json)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A model folder.")], json: Json = False, offline: Offline = False
) -> None:
    """What a model folder holds, and everything that is wrong with it."""
    prepare(0, offline)
    from llm_quest.hub.inspect import inspect as inspected

    show(inspected(folder), json)


@app.command("inspect-batch")
def inspect_batch(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN")],
    pairs: Pairs = None,
    step: Annotated[int, typer.Option(min=0, help="The optimiser step, counted from 0.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Show so many rows.")] = 4,
    json: Json = False,
    quiet: Quiet = False,
    threads: Threads = 0,
    offline: Offline = False,
) -> None:
    """What a step trains on, token by token: what is learned, or read by the head (in green), positions, documents."""
    prepare(threads, offline)
    from llm_quest.cli.batches import look

    shown = look(recipe, pairs or [], step=step, rows=rows, say=voice(quiet))
    if json or not sys.stdout.isatty():
        show(shown, json)
    else:  # the colours are ours; the text between them is cleaned already
        print("\n".join(shown.lines(colour=True)))


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A model folder.")], json: Json = False, threads: Threads = 0
) -> None:
    """Our logits and tokens against transformers' (which must be installed)."""
    prepare(threads)
    from llm_quest.hub.inspect import verify as verified

    finding = verified(folder)
    show(finding, json)


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
    json: Json = False,
) -> None:
    """Write a run's model as a folder that transformers and vLLM load."""
    from llm_quest.cli.exporting import export as exported

    show(exported(run, folder, dtype=dtype, overwrite=overwrite, merged=merge, adapter=adapter), json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    out: Annotated[Path | None, typer.Option(help="The page (default: report.html in the first run).")] = None,
    json: Json = False,
) -> None:
    """One self-contained page: curves, samples, data, cost, environment."""
    from llm_quest.report.page import report as written

    page = written(runs, out=out)
    show_json({"report": str(page)}) if json else show_lines([str(page)])


@app.command()
def papers(json: Json = False) -> None:
    """Papers with a claim, the experiment that tests it here, and the verdict."""
    prepare(0)
    from llm_quest.cli.library import shelf

    show(shelf(), json)


@app.command()
def reproduce(
    paper: Annotated[str, typer.Argument(help="A name from `quest papers`.")],
    seeds: Annotated[int, typer.Option(min=1, max=10, help="How many; the verdict rests on them.")] = 3,
    jobs: Annotated[int, typer.Option(min=0, help="Measurements at once; 0: one per core.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where the card goes (default: docs/papers).")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a paper's measurements again and draw its card. What was measured is kept: an interrupted run goes on."""
    from llm_quest.cli.library import again
    from llm_quest.train.hardware import usable_cores

    os.environ["OMP_NUM_THREADS"] = "1"
    show(again(paper, seeds=seeds, out=out, jobs=jobs or usable_cores(), say=voice(quiet)), json)


@app.command()
def doctor(json: Json = False) -> None:
    """This machine: python, torch, cores, memory, devices, and what to mend."""
    from llm_quest.cli.machine import doctor as examined

    show(examined(), json)


@app.command()
def data(
    source: Annotated[str | None, typer.Argument(help="builtin[:parts], a file, a folder; without: a list.")] = None,
    column: Annotated[str, typer.Option(help="The key of a JSONL line that holds its text.")] = "text",
    separator: Annotated[str | None, typer.Option(help="Splits a text file into documents.")] = None,
    json: Json = False,
) -> None:
    """What a data source holds: documents, bytes, and what was dropped and why."""
    from llm_quest.cli.sources import ledger_of, listed

    show(listed() if source is None else ledger_of(source, column=column, separator=separator), json)


def optional(file: str, package: str, extra: str) -> Any:
    """A file of ours that needs a package which is not always there; MissingError says how to get it."""
    from llm_quest.errors import MissingError

    if importlib.util.find_spec(package) is None:
        raise MissingError(f"{package} is not installed: pip install 'llm-quest[{extra}]'")
    return importlib.import_module(file)


def prepare(threads: int, offline: bool = False) -> None:
    """What has to be set before torch and the hub are imported."""
    from llm_quest.train.hardware import usable_cores

    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if (
        threads or "OMP_NUM_THREADS" not in os.environ
    ):  # torch alone counts physical cores, and leaves half of a small box idle
        os.environ["OMP_NUM_THREADS"] = str(threads or usable_cores())
