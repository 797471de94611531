"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
        metavar="MODEL", help="A Hugging Face folder or hub id, or a run: RUN, RUN@best, RUN@good, RUN@120."
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
TokensOption = Annotated[
    int, typer.Option("--tokens", "--max-new-tokens", "-n", min=1, help="Maximum number of new tokens.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="0: greedy decoding. Default: generation_config.json's, else 0.8 (chat: 0.7)."),
]
TopKOption = Annotated[int | None, typer.Option(min=1, help="Sample from the k most probable tokens.")]
TopPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from the most probable tokens that together reach p.")
]
MinPOption = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from tokens at least p times as probable as the first.")
]
RepetitionPenaltyOption = Annotated[
    float | None, typer.Option(min=0.01, help="Above 1: tokens that occurred become less probable.")
]
PresencePenaltyOption = Annotated[float, typer.Option(help="Subtracted from the logits of generated tokens.")]
FrequencyPenaltyOption = Annotated[float, typer.Option(help="The same, times how often each was generated.")]
NoRepeatNgramSizeOption = Annotated[int | None, typer.Option(min=1, help="No sequence of so many tokens occurs twice.")]
MinNewTokensOption = Annotated[int, typer.Option(min=0, help="No end of text before so many new tokens.")]
LogitBiasOption = Annotated[
    list[str] | None, typer.Option(metavar="ID=BIAS", help="Added to the logit of a token id; may be repeated.")
]
BeamsOption = Annotated[int, typer.Option(min=1, help="Above 1: beam search with so many beams.")]
LengthPenaltyOption = Annotated[float, typer.Option(help="With --beams: above 0 favors longer texts.")]
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
        "--tokens",
        "--max-new-tokens",
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
    typer.Option(
        "--chat/--no-chat", help="With --task, --harness: ask through the chat template (as a run was trained)."
    ),
]
EvalSystemOption = Annotated[str | None, typer.Option(help="With --task --chat, --harness: a system message.")]
EvalRefineOption = Annotated[
    int | None, typer.Option(min=1, help="With --task: rounds in which the model criticizes and revises its answer.")
]
EvalRefinePromptsOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="With --refine: YAML with feedback, refine, stop.")
]
EvalFewshotOption = Annotated[int | None, typer.Option(min=0, help="With --harness: examples before each question.")]
EvalMultiturnOption = Annotated[
    bool | None,
    typer.Option(
        "--fewshot-as-multiturn/--fewshot-as-text",
        help="With --harness --chat: examples as turns (default) or as text.",
    ),
]
EvalPartOption = Annotated[str | None, typer.Option(help="With --task: train, validation, test (test).")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the model: slow to start, then faster.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's: learning_rate=1e-3."),
]
