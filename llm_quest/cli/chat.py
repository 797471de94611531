"""`quest generate` and `quest chat`: text is printed while it is generated, without control characters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Protocol

import torch
from torch import nn

from llm_quest.cli.generation_options import CHAT_DEFAULTS, GENERATE_DEFAULTS, GenerationOptions
from llm_quest.cli.output import clean_text, print_json
from llm_quest.contracts import LogFn
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.template_sandbox import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.beam_search import beam_search
from llm_quest.generation.generate import generate_completions, stream_tokens
from llm_quest.generation.stopping import Completion, StoppingCriteria
from llm_quest.hub.load_save import load_model_and_tokenizer
from llm_quest.layers.linear import set_few_row_products
from llm_quest.layers.quantized import QuantizedMatrix
from llm_quest.machine.choices import choose_few_rows, choose_weight_kernel, slow_bf16_warning
from llm_quest.machine.profile import MachineProfile, load_compiler, load_profile, load_weight_rates
from llm_quest.models.build import DTYPES
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.auto import resolve_precision
from llm_quest.train.parallel import resolve_device


def load_text_model(
    name_or_path: str, device: str, dtype: str, log: LogFn, *, vision: bool = False
) -> tuple[Decoder, Tokenizer]:
    """The model and tokenizer of a command. dtype auto: bfloat16 on a GPU that has it, else float32. vision: with the
    part that reads images, where there is one."""
    torch_device = resolve_device(device)
    kind = resolve_dtype(dtype, torch_device)
    if torch_device.type == "cpu":
        use_fast_products(kind, log)
    model, tokenizer = load_model_and_tokenizer(name_or_path, device=torch_device, dtype=kind, vision=vision)
    if torch_device.type == "cpu" and (kinds := quantized_kinds(model)):
        use_fast_weights(model, kinds, load_weight_rates(log), log)
    size = sum(p.numel() for p in model.parameters())
    log(f"{name_or_path}: {model.spec.family}, {size:,} parameters, {kind} on {torch_device}")
    return model, tokenizer


def use_fast_products(dtype: str, log: LogFn) -> None:
    """Set the form of products with few rows by the machine's profile, and warn of a dtype that is slow here."""
    profile = load_profile(log)
    set_few_row_products(choose_few_rows(profile).value)
    if dtype == "bfloat16" and (warning := slow_bf16_warning(profile)):
        log(f"warning: {warning}")


def quantized_kinds(model: nn.Module) -> list[str]:
    """The formats of the model's quantized matrices."""
    return sorted({module.form.name for module in model.modules() if isinstance(module, QuantizedMatrix)})


def use_fast_weights(model: nn.Module, kinds: Sequence[str], profile: MachineProfile, log: LogFn) -> None:
    """Where the profile says that a format is slower than float32 here, multiply with floats, and say so."""
    for kind in kinds:
        choice = choose_weight_kernel(profile, kind)
        if choice.value:
            continue
        for module in model.modules():
            if isinstance(module, QuantizedMatrix) and module.form.name == kind and module.q.dim() == 2:
                module.keep_floats()
        log(f"warning: {choice.reason} on this machine: they are dequantized, and take float32's memory")


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The dtype that `--dtype` names; UsageError for a name that is not known."""
    if dtype == "auto":
        fast = device.type == "cuda" and resolve_precision("auto", device).value == "bf16"
        return "bfloat16" if fast else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; give auto, {', '.join(DTYPES)}")
    return dtype


def generate_text(
    name_or_path: str, prompt: str, options: GenerationOptions, *, device: str, dtype: str, as_json: bool, log: LogFn
) -> None:
    """Print the continuation of a prompt as it is generated; with as_json, one JSON document at the end."""
    options.sampling  # noqa: B018  (mistakes are reported before a model is loaded)
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    options = options.with_advice(model.generation_config, GENERATE_DEFAULTS, log)
    tokens = options.encode_prompts(tokenizer, [prompt])[0]
    require_room_in_context(tokens, model, options.slide)
    until = options.stopping_criteria(model, tokenizer)
    if options.compile:
        require_compiler(next(model.parameters()).device, log)
    if as_json or options.beams:
        done = complete_prompts(model, [tokens], options, until)[0]
    if as_json:
        print_json({"prompt": prompt, **asdict(done)})
        return
    if not options.chat:
        print_text(prompt)
    pieces = [done.text or ""] if options.beams else stream_text(model, tokens, options, until)
    for piece in pieces:
        print_text(piece)
    print_text("\n")


def complete_prompts(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    stopping_criteria: StoppingCriteria,
    copy_offsets: Sequence[int] | None = None,
) -> list[Completion]:
    """One completion of each prompt: sampled, or the best that beam search finds."""
    if (beams := options.beams) is not None:
        return beam_search(model, prompts, options.sampling, stopping_criteria, beams)
    return generate_completions(
        model, prompts, options.sampling, stopping_criteria,
        seed=options.seed, compile=options.compile, copy_offsets=copy_offsets,
    )  # fmt: skip


def require_compiler(device: torch.device, log: LogFn) -> None:
    """UsageError if there is no C++ compiler, which torch.compile needs on the CPU."""
    if device.type == "cpu" and not (compiler := load_compiler(log)).works:
        raise UsageError(f"--compile needs a C++ compiler that works: {compiler.problem}; or leave --compile out")
    log("compiling: about half a minute before the text begins")


def require_room_in_context(tokens: list[int], model: Decoder, slide: bool) -> None:
    """UsageError for a prompt that fills the context."""
    context = model.config.max_position_embeddings
    if len(tokens) >= context and not slide:
        raise UsageError(f"the prompt has {len(tokens)} tokens, the context is {context}; shorten it, or --slide")


def stream_text(
    model: Decoder, tokens: list[int], options: GenerationOptions, stopping_criteria: StoppingCriteria
) -> Iterator[str]:
    """Yield the text in pieces, each as soon as its bytes are complete."""
    for made in stream_tokens(
        model, [tokens], options.sampling, stopping_criteria, seed=options.seed, compile=options.compile
    ):
        yield made.text


def print_text(text: str) -> None:
    """Write text to stdout at once, without control characters."""
    sys.stdout.write(clean_text(text))
    sys.stdout.flush()


def run_chat(
    name_or_path: str,
    options: GenerationOptions,
    *,
    system: str | None,
    template: bool,
    device: str,
    dtype: str,
    log: LogFn,
) -> None:
    """Read lines from the user and answer each, in one conversation."""
    options.sampling  # noqa: B018  (mistakes are reported before a model is loaded)
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    options = options.with_advice(model.generation_config, CHAT_DEFAULTS, log)
    history = make_conversation(tokenizer, system, template, log)
    log("/reset starts a new conversation, /quit or Ctrl-D leaves; Ctrl-C stops an answer")
    commands = {"/reset": lambda rest: history.reset()}
    converse(history, lambda: model, options, options.stopping_criteria(model, tokenizer), commands, log)


class Conversation(Protocol):
    """A conversation: messages and replies are added, and all of it is the next prompt."""

    def add_user_message(self, line: str) -> None: ...

    def add_reply(self, reply: str) -> None: ...

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        """The ids of the prompt, at most `room` tokens."""


def converse(
    history: Conversation,
    decoder: Callable[[], Decoder],
    options: GenerationOptions,
    stopping_criteria: StoppingCriteria,
    commands: Mapping[str, Callable[[str], None]],
    log: LogFn,
) -> None:
    """Read lines from the user and answer each. decoder: what answers the next message. commands: first word of a line
    -> what is done with the rest of it."""
    turn = 0
    while (line := read_user_line()) is not None:
        word, _, rest = line.partition(" ")
        if word in commands:
            commands[word](rest.strip())
        elif line:
            turn += 1
            history.add_user_message(line)
            model = decoder()
            context = model.config.max_position_embeddings
            tokens = history.prompt_tokens(context - min(options.tokens, context // 2), log)
            seeded = replace(options, seed=options.seed + turn)
            history.add_reply(stream_answer(model, tokens, seeded, stopping_criteria))


def read_user_line() -> str | None:
    """The next line of input; None at /quit or the end of input."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line


def stream_answer(
    model: Decoder, tokens: list[int], options: GenerationOptions, stopping_criteria: StoppingCriteria
) -> str:
    """Print the answer and return it. Ctrl-C stops it early."""
    answer = ""
    try:
        for piece in stream_text(model, tokens, options, stopping_criteria):
            print_text(piece)
            answer += piece
    except KeyboardInterrupt:
        print_text(" ...")
    print_text("\n")
    return answer


def make_conversation(
    tokenizer: Tokenizer, system: str | None, template: bool, log: LogFn
) -> TemplatedConversation | PlainConversation:
    """A conversation in the folder's chat template if there is one and `template` is set, else in plain text."""
    if template and tokenizer.chat_template:
        log("using the chat template of this folder")
        return TemplatedConversation(tokenizer, system)
    log(
        "plain continuation: the model continues the text of the conversation (no chat template"
        + (" is used)" if not template else " in this folder)")
    )
    return PlainConversation(tokenizer, system)


class PlainConversation:
    """A conversation as one plain text."""

    def __init__(self, tokenizer: Tokenizer, system: str | None):
        self.tokenizer, self.system = tokenizer, system
        self.reset()

    def reset(self) -> None:
        self.text = f"{self.system}\n" if self.system else ""

    def add_user_message(self, line: str) -> None:
        self.text += line

    def add_reply(self, reply: str) -> None:
        self.text += reply + "\n"

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        """The end of the text, at most `room` tokens."""
        return (self.tokenizer.encode(self.text) or [self.tokenizer.start_token_id])[-room:]


class TemplatedConversation:
    """A conversation as messages with roles, rendered with the folder's chat template."""

    def __init__(self, tokenizer: Tokenizer, system: str | None):
        self.chat, self.system = ChatTemplate(tokenizer), system
        self.reset()

    def reset(self) -> None:
        self.messages: Messages = [{"role": "system", "content": self.system}] if self.system else []

    def add_user_message(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})

    def add_reply(self, reply: str) -> None:
        content = self.chat.message_of_reply(self.messages, reply)
        self.messages.append({"role": "assistant", "content": content})

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        """The prompt. If it is longer than `room`, the oldest question and answer are dropped."""
        tokens = self.chat.encode_prompt(self.messages)
        while len(tokens) > room:
            first = 1 if self.system else 0
            if len(self.messages) - first < 3:
                raise UsageError(
                    f"this message makes a prompt of {len(tokens)} tokens and there is room for {room}; shorten it"
                )
            del self.messages[first : first + 2]
            log("(the oldest question and answer no longer fit in the context and are dropped)")
            tokens = self.chat.encode_prompt(self.messages)
        return tokens
