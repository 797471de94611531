"""Text generation. `generate` returns completions; `stream_tokens` is the same as an iterator over tokens. Both are one
loop: sample, find the rows that ended, feed the others.

Commonly got wrong: row r continues prompt r // n, not r % prompts; a row's random numbers come from its seed and
prompt, not from its place in the batch; a model in training mode is refused, since dropout would change the text; a
prompt as long as the context is refused, since no token can follow it."""

from __future__ import annotations

import itertools
import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from llm_quest.errors import UsageError
from llm_quest.generation.beam_search import BeamSearchParams, beam_search
from llm_quest.generation.decoding import BatchDecoder
from llm_quest.generation.detokenizer import StreamingTokenizer
from llm_quest.generation.logits_processor import LogitsProcessor
from llm_quest.generation.sampling import SamplingParams, row_uniforms
from llm_quest.generation.speculative.decoder import DraftSource, SpeculativeDecoder, make_drafter, speculative_decode
from llm_quest.generation.speculative.draft_length import SpeculationStats
from llm_quest.generation.stopping import Completion, GeneratedSequence, GeneratedToken, StoppingCriteria
from llm_quest.models.decoder import Decoder

TokenPrompts = Sequence[Sequence[int]] | Tensor


def generate(
    model: Decoder,
    prompts: TokenPrompts,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    no_repeat_ngram_size: int | None = None,
    logit_bias: Mapping[int, float] | None = None,
    min_new_tokens: int = 0,
    n: int = 1,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str | Sequence[int]] = (),
    tokenizer: StreamingTokenizer | None = None,
    on_full_context: Literal["stop", "slide"] = "stop",
    compile: bool = False,
    draft: DraftSource | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> list[Completion]:
    """Generate `n` completions of each prompt (token ids; lengths may differ), those of one prompt one after another.

    temperature ... logit_bias: see `SamplingParams`. min_new_tokens: no eos before so many. seed: seed, prompt and its
    number among equal prompts determine the text of a row, whatever else is in the batch. eos_token_id: ends a row;
    None: the model's own; (): nothing does. stop, on_full_context: see `StoppingCriteria`. compile: compiled passes,
    with a draft too (slow at first, then faster). draft: a smaller model of the same vocabulary, "mtp" or "ngram":
    speculative decoding, the same distribution in fewer passes (greedy: the same text). num_beams ... early_stopping:
    above 1 beam, beam search (`BeamSearchParams`), which needs temperature=0 and returns the n best."""
    sampling_params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size, logit_bias=tuple((logit_bias or {}).items()),
    )  # fmt: skip
    stopping_criteria = StoppingCriteria(
        max_new_tokens=max_new_tokens,
        eos_token_ids=model_eos_token_ids(model) if eos_token_id is None else as_token_ids(eos_token_id),
        stop=(stop,) if isinstance(stop, str) else tuple(one if isinstance(one, str) else tuple(one) for one in stop),
        tokenizer=tokenizer,
        on_full_context=on_full_context,
        min_new_tokens=min_new_tokens,
    )
    if num_beams == 1:
        return generate_completions(
            model, prompts, sampling_params, stopping_criteria, n=n, seed=seed, compile=compile, draft=draft
        )
    if draft is not None:
        raise UsageError("beam search works without draft, which guesses one text, not its alternatives: leave it out")
    beams = BeamSearchParams(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
    require_inference_mode(model)
    read = validate_prompts(prompts, model.config.vocab_size, model.config.max_position_embeddings)
    return beam_search(model, read, sampling_params, stopping_criteria, beams, n=n, compile=compile)


def generate_completions(
    model: Decoder,
    prompts: TokenPrompts,
    sampling_params: SamplingParams,
    stopping_criteria: StoppingCriteria,
    *,
    n: int = 1,
    seed: int = 0,
    compile: bool = False,
    draft: DraftSource | None = None,
    stats: SpeculationStats | None = None,
    copy_offsets: Sequence[int] | None = None,
) -> list[Completion]:
    """`generate` with its options as two objects. stats: counts what speculation did. copy_offsets: for prompts that
    are part of a longer list, how many equal ones came before each there; the text is then the one it has there."""
    rows: dict[int, list[GeneratedToken]] = {}
    choices = (model, prompts, sampling_params, stopping_criteria)
    for generated in stream_tokens(
        *choices, n=n, seed=seed, compile=compile, draft=draft, stats=stats, copy_offsets=copy_offsets
    ):
        rows.setdefault(generated.row, []).append(generated)
    return [
        build_completion(rows[number], with_text=stopping_criteria.tokenizer is not None) for number in sorted(rows)
    ]


def build_completion(row: Sequence[GeneratedToken], *, with_text: bool) -> Completion:
    """The completion of a row from its tokens."""
    finished = row[-1].finish_reason
    assert finished is not None, "a row is complete when its last token says why it ended"
    text = "".join(generated.text for generated in row) if with_text else None
    return Completion([generated.token for generated in row], [generated.logprob for generated in row], finished, text)


def stream_tokens(
    model: Decoder,
    prompts: TokenPrompts,
    sampling_params: SamplingParams,
    stopping_criteria: StoppingCriteria,
    *,
    n: int = 1,
    seed: int = 0,
    compile: bool = False,
    draft: DraftSource | None = None,
    stats: SpeculationStats | None = None,
    copy_offsets: Sequence[int] | None = None,
) -> Iterator[GeneratedToken]:
    """Yield the tokens of all rows as they are generated, step by step; row r is sample r % n of prompt r // n. Invalid
    arguments raise here, not at the first token."""
    require_inference_mode(model)
    if n < 1:
        raise UsageError(f"n is {n}: ask for at least 1 completion of each prompt")
    context = model.config.max_position_embeddings
    read = validate_prompts(
        prompts, model.config.vocab_size, None if stopping_criteria.on_full_context == "slide" else context
    )
    uniforms = row_uniforms(read, n, stopping_criteria.max_new_tokens, seed, copy_offsets).to(
        next(model.parameters()).device
    )
    if not read:
        return iter(())
    rows = [GeneratedSequence(number, read[number // n], stopping_criteria, context) for number in range(len(read) * n)]
    processor = LogitsProcessor(sampling_params, stopping_criteria, model.config.vocab_size, uniforms.device)
    if draft is None:
        return decode_rows(BatchDecoder(model, sampling_params, processor, uniforms, compile=compile), rows, n)
    apart = [
        row_uniforms(read, n, stopping_criteria.max_new_tokens, (seed, purpose), copy_offsets).to(uniforms.device)
        for purpose in ("guess", "accept")
    ]
    drafter = make_drafter(draft, model, sampling_params, compile=compile)
    numbers, stats = (apart[0], apart[1], uniforms), SpeculationStats() if stats is None else stats
    return speculative_decode(
        SpeculativeDecoder(model, drafter, sampling_params, processor, numbers, stats, compile=compile), rows, n
    )


def require_inference_mode(model: Decoder) -> None:
    """UsageError for a model in training mode."""
    if model.training:
        raise UsageError("the model is in training mode, where dropout would disturb the text: call model.eval() first")


def decode_rows(decoding: BatchDecoder, rows: Sequence[GeneratedSequence], n: int) -> Iterator[GeneratedToken]:
    """The decoding loop. n consecutive rows share a prompt."""
    active_rows = {row.number: row for row in rows}
    for row in rows:
        row.slide_window()
    prefill_rows(decoding, rows, n)
    for at in itertools.count():
        for number, token, logprob in decoding.sample_tokens(at):
            if number in active_rows:
                generated = active_rows[number].append_token(token, logprob)
                if generated.finish_reason:
                    del active_rows[number]
                yield generated
        if not active_rows:
            return
        decoding.keep_rows(active_rows)
        batch_rows = [rows[number] for number in decoding.row_numbers]
        slid = [row.slide_window() for row in batch_rows]
        if any(slid):
            prefill_rows(decoding, batch_rows, 1)
            decoding.keep_rows(active_rows)
        else:
            decoding.decode_one_token()


def prefill_rows(decoding: BatchDecoder, rows: Sequence[GeneratedSequence], n: int) -> None:
    """Prefill the current windows, with capacity for all that may follow."""
    capacity = max(min(row.max_context, len(row.window) + row.tokens_left) for row in rows)
    decoding.prefill_windows([row.window for row in rows[::n]], capacity=capacity)
    decoding.set_histories(rows)


def validate_prompts(prompts: TokenPrompts, vocab_size: int, max_context: int | None) -> list[list[int]]:
    """The prompts as lists of token ids that are valid for the model. max_context: the longest context that leaves room
    for a token."""
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
        wrong = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise UsageError(
                f"prompt {number} holds token {wrong}, but the model knows 0 to {vocab_size - 1}: is it its tokenizer?"
            )
        if max_context is not None and len(prompt) >= max_context:
            raise UsageError(
                f"prompt {number} has {len(prompt)} tokens, and no token can follow in the model's context of "
                f"{max_context}: shorten it, or let the window slide (on_full_context='slide')"
            )
    return read


def model_eos_token_ids(model: Decoder) -> tuple[int, ...]:
    """The end-of-text tokens of the model's generation config; none, where it has none."""
    return () if model.generation_config is None else tuple(model.generation_config.eos_token_ids)


def as_token_ids(eos: int | Sequence[int]) -> tuple[int, ...]:
    """One id or several as a tuple."""
    return (eos,) if isinstance(eos, int) else tuple(eos)
