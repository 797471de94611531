"""`quest generate --draft`: decodes speculatively, and measures the speed against plain decoding."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from llm_quest.cli.chat import (
    load_for_generation,
    load_text_model,
    print_text,
    require_compiler,
    require_room_in_context,
)
from llm_quest.cli.generation_options import GenerationOptions
from llm_quest.cli.output import clean_text, print_json
from llm_quest.contracts import LogFn
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate_completions, stream_tokens
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.speculative.decoder import DraftSource
from llm_quest.generation.speculative.draft_length import SpeculationStats
from llm_quest.generation.stopping import Completion, StoppingCriteria
from llm_quest.models.decoder import Decoder

BASELINE_TOKENS = 48
"""Tokens of plain decoding that are timed for comparison."""


@dataclass(frozen=True)
class SpeculationReport:
    """The gain of speculative decoding: the acceptance rate of drafted tokens, tokens per forward pass of the model,
    and the speed against plain decoding of the first tokens in the same process."""

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


def generate_speculative(
    name_or_path: str,
    draft_name: str,
    prompt: str,
    options: GenerationOptions,
    *,
    device: str,
    dtype: str,
    as_json: bool,
    log: LogFn,
) -> None:
    """Print the continuation, then the speed-up; with as_json, one JSON document at the end. With options.compile the
    text is generated once before it is timed, so that the speeds do not include compilation."""
    if options.num_beams > 1:
        raise UsageError("--beams does not work with --draft: leave one of them out")
    model, tokenizer, options = load_for_generation(name_or_path, options, device=device, dtype=dtype, log=log)
    draft = load_draft(draft_name, model, tokenizer, name_or_path, device, dtype, log)
    tokens = options.encode_prompts(tokenizer, [prompt])[0]
    require_room_in_context(tokens, model, options.slide)
    sampling, until, stats = options.sampling, options.stopping_criteria(model, tokenizer), SpeculationStats()
    if options.compile:
        require_compiler(next(model.parameters()).device, log)
        generate_completions(model, [tokens], sampling, until, seed=options.seed, compile=True, draft=draft)
    plain = measure_baseline_speed(model, tokens, sampling, until, options)
    started = time.perf_counter()
    if as_json:
        done = generate_completions(
            model, [tokens], sampling, until, seed=options.seed, compile=options.compile, draft=draft, stats=stats
        )[0]
        report = make_speculation_report(stats, len(done.tokens), time.perf_counter() - started, plain)
        print_json(speculation_json(prompt, done, report))
        return
    if not options.chat:
        print_text(prompt)
    written = 0
    for token in stream_tokens(
        model, [tokens], sampling, until, seed=options.seed, compile=options.compile, draft=draft, stats=stats
    ):
        written += 1
        print_text(token.text)
    print_text("\n")
    log(make_speculation_report(stats, written, time.perf_counter() - started, plain).line())


def speculation_json(prompt: str, done: Completion, speculation: SpeculationReport) -> dict[str, Any]:
    return {"prompt": prompt, **asdict(done), "draft": asdict(speculation)}


def load_draft(
    draft_name: str, model: Decoder, tokenizer: Tokenizer, name_or_path: str, device: str, dtype: str, log: LogFn
) -> DraftSource:
    """The draft that --draft names. UsageError for a model with another tokenizer."""
    if draft_name in ("mtp", "ngram"):
        return draft_name
    draft, own = load_text_model(draft_name, device, dtype, log)
    if not same_token_ids(own, tokenizer):
        raise UsageError(
            f"{clean_text(draft_name)} has another tokenizer than {clean_text(name_or_path)}, so its token ids mean "
            "other tokens: take a draft trained with the same tokenizer (tokenizer.load=...), or --draft ngram"
        )
    return draft


def same_token_ids(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids mean the same tokens, as far as both have them; which of them end a text may differ."""
    first, second = (
        {number: token for token, number in each.backend_tokenizer.get_vocab(with_added_tokens=True).items()}
        for each in (one, other)
    )
    return all(second.get(number, token) == token for number, token in first.items())


def measure_baseline_speed(
    model: Decoder,
    tokens: list[int],
    sampling: SamplingParams,
    stopping_criteria: StoppingCriteria,
    options: GenerationOptions,
) -> float:
    """Tokens per second of plain decoding, after a warm-up."""
    few = replace(stopping_criteria, max_new_tokens=min(BASELINE_TOKENS, stopping_criteria.max_new_tokens))
    warm = (
        few if options.compile else replace(stopping_criteria, max_new_tokens=min(4, stopping_criteria.max_new_tokens))
    )
    generate_completions(model, [tokens], sampling, warm, seed=options.seed, compile=options.compile)
    started = time.perf_counter()
    done = generate_completions(model, [tokens], sampling, few, seed=options.seed, compile=options.compile)[0]
    return len(done.tokens) / (time.perf_counter() - started)


def make_speculation_report(stats: SpeculationStats, written: int, seconds: float, plain: float) -> SpeculationReport:
    speed = written / seconds
    return SpeculationReport(stats.acceptance_rate, written / max(stats.num_passes, 1), speed / plain, speed, plain)
