"""From prompts to texts. `generate` is the door for everybody; `stream` the same as an iterator that yields tokens as
they are made; both are one loop: draw, see which rows have ended, feed the others."""

from __future__ import annotations

import itertools
import operator
import reprlib
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.decoding import Decoding
from llm_quest.generation.pace import Tally
from llm_quest.generation.sampling import Sampling, row_uniforms
from llm_quest.generation.speculative import Draft, Speculation, drafter_of, speculate
from llm_quest.generation.text import Streams
from llm_quest.generation.until import Completion, Made, Row, Until
from llm_quest.models.decoder import Decoder

Prompts = Sequence[Sequence[int]] | Tensor


def generate(
    model: Decoder,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    n: int = 1,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
    stop: str | Sequence[str | Sequence[int]] = (),
    tokenizer: Streams | None = None,
    beyond: Literal["stop", "slide"] = "stop",
    compile: bool = False,
    draft: Draft | None = None,
) -> list[Completion]:
    """`n` completions of each prompt (a list of token ids; lengths may differ), those of one prompt side by side.

    temperature ... repetition_penalty: see `Sampling`. seed: with it, the prompt and its number among equal prompts,
    a row's text is decided, whoever its neighbours are. eos: ends a row; None: the model's own; (): nothing does.
    stop, beyond: see `Until`. compile: compiled passes, with a draft too (slow once, then faster).
    draft: a smaller model of the same vocabulary, "mtp" or "ngram": speculative decoding, the same law in fewer passes
    (greedy: the same text)."""
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    until = Until(
        max_new_tokens=max_new_tokens,
        eos=eos_of(model) if eos is None else as_tuple(eos),
        stop=(stop,) if isinstance(stop, str) else tuple(one if isinstance(one, str) else tuple(one) for one in stop),
        tokenizer=tokenizer,
        beyond=beyond,
    )
    return complete(model, prompts, sampling, until, n=n, seed=seed, compile=compile, draft=draft)


def complete(
    model: Decoder,
    prompts: Prompts,
    sampling: Sampling,
    until: Until,
    *,
    n: int = 1,
    seed: int = 0,
    compile: bool = False,
    draft: Draft | None = None,
    tally: Tally | None = None,
    which: Sequence[int] | None = None,
) -> list[Completion]:
    """`generate` with its choices as the two objects they are. tally: counts what speculation did. which: of prompts
    that are a part of a longer list, how many equal ones came before each there; it gets the text it has there."""
    rows: dict[int, list[Made]] = {}
    choices = (model, prompts, sampling, until)
    for made in stream(*choices, n=n, seed=seed, compile=compile, draft=draft, tally=tally, which=which):
        rows.setdefault(made.row, []).append(made)
    return [completion(rows[number], with_text=until.tokenizer is not None) for number in sorted(rows)]


def completion(row: Sequence[Made], *, with_text: bool) -> Completion:
    finished = row[-1].finished
    assert finished is not None, "a row is complete when its last token says why it ended"
    text = "".join(made.text for made in row) if with_text else None
    return Completion([made.token for made in row], [made.logprob for made in row], finished, text)


def stream(
    model: Decoder,
    prompts: Prompts,
    sampling: Sampling,
    until: Until,
    *,
    n: int = 1,
    seed: int = 0,
    compile: bool = False,
    draft: Draft | None = None,
    tally: Tally | None = None,
    which: Sequence[int] | None = None,
) -> Iterator[Made]:
    """The tokens of all rows as they are made, step by step; row r is sample r % n of prompt r // n. Mistakes raise
    here, not at the first token."""
    if model.training:
        raise UsageError("the model is in training mode, where dropout would disturb the text: call model.eval() first")
    if n < 1:
        raise UsageError(f"n is {n}: ask for at least 1 completion of each prompt")
    context = model.config.context
    read = checked(prompts, model.config.vocab, None if until.beyond == "slide" else context)
    uniforms = row_uniforms(read, n, until.max_new_tokens, seed, which).to(next(model.parameters()).device)
    if not read:
        return iter(())
    rows = [Row(number, read[number // n], until, context) for number in range(len(read) * n)]
    if draft is None:
        return write(Decoding(model, sampling, uniforms, compile=compile), rows, n)
    apart = [
        row_uniforms(read, n, until.max_new_tokens, (seed, purpose), which).to(uniforms.device)
        for purpose in ("guess", "accept")
    ]
    drafter = drafter_of(draft, model, sampling, compile=compile)
    numbers, tally = (apart[0], apart[1], uniforms), Tally() if tally is None else tally
    return speculate(Speculation(model, drafter, sampling, numbers, tally, compile=compile), rows, n)


def write(decoding: Decoding, rows: Sequence[Row], n: int) -> Iterator[Made]:
    """The loop. n rows side by side share a prompt."""
    live = {row.number: row for row in rows}
    for row in rows:
        row.slide()
    fill(decoding, rows, n)
    for at in itertools.count():
        for number, token, logprob in decoding.draw(at):
            if number in live:
                made = live[number].take(token, logprob)
                if made.finished:
                    del live[number]
                yield made
        if not live:
            return
        decoding.keep(live)
        seated = [rows[number] for number in decoding.seats]
        slid = [row.slide() for row in seated]
        if any(slid):
            fill(decoding, seated, 1)
            decoding.keep(live)
        else:
            decoding.feed()


def fill(decoding: Decoding, rows: Sequence[Row], n: int) -> None:
    """Read what the rows see now, with room for all that may follow."""
    room = max(min(row.context, len(row.window) + row.tokens_left) for row in rows)
    decoding.fill([row.window for row in rows[::n]], capacity=room)
    decoding.remember([row.history for row in rows])


def checked(prompts: Prompts, vocab: int, room: int | None) -> list[list[int]]:
    """Plain lists of token ids, every one of them fit for the model. room: the longest context that leaves space for
    a token."""
    try:
        listed = prompts.tolist() if isinstance(prompts, Tensor) else prompts
        read = [[operator.index(token) for token in prompt] for prompt in listed]
    except TypeError:
        raise UsageError(
            f"prompts are lists of token ids, like [[1, 2, 3], [4]]; got {reprlib.repr(prompts)}: encode text first"
        ) from None
    for number, prompt in enumerate(read):
        if not prompt:
            raise UsageError(f"prompt {number} is empty: begin it with a token, such as the one that starts a document")
        wrong = next((token for token in prompt if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UsageError(
                f"prompt {number} holds token {wrong}, but the model knows 0 to {vocab - 1}: is it its tokenizer?"
            )
        if room is not None and len(prompt) >= room:
            raise UsageError(
                f"prompt {number} has {len(prompt)} tokens, which leaves no room in the model's context of {room}: "
                "shorten it, or let the window slide (beyond='slide')"
            )
    return read


def eos_of(model: Decoder) -> tuple[int, ...]:
    """What the model's own files say ends a text; nothing, where they say nothing."""
    return () if model.generation is None else tuple(model.generation.eos)


def as_tuple(eos: int | Sequence[int]) -> tuple[int, ...]:
    return (eos,) if isinstance(eos, int) else tuple(eos)
