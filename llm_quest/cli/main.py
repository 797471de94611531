"""The `quest` command: its subcommands and their options. A subcommand imports its implementation when it runs, so
that `quest --help` does not import torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_quest.cli.eval_options import check_eval_options
from llm_quest.cli.generation_options import GenerationOptions, parse_logit_bias, parse_template_kwargs
from llm_quest.cli.output import (
    open_streams,
    print_json,
    print_lines,
    print_result,
    run_with_exit_code,
    show_progress,
    status_printer,
)
from llm_quest.progress import wants_colour

app = typer.Typer(
    name="quest",
    help="Modern LLMs from scratch: train, generate, evaluate, inspect.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda[:n], mps, xpu.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0: one per core, or OMP_NUM_THREADS.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never use the network (HF_HUB_OFFLINE=1).")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder or hub id, or a run: RUN, RUN@best, RUN@last, RUN@120."
    ),
]
ImageOption = Annotated[
    list[str] | None,
    typer.Option(help="An image file, for a model that reads images; several --image are shown in order."),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="A file of prompts: one per line, or the key `prompt` of JSON lines.")
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="With --prompts: the batch size (default: 32).")]
TokensOption = Annotated[int, typer.Option("--tokens", "-n", min=1, help="Maximum number of new tokens.")]
TemperatureOption = Annotated[
    float | None, typer.Option(min=0.0, help="0: greedy decoding. Default: the makers' advice, else 0.8 (chat: 0.7).")
]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Sample from the k most probable tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from the most probable tokens that together reach p.")
]
MinPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from tokens at least p times as probable as the first.")
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option(min=0.01, help="Divides the logits of tokens that occurred.")
]
PresencePenaltyOption = Annotated[float, typer.Option(help="Subtracted from the logits of generated tokens.")]
FrequencyPenaltyOption = Annotated[float, typer.Option(help="The same, times how often each was generated.")]
NoRepeatNgramSizeOption = Annotated[int | None, typer.Option(min=1, help="No sequence of so many tokens occurs twice.")]
MinNewTokensOption = Annotated[int, typer.Option(min=0, help="No end of text before so many new tokens.")]
LogitBiasOption = Annotated[
    list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to the logit of a token id; may be repeated.")
]
BeamsOption = Annotated[int, typer.Option(min=1, help="Above 1: beam search with so many beams.")]
LengthPenaltyOption = Annotated[float, typer.Option(help="With --beams: above 0 favours longer texts.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="The prompt is a message in the folder's chat template.")]
TemplateKwargsOption = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", help="Arguments of the chat template, such as '{enable_thinking: false}'."),
]
SystemOption = Annotated[str | None, typer.Option(help="The system message.")]
SpecialTokensOption = Annotated[
    bool, typer.Option("--special-tokens", help="Control tokens may be written out in a prompt, such as <|im_end|>.")
]
StopOption = Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")]
AnswerOption = Annotated[list[str] | None, typer.Option("--answer", "-a", help="An answer; may be repeated.")]
SlideOption = Annotated[bool, typer.Option("--slide", help="Go on beyond the context by dropping the oldest tokens.")]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL|mtp|ngram",
        help="Speculative decoding: with a smaller model, multi-token modules, or n-grams of the text.",
    ),
]
EvalDataOption = Annotated[str, typer.Option(help="builtin[:parts], a file, a folder; default: what the run held out.")]
EvalTaskOption = Annotated[str, typer.Option(help="A task: countdown, addition:digits=3, gsm8k or its file.")]
EvalHarnessOption = Annotated[str, typer.Option(help="Tasks of EleutherAI's lm-eval, with commas: hellaswag,arc_easy.")]
EvalTokensOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="With --data: evaluate on so many tokens (0: all); with --task: the longest answer (64).",
    ),
]
EvalProblemsOption = Annotated[
    int | None, typer.Option(min=1, help="With --task, --harness: the number of problems (200).")
]
EvalSamplesOption = Annotated[
    int | None, typer.Option(min=1, help="With --task: samples of each problem, for mean@k and pass@k.")
]
EvalTemperatureOption = Annotated[float | None, typer.Option(min=0.01, help="With --samples, --vote, --best-of (1.0).")]
EvalVoteOption = Annotated[
    int | None, typer.Option(min=1, help="With --task: the accuracy of the majority of so many samples.")
]
EvalBestOfOption = Annotated[
    int | None, typer.Option(min=1, help="With --task: the accuracy of the best of so many samples, by --reward-model.")
]
EvalRewardModelOption = Annotated[
    str | None, typer.Option(help="With --best-of: a reward model with the model's tokenizer.")
]
EvalChatOption = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="With --task: ask through the chat template (as a run was trained)."),
]
EvalPartOption = Annotated[str | None, typer.Option(help="With --task: train, validation, test (test).")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the model: slow to start, then faster.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's: learning_rate=1e-3."),
]


def main() -> None:
    """The entry point: runs a command and ends the process with its exit code."""
    open_streams()
    arguments = sorted(sys.argv[1:], key=lambda one: one != "--allow-pickle")  # it may stand behind the command too
    sys.exit(run_with_exit_code(lambda: app(arguments, standalone_mode=True, prog_name="quest")))


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


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/quickstart"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
) -> None:
    """Run the whole workflow once, offline: tokenizer, pretraining, resume, SFT, DPO, a conversation, GRPO, export,
    reports. About five minutes on two cores."""
    set_environment(threads)
    with show_progress(quiet):
        from llm_quest.cli.quickstart import run_quickstart

        result = run_quickstart(out, seed=seed, device=device, log=status_printer(quiet))
    print_result(result, json)
    raise typer.Exit(result.exit_code)


class RecipeCommand(typer.core.TyperCommand):
    """A command about a recipe, whose help with a recipe's name is about that recipe: `quest train sft --help`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = [one for one in args if not one.startswith("-")]
        if names and {"-h", "--help"} & set(args):
            from llm_quest.recipes.settings_reference import make_page

            print_lines([*self.get_help(ctx).splitlines(), "", *make_page(names[0]).lines()])
            ctx.exit()
        return super().parse_args(ctx, args)


@app.command(cls=RecipeCommand)
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN", help="A name, a YAML file, a run folder.")],
    pairs: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder (default: a new one in runs/).")] = None,
    resume: Annotated[str, typer.Option(help="auto (if there is a checkpoint), never, or a run folder.")] = "auto",
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


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt; - reads stdin.")] = None,
    prompts: PromptsOption = None,
    out: Annotated[Path | None, typer.Option(help="With --prompts: the output file, such as texts.jsonl.")] = None,
    batch: BatchOption = None,
    tokens: TokensOption = 128,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    presence_penalty: PresencePenaltyOption = 0.0,
    frequency_penalty: FrequencyPenaltyOption = 0.0,
    no_repeat_ngram_size: NoRepeatNgramSizeOption = None,
    min_new_tokens: MinNewTokensOption = 0,
    logit_bias: LogitBiasOption = None,
    beams: BeamsOption = 1,
    length_penalty: LengthPenaltyOption = 1.0,
    chat: ChatOption = False,
    system: SystemOption = None,
    chat_template_kwargs: TemplateKwargsOption = None,
    special_tokens: SpecialTokensOption = False,
    stop: StopOption = None,
    slide: SlideOption = False,
    image: ImageOption = None,
    draft: DraftOption = None,
    compile: CompileOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Generate text from a prompt, or from each prompt of a file (--prompts, --out): the same command again generates
    the rows that are missing."""
    set_environment(threads, offline)
    from llm_quest.cli import batch_generate, speculative_generate, vision
    from llm_quest.cli.chat import generate_text

    single = {"--prompt": prompt, "--draft": draft, "--image": image[0] if image else None}
    batch_generate.check_prompt_options(prompts, single, {"--out": out}, {"--batch": batch})
    options = GenerationOptions(
        tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()), slide, seed, compile,
        min_new_tokens, no_repeat_ngram_size, presence_penalty, frequency_penalty, parse_logit_bias(logit_bias or ()),
        beams, length_penalty, chat, system, special_tokens, parse_template_kwargs(chat_template_kwargs),
    )  # fmt: skip
    machine: dict[str, Any] = {"device": device, "dtype": dtype, "log": status_printer(quiet)}
    if prompts is not None and out is not None:
        print_result(batch_generate.generate_batch(model, prompts, out, options, batch=batch, **machine), json)
        return
    text = sys.stdin.read() if prompt == "-" else str(prompt)
    if image:
        vision.describe_images(model, image, text, options, draft=draft, as_json=json, **machine)
    elif draft:
        speculative_generate.generate_speculative(model, draft, text, options, as_json=json, **machine)
    else:
        generate_text(model, text, options, as_json=json, **machine)


@app.command()
def chat(
    model: ModelArgument,
    system: SystemOption = None,
    chat_template_kwargs: TemplateKwargsOption = None,
    tokens: TokensOption = 256,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    template: Annotated[bool, typer.Option("--template/--no-template", help="Use the folder's chat template.")] = True,
    image: ImageOption = None,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Chat with a model in the terminal. /help lists the commands, /quit or Ctrl-D leaves; a model that reads images is
    shown one by --image or by /image FILE."""
    set_environment(threads, offline)
    from llm_quest.cli.text_chat import run_chat
    from llm_quest.cli.vision import chat_about_images, reads_images

    with_images = bool(image) or reads_images(model)
    options = GenerationOptions(
        tokens, temperature, top_k, top_p, min_p, repetition_penalty, (), not with_images, seed, chat=True,
        chat_template_kwargs=parse_template_kwargs(chat_template_kwargs),
    )  # fmt: skip
    machine: dict[str, Any] = {"device": device, "dtype": dtype, "log": status_printer(quiet)}
    if with_images:
        chat_about_images(model, image or (), options, system=system, template=template, **machine)
    else:
        run_chat(model, options, system=system, template=template, **machine)


@app.command()
def classify(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT|IMAGE", help="The text (- reads stdin), or an image file.")],
    json: JsonOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Classify a text or an image: the probability of each label."""
    set_environment(threads, offline)
    from llm_quest.cli.classify import classify_image, classify_text, is_image_path

    if is_image_path(text):
        print_result(classify_image(model, text, device=device), json)
        return
    print_result(classify_text(model, sys.stdin.read() if text == "-" else text, device=device), json)


@app.command()
def score(
    model: ModelArgument,
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="Rows of conversations, or of preferences.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The question, without a FILE.")] = None,
    answer: AnswerOption = None,
    json: JsonOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Score answers with a reward model (quest train reward, or a published one)."""
    set_environment(threads, offline)
    from llm_quest.cli.score import score_conversations

    print_result(score_conversations(model, file, prompt, answer or (), device=device), json)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    data: EvalDataOption = "",
    task: EvalTaskOption = "",
    harness: EvalHarnessOption = "",
    tokens: EvalTokensOption = None,
    problems: EvalProblemsOption = None,
    samples: EvalSamplesOption = None,
    temperature: EvalTemperatureOption = None,
    vote: EvalVoteOption = None,
    best_of: EvalBestOfOption = None,
    reward_model: EvalRewardModelOption = None,
    chat: EvalChatOption = None,
    part: EvalPartOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Evaluate a model. A run: its recipe's own measure on what it held out, the numbers that it printed at its end.
    On text (--data): perplexity and bits per byte, beside compressors. On problems (--task): greedy accuracy with its
    interval, mean@k and pass@k, the accuracy of a majority vote and of a reward model's choice."""
    set_environment(threads, offline)
    check_eval_options(
        {"--data": data, "--task": task, "--harness": harness},
        {"--tokens": tokens, "--problems": problems, "--part": part, "--temperature": temperature,
         "--samples": samples, "--vote": vote, "--best-of": best_of, "--reward-model": reward_model, "--chat": chat},
    )  # fmt: skip
    machine: dict[str, Any] = {"device": device, "dtype": dtype, "log": status_printer(quiet)}
    number = problems or 200
    found: Any
    with show_progress(quiet):
        from llm_quest.cli import evaluate as commands

        if harness:
            found = commands.evaluate_with_lm_eval(model, harness.split(","), limit=number, seed=seed, **machine)
        elif task:
            options = commands.ProblemEvalOptions(
                task,
                part or "test",
                number,
                samples or 0,
                temperature or 1.0,
                tokens or 64,
                seed,
                vote or 0,
                best_of or 0,
            )
            found = commands.evaluate_problem_task(model, options, chat=chat, reward_model=reward_model, **machine)
        elif data:
            found = commands.evaluate_text(model, data, max_tokens=tokens or None, **machine)
        else:
            found = commands.evaluate_held_out(model, threads=threads, **machine)
    print_result(found, json)


@app.command()
def models(
    words: Annotated[list[str] | None, typer.Argument(help="Only models that hold all of these: qwen3 moe.")] = None,
    max_parameters: Annotated[str | None, typer.Option(help="At most so many: 500M, 4B.")] = None,
    json: JsonOption = False,
) -> None:
    """List the models that can be built by name, or search them."""
    from llm_quest.cli.models import list_presets

    print_result(list_presets(words or (), max_parameters), json)


@app.command()
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


@app.command()
def techniques(json: JsonOption = False) -> None:
    """List the techniques, each with its options and the words that switch it on."""
    set_environment(0)
    from llm_quest.cli.techniques import list_techniques

    print_result(list_techniques(), json)


@app.command("show")
def show_model(name: Annotated[str, typer.Argument(help="A preset's name.")], json: JsonOption = False) -> None:
    """Describe a model: its layers, parameters by part, cache and cost."""
    from llm_quest.cli.models import make_model_card

    print_result(make_model_card(name), json)


@app.command()
def diff(a: Annotated[str, typer.Argument(help="A family or preset.")], b: str, json: JsonOption = False) -> None:
    """Compare two families: what is new, layers, numbers, code."""
    from llm_quest.cli.diff import diff_families

    found = diff_families(a, b)
    if json or not wants_colour(sys.stdout):
        print_result(found, json)
    else:  # our own source and colours: nothing in it needs cleaning
        print("\n".join(found.lines(colour=True)))


@app.command(cls=RecipeCommand)
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|FILE|RUN")],
    pairs: Overrides = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time three real steps.")] = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Estimate the cost of a run: parameters, FLOPs, memory by kind, checkpoints, time."""
    set_environment(threads, offline)
    with show_progress(quiet):
        from llm_quest.cli.train import estimate_cost

        found = estimate_cost(recipe, pairs or [], measure=measure, log=status_printer(quiet))
    print_result(found, json)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A model folder.")],
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Describe a model folder, and everything that is wrong with it."""
    set_environment(0, offline)
    from llm_quest.hub.inspect import inspect_folder

    print_result(inspect_folder(folder), json)


tokens_app = typer.Typer(help="Change a model's tokens.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokens_app, name="tokens")


@tokens_app.command("add")
def add_tokens(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(help="The output folder.")],
    tokens: Annotated[list[str], typer.Argument(metavar="TOKEN...", help="The new tokens.")],
    special: Annotated[bool, typer.Option("--special", help="Control tokens, which nobody's text spells.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files in the folder.")] = False,
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Add tokens to a model: to its tokenizer, and rows to its embedding, each the mean of the others."""
    set_environment(0, offline)
    from llm_quest.cli.tokens import add_tokens_to_folder

    print_result(add_tokens_to_folder(model, folder, tokens, special=special, overwrite=overwrite), json)


@app.command("inspect-batch")
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
    if json or not wants_colour(sys.stdout):
        print_result(shown, json)
    else:  # the colours are ours; the text between them is cleaned already
        print("\n".join(shown.lines(colour=True)))


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A model folder.")], json: JsonOption = False, threads: ThreadsOption = 0
) -> None:
    """Compare the outputs and tokens of a model folder, of text or of images, with transformers', which must be
    installed."""
    set_environment(threads)
    from llm_quest.hub.verify import compare_with_transformers

    print_result(compare_with_transformers(folder), json)


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, or one of its checkpoints (RUN@best, RUN@last, RUN@120); for a GGUF file also the "
            "folder of a model or an adapter."
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER|FILE.gguf", help="Where to write the Hugging Face layout, or one GGUF file."),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 (default: float32; in a GGUF file that of the weights)."),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Of a GGUF file: q8_0 or q4_0.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files in the folder.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a model with an adapter: the whole model, with the adapter merged.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a model with an adapter: the adapter alone, for PEFT or llama.cpp.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Export a model as a folder that transformers and vLLM load, or as a GGUF file for llama.cpp."""
    from llm_quest.cli.export import export_run

    report = export_run(run, folder, dtype=dtype, overwrite=overwrite, merged=merge, adapter=adapter, quantize=quantize)
    print_result(report, json)


@app.command()
def consolidate(
    run: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, or one of its checkpoints.")],
    json: JsonOption = False,
) -> None:
    """Make the checkpoints whole that the processes of an FSDP2 run wrote in shards."""
    from llm_quest.cli.export import consolidate_run

    print_result(consolidate_run(run), json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run folder, or several to compare.")],
    out: Annotated[Path | None, typer.Option(help="The output file (default: report.html in the first run).")] = None,
    json: JsonOption = False,
) -> None:
    """Write an HTML report: curves, samples, data, cost, environment."""
    from llm_quest.report.page import write_report

    file = write_report(runs, out=out)
    print_json({"report": str(file)}) if json else print_lines([str(file)])


@app.command()
def papers(json: JsonOption = False) -> None:
    """List the papers whose claims are tested here, with their verdicts."""
    set_environment(0)
    from llm_quest.cli.papers import list_papers

    print_result(list_papers(), json)


@app.command()
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


@app.command()
def doctor(
    renew: Annotated[bool, typer.Option("--renew", help="Measure the machine's profile anew.")] = False,
    json: JsonOption = False,
    threads: ThreadsOption = 0,
) -> None:
    """Describe this machine: python, torch, cores, memory, devices, measured rates and what `auto` makes of them, with
    warnings."""
    set_environment(threads)
    from llm_quest.cli.doctor import examine_machine

    print_result(examine_machine(renew=renew, log=status_printer(json)), json)


@app.command()
def data(
    source: Annotated[
        str | None,
        typer.Argument(help="builtin[:parts], a file, a folder, hf:DATASET, FILE.py:FUNCTION; without it: a list."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Read its rows as this recipe does: sft, dpo, ...")] = None,
    forms: Annotated[bool, typer.Option("--forms", help="List the forms of rows that each recipe reads.")] = False,
    column: Annotated[str, typer.Option(help="The key of the text in a JSONL line.")] = "text",
    separator: Annotated[str | None, typer.Option(help="The separator between documents in a text file.")] = None,
    json: JsonOption = False,
) -> None:
    """Summarise a data source: documents, bytes, and what was dropped and why."""
    from llm_quest.cli.data import RowFormList, list_builtin_corpora, load_source, summarize_rows

    if forms:
        print_result(RowFormList(), json)
    elif source is None:
        print_result(list_builtin_corpora(), json)
    elif recipe is not None:
        print_result(summarize_rows(source, recipe), json)
    else:
        print_result(load_source(source, column=column, separator=separator), json)


def set_environment(threads: int, offline: bool = False) -> None:
    """Set environment variables that torch and huggingface_hub read when they are imported."""
    from llm_quest.machine.hardware import usable_cores

    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if (
        threads or "OMP_NUM_THREADS" not in os.environ
    ):  # torch counts physical cores only, which leaves half of a small machine idle
        os.environ["OMP_NUM_THREADS"] = str(threads or usable_cores())
