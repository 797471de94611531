"""`quest generate` and `quest chat`: text that appears while it is made, cleaned before it reaches the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from llm_quest.cli.screen import clean, show_json
from llm_quest.data.chat import Chat
from llm_quest.data.template import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.generate import complete, stream
from llm_quest.generation.sampling import Sampling
from llm_quest.generation.until import Until
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.build import DTYPES
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.choices import compiler, precision
from llm_quest.techniques.score_head import score_head
from llm_quest.train.parallel import pick_device

Say = Callable[[str], None]


@dataclass(frozen=True)
class Manner:
    """How to write: at most so many tokens, drawn so, ending there. compile: by compiled passes, which take a while to
    make and then are faster."""

    tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    stop: tuple[str, ...]
    slide: bool
    seed: int
    compile: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    def until(self, model: Decoder, tokenizer: Tokenizer) -> Until:
        eos = {*(model.generation.eos if model.generation else ()), *tokenizer.eos_ids}
        beyond: Literal["stop", "slide"] = "slide" if self.slide else "stop"
        return Until(
            max_new_tokens=self.tokens, eos=tuple(sorted(eos)), stop=self.stop, tokenizer=tokenizer, beyond=beyond
        )


def opened(where: str, device: str, dtype: str, say: Say) -> tuple[Decoder, Tokenizer]:
    """A model with its tokenizer. dtype auto: bfloat16 on a GPU that has it, else float32."""
    place = pick_device(device)
    kind = dtype
    if dtype == "auto":
        kind = "bfloat16" if place.type == "cuda" and precision("auto", place).value == "bf16" else "float32"
    if kind not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; give auto, {', '.join(DTYPES)}")
    model, tokenizer = load(where, device=place, dtype=kind), load_tokenizer(where)
    if (head := score_head(model)) is not None:
        raise UsageError(f"{where} gives {head.outputs} numbers and no text: it is a reward model or a classifier")
    say(f"{where}: {model.card.page}, {sum(p.numel() for p in model.parameters()):,} parameters, {kind} on {place}")
    return model, tokenizer


def go_on(where: str, prompt: str, manner: Manner, *, device: str, dtype: str, as_json: bool, say: Say) -> None:
    """Print the continuation of a prompt; with as_json everything at its end."""
    sampling = manner.sampling
    model, tokenizer = opened(where, device, dtype, say)
    tokens = tokenizer.encode(prompt) or [tokenizer.start_id]
    fits(tokens, model, manner.slide)
    until = manner.until(model, tokenizer)
    if manner.compile:
        require_compiler(next(model.parameters()).device, say)
    if as_json:
        done = complete(model, [tokens], sampling, until, seed=manner.seed, compile=manner.compile)[0]
        show_json({"prompt": prompt, **asdict(done)})
        return
    put(prompt)
    for piece in written(model, tokens, sampling, until, manner.seed, compile=manner.compile):
        put(piece)
    put("\n")


def require_compiler(device: torch.device, say: Say) -> None:
    """UsageError where nothing is there that could compile for the CPU."""
    if device.type == "cpu" and not compiler():
        raise UsageError("--compile needs a C++ compiler, and none was found: install g++ or clang, or leave it out")
    say("compiling: half a minute or so before the text begins")


def fits(tokens: list[int], model: Decoder, slide: bool) -> None:
    """UsageError for a prompt that leaves no room for an answer."""
    if len(tokens) >= model.config.context and not slide:
        raise UsageError(
            f"the prompt has {len(tokens)} tokens, the context is {model.config.context}; shorten it, or --slide"
        )


def written(
    model: Decoder, tokens: list[int], sampling: Sampling, until: Until, seed: int, *, compile: bool = False
) -> Iterator[str]:
    """The pieces of text as they become certain."""
    for made in stream(model, [tokens], sampling, until, seed=seed, compile=compile):
        yield made.text


def put(text: str) -> None:
    """Text on stdout at once, without what could command the terminal."""
    sys.stdout.write(clean(text))
    sys.stdout.flush()


def converse(
    where: str, manner: Manner, *, system: str | None, template: bool, device: str, dtype: str, say: Say
) -> None:
    """The conversation: read a line, answer it, remember both."""
    sampling = manner.sampling
    model, tokenizer = opened(where, device, dtype, say)
    talk = conversation(tokenizer, system, template, say)
    say("/reset forgets the conversation, /quit or Ctrl-D leaves; Ctrl-C stops an answer")
    until = manner.until(model, tokenizer)
    turn = 0
    while (line := asked()) is not None:
        if line == "/reset":
            talk.forget()
        elif line:
            turn += 1
            talk.hear(line)
            tokens = talk.tokens(model.config.context - min(manner.tokens, model.config.context // 2), say)
            talk.remember(answer(model, tokens, sampling, until, manner.seed + turn))


def asked() -> str | None:
    """The next line a person types; None when they leave."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line in ("/quit", "/exit") else line


def answer(model: Decoder, tokens: list[int], sampling: Sampling, until: Until, seed: int) -> str:
    """Print the answer and return it; Ctrl-C ends it early."""
    said = ""
    try:
        for piece in written(model, tokens, sampling, until, seed):
            put(piece)
            said += piece
    except KeyboardInterrupt:
        put(" ...")
    put("\n")
    return said


def conversation(tokenizer: Tokenizer, system: str | None, template: bool, say: Say) -> Templated | Plain:
    """By the folder's template if there is one and it is wanted; else plain continuation, and it is said which."""
    if template and tokenizer.chat_template:
        say("this folder has a chat template: messages are put into it")
        return Templated(tokenizer, system)
    say(
        "plain continuation: the model goes on from everything said so far (no chat template"
        + (" is used)" if not template else " here)")
    )
    return Plain(tokenizer, system)


class Plain:
    """One growing text."""

    def __init__(self, tokenizer: Tokenizer, system: str | None):
        self.tokenizer, self.system = tokenizer, system
        self.forget()

    def forget(self) -> None:
        self.text = f"{self.system}\n" if self.system else ""

    def hear(self, line: str) -> None:
        self.text += line

    def remember(self, said: str) -> None:
        self.text += said + "\n"

    def tokens(self, room: int, say: Say) -> list[int]:
        """The end of the text, as much as there is room for."""
        return (self.tokenizer.encode(self.text) or [self.tokenizer.start_id])[-room:]


class Templated:
    """Messages with roles, laid out by the folder's template."""

    def __init__(self, tokenizer: Tokenizer, system: str | None):
        self.chat, self.system = Chat(tokenizer), system
        self.forget()

    def forget(self) -> None:
        self.messages: Messages = [{"role": "system", "content": self.system}] if self.system else []

    def hear(self, line: str) -> None:
        self.messages.append({"role": "user", "content": line})

    def remember(self, said: str) -> None:
        self.messages.append({"role": "assistant", "content": said})

    def tokens(self, room: int, say: Say) -> list[int]:
        """The prompt; the oldest question and answer are forgotten where it is too long."""
        tokens = self.chat.prompt(self.messages)
        while len(tokens) > room:
            first = 1 if self.system else 0
            if len(self.messages) - first < 3:
                raise UsageError(
                    f"this message makes a prompt of {len(tokens)} tokens and there is room for {room}; shorten it"
                )
            del self.messages[first : first + 2]
            say("(the oldest question and its answer no longer fit and are forgotten)")
            tokens = self.chat.prompt(self.messages)
        return tokens
