"""`quest generate --draft`: the text of `quest generate` in fewer passes, and what that brought on this machine."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from llm_quest.cli.screen import clean, show_json
from llm_quest.cli.talk import Manner, Say, fits, opened, put, require_compiler
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.generate import complete, stream
from llm_quest.generation.pace import Tally
from llm_quest.generation.sampling import Sampling
from llm_quest.generation.speculative import Draft
from llm_quest.generation.until import Completion, Until
from llm_quest.models.decoder import Decoder

PLAIN = 48
"""So many tokens are written plainly, for comparison."""


@dataclass(frozen=True)
class Gain:
    """What speculation brought: acceptance of tested drafts, tokens per pass of the model, and the speed against plain
    decoding of the first tokens in the same process."""

    acceptance: float
    tokens_per_pass: float
    speed_up: float
    tokens_per_second: float
    plain_tokens_per_second: float

    def line(self) -> str:
        return (
            f"drafts accepted {self.acceptance:.0%}, {self.tokens_per_pass:.2f} tokens per pass of the model, "
            f"{self.speed_up:.2f} x plain decoding ({self.tokens_per_second:.1f} against "
            f"{self.plain_tokens_per_second:.1f} tokens/s)"
        )


def go_on_drafting(
    where: str, drafted: str, prompt: str, manner: Manner, *, device: str, dtype: str, as_json: bool, say: Say
) -> None:
    """Print the continuation, then what the draft brought; with as_json everything at its end. Compiled, the text is
    made once unseen, so that no compiling is in the speeds."""
    model, tokenizer = opened(where, device, dtype, say)
    draft = drafter(drafted, model, tokenizer, where, device, dtype, say)
    tokens = tokenizer.encode(prompt) or [tokenizer.start_id]
    fits(tokens, model, manner.slide)
    sampling, until, tally = manner.sampling, manner.until(model, tokenizer), Tally()
    if manner.compile:
        require_compiler(next(model.parameters()).device, say)
        complete(model, [tokens], sampling, until, seed=manner.seed, compile=True, draft=draft)
    plain = plain_speed(model, tokens, sampling, until, manner)
    started = time.perf_counter()
    if as_json:
        done = complete(
            model, [tokens], sampling, until, seed=manner.seed, compile=manner.compile, draft=draft, tally=tally
        )[0]
        gained = gain(tally, len(done.tokens), time.perf_counter() - started, plain)
        show_json(report(prompt, done, gained))
        return
    put(prompt)
    written = 0
    for made in stream(
        model, [tokens], sampling, until, seed=manner.seed, compile=manner.compile, draft=draft, tally=tally
    ):
        written += 1
        put(made.text)
    put("\n")
    say(gain(tally, written, time.perf_counter() - started, plain).line())


def report(prompt: str, done: Completion, gained: Gain) -> dict[str, Any]:
    return {"prompt": prompt, **asdict(done), "draft": asdict(gained)}


def drafter(drafted: str, model: Decoder, tokenizer: Tokenizer, where: str, device: str, dtype: str, say: Say) -> Draft:
    """What --draft names. A model must read the same tokens."""
    if drafted in ("mtp", "ngram"):
        return drafted
    draft, own = opened(drafted, device, dtype, say)
    if own.hash != tokenizer.hash:
        raise UsageError(
            f"{clean(drafted)} has another tokenizer than {clean(where)}, so its guesses mean other tokens: take a "
            "draft trained with the same one (tokenizer.load=...), or --draft ngram"
        )
    return draft


def plain_speed(model: Decoder, tokens: list[int], sampling: Sampling, until: Until, manner: Manner) -> float:
    """Tokens per second of plain decoding, after a few to warm up."""
    few = replace(until, max_new_tokens=min(PLAIN, until.max_new_tokens))
    warm = few if manner.compile else replace(until, max_new_tokens=min(4, until.max_new_tokens))
    complete(model, [tokens], sampling, warm, seed=manner.seed, compile=manner.compile)
    started = time.perf_counter()
    done = complete(model, [tokens], sampling, few, seed=manner.seed, compile=manner.compile)[0]
    return len(done.tokens) / (time.perf_counter() - started)


def gain(tally: Tally, written: int, seconds: float, plain: float) -> Gain:
    speed = written / seconds
    return Gain(tally.acceptance, written / max(tally.passes, 1), speed / plain, speed, plain)
