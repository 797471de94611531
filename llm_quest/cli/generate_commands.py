"""Commands that run a model: generate, chat, classify, score, evaluate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_quest.cli.eval_options import check_eval_options
from llm_quest.cli.generation_options import GenerationOptions, parse_logit_bias, parse_template_kwargs
from llm_quest.cli.options import (
    AnswerOption,
    BatchOption,
    BeamsOption,
    ChatOption,
    CompileOption,
    DeviceOption,
    DraftOption,
    DtypeOption,
    EvalBestOfOption,
    EvalChatOption,
    EvalDataOption,
    EvalFewshotOption,
    EvalHarnessOption,
    EvalMultiturnOption,
    EvalPartOption,
    EvalProblemsOption,
    EvalRefineOption,
    EvalRefinePromptsOption,
    EvalRewardModelOption,
    EvalSamplesOption,
    EvalSystemOption,
    EvalTaskOption,
    EvalTemperatureOption,
    EvalTokensOption,
    EvalVoteOption,
    FrequencyPenaltyOption,
    ImageOption,
    JsonOption,
    LengthPenaltyOption,
    LogitBiasOption,
    MinNewTokensOption,
    MinPOption,
    ModelArgument,
    NoRepeatNgramSizeOption,
    OfflineOption,
    PresencePenaltyOption,
    PromptsOption,
    QuietOption,
    RepetitionPenaltyOption,
    SeedOption,
    SlideOption,
    SpecialTokensOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TemplateKwargsOption,
    ThreadsOption,
    TokensOption,
    TopKOption,
    TopPOption,
)
from llm_quest.cli.output import print_result, show_progress, status_printer
from llm_quest.machine.hardware import set_environment


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


def classify(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT|IMAGE", help="The text (- reads stdin), or an image file.")],
    label: Annotated[list[str] | None, typer.Option(help="A class to choose from, for a CLIP; give several.")] = None,
    template: Annotated[
        str | None, typer.Option(help='With --label: the prompt (default: "a photo of a {}.").')
    ] = None,
    json: JsonOption = False,
    device: DeviceOption = "auto",
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Classify a text or an image: the probability of each label. A CLIP is told the labels (zero-shot)."""
    set_environment(threads, offline)
    from llm_quest.cli.classify import classify_input

    print_result(classify_input(model, text, labels=label or (), template=template, device=device), json)


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
    refine: EvalRefineOption = None,
    refine_prompts: EvalRefinePromptsOption = None,
    chat: EvalChatOption = None,
    system: EvalSystemOption = None,
    chat_template_kwargs: TemplateKwargsOption = None,
    fewshot: EvalFewshotOption = None,
    fewshot_as_multiturn: EvalMultiturnOption = None,
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
    interval, mean@k and pass@k, the accuracy of a majority vote, of a reward model's choice, and of answers that the
    model revised itself."""
    set_environment(threads, offline)
    measures = {"--data": data, "--task": task, "--harness": harness}
    given = {
        "--tokens": tokens, "--problems": problems, "--part": part, "--temperature": temperature,
        "--samples": samples, "--vote": vote, "--best-of": best_of, "--reward-model": reward_model, "--refine": refine,
        "--refine-prompts": refine_prompts, "--chat": chat, "--system": system,
        "--chat-template-kwargs": chat_template_kwargs, "--fewshot": fewshot,
        "--fewshot-as-multiturn": fewshot_as_multiturn,
    }  # fmt: skip
    check_eval_options(measures, given)
    with show_progress(quiet):
        from llm_quest.cli.evaluate import EvalContext, evaluate_measure

        context = EvalContext(device, dtype, status_printer(quiet), seed, threads)
        result = evaluate_measure(model, measures, given, context)
    print_result(result, json)
