"""`quest generate --prompts FILE --out TEXTS.jsonl`: one completion for each prompt of a file, in rows whose `text` can
be trained on (sequence-level distillation, Kim & Rush 2016, arXiv:1606.07947).

Prompts of similar length are batched together. A row's random numbers depend on the seed, its prompt and how many equal
prompts precede it in the file, so neither --batch nor an interruption changes its text."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quest.cli.chat import complete_prompts, load_for_generation, require_compiler
from llm_quest.cli.generation_options import GenerationOptions
from llm_quest.cli.jsonl_output import JsonlOutput, open_jsonl_output
from llm_quest.contracts import LogFn
from llm_quest.data.documents import Document, read_prompts
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.stopping import Completion, StoppingCriteria
from llm_quest.models.decoder import Decoder
from llm_quest.progress import EtaClock
from llm_quest.recipes.reference_model import weights_hash

DEFAULT_BATCH_SIZE = 32
PROGRESS_SECONDS = 5.0
"""Seconds between two lines about progress."""


@dataclass(frozen=True)
class BatchGenerateReport:
    """The result of `quest generate --prompts`. rows: in the file. new, tokens, seconds: of this command. dropped:
    reason -> number of prompts without a row. finished: finish reason -> number of rows in the file."""

    out: str
    prompts: int
    rows: int
    new: int
    dropped: Mapping[str, int]
    finished: Mapping[str, int]
    tokens: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens / self.seconds if self.new else None}

    def lines(self) -> list[str]:
        ends = ", ".join(f"{count:,} by {why}" for why, count in self.finished.items())
        result = [f"{self.out}: {self.rows:,} rows for {self.prompts:,} prompts; they end {ends}"]
        result += [f"dropped: {count:,} prompts ({reason})" for reason, count in self.dropped.items()]
        if not self.new:
            return [*result, "the file was finished already; nothing was written"]
        return [*result, f"{self.new:,} new rows, {self.tokens:,} tokens, {self.tokens / self.seconds:,.0f} tokens/s"]


@dataclass(frozen=True)
class PromptSet:
    """Tokenized prompts. occurrence: how many equal prompts precede each one in the file. options: whether they are
    messages, and after which system message."""

    prompts: Sequence[Document]
    ids: Sequence[list[int]]
    occurrence: Sequence[int]
    options: GenerationOptions

    def batches(self, rows: Sequence[int], size: int) -> list[list[int]]:
        """Batches of rows of similar length. The longest come first, so that running out of memory shows at once."""
        order = sorted(rows, key=lambda row: (-len(self.ids[row]), row))
        return [order[at : at + size] for at in range(0, len(order), size)]

    def make_row(self, number: int, done: Completion) -> dict[str, Any]:
        """A row that can be trained on: `text`, or with --chat `messages`."""
        prompt, completion = self.prompts[number].text, done.text or ""
        row = {"prompt": prompt, "completion": completion, "finished": done.finish_reason}
        if not self.options.chat:
            return {"row": number, "text": prompt + completion} | row
        system = self.options.system
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        return {"row": number, "messages": messages} | row


def check_prompt_options(
    prompts: Path | None, single: Mapping[str, object], needed: Mapping[str, object], file_only: Mapping[str, object]
) -> None:
    """UsageError for options that exclude each other. single: options for one prompt. needed: options that --prompts
    requires. file_only: options that need --prompts."""
    if prompts is None:
        if wrong := [name for name, value in {**needed, **file_only}.items() if value is not None]:
            raise UsageError(f"{wrong[0]} belongs to --prompts FILE and does nothing without it: leave it out")
        if single["--prompt"] is None:
            raise UsageError("there is no prompt: give --prompt TEXT, or --prompts FILE and --out TEXTS.jsonl")
        if single["--draft"] is not None and single["--image"] is not None:
            raise UsageError("--draft does not work with --image: leave one of them out")
        return
    if wrong := [name for name, value in single.items() if value is not None]:
        raise UsageError(f"{wrong[0]} is for one text, --prompts for many: leave one of them out")
    if missing := [name for name, value in needed.items() if value is None]:
        raise UsageError(f"--prompts needs {missing[0]}: the file for the rows, such as texts.jsonl")


def generate_batch(
    name_or_path: str,
    prompts: Path,
    out: Path,
    options: GenerationOptions,
    *,
    batch: int | None,
    device: str,
    dtype: str,
    log: LogFn,
) -> BatchGenerateReport:
    """Write a row to `out` for every prompt that fits in the context. Rows of an earlier command are kept."""
    prompt_texts = read_prompts(prompts)
    model, tokenizer, options = load_for_generation(name_or_path, options, device=device, dtype=dtype, log=log)
    work = tokenize_prompts(prompt_texts, tokenizer, options)
    fit = select_fitting_prompts(work, model, options.slide, prompts, log)
    until = options.stopping_criteria(model, tokenizer)
    with open_jsonl_output(out, output_settings(name_or_path, model, tokenizer, prompt_texts, options, until)) as file:
        known = file.load_existing()
        missing = [row for row in fit if row not in known]
        if known and missing:
            log(f"{out} has {len(known):,} rows; generating the missing {len(missing):,}")
        if missing and options.compile:
            require_compiler(next(model.parameters()).device, log)
        began = time.perf_counter()
        tokens = generate_missing(file, work, missing, model, options, until, batch or DEFAULT_BATCH_SIZE, log)
        seconds = time.perf_counter() - began
        rows = file.sort_rows()
    ends = Counter(str(row.get("finished")) for row in rows.values())
    left = len(prompt_texts) - len(fit)
    dropped = {f"the prompt fills the context of {model.config.max_position_embeddings:,} tokens": left} if left else {}
    return BatchGenerateReport(
        str(out), len(prompt_texts), len(rows), len(missing), dropped, dict(sorted(ends.items())), tokens, seconds
    )


def tokenize_prompts(prompt_texts: Sequence[Document], tokenizer: Tokenizer, options: GenerationOptions) -> PromptSet:
    ids = options.encode_prompts(tokenizer, [prompt.text for prompt in prompt_texts])
    known, which = Counter[tuple[int, ...]](), []
    for tokens in ids:
        which.append(known[tuple(tokens)])
        known[tuple(tokens)] += 1
    return PromptSet(prompt_texts, ids, which, options)


def select_fitting_prompts(work: PromptSet, model: Decoder, slide: bool, prompts: Path, log: LogFn) -> list[int]:
    """The prompts that leave room for new tokens. UsageError if none does."""
    context = model.config.max_position_embeddings
    fit = [row for row, tokens in enumerate(work.ids) if slide or len(tokens) < context]
    if not fit:
        raise UsageError(
            f"every prompt of {prompts} fills the context of {context:,} tokens (the shortest has "
            f"{min(map(len, work.ids)):,}): shorten them, or --slide"
        )
    if len(fit) < len(work.ids):
        kept = set(fit)
        first = next(prompt.source for row, prompt in enumerate(work.prompts) if row not in kept)
        log(f"dropped: {len(work.ids) - len(fit):,} prompts that fill the context of {context:,} (first: {first})")
    return fit


def output_settings(
    name_or_path: str,
    model: Decoder,
    tokenizer: Tokenizer,
    prompt_texts: Sequence[Document],
    options: GenerationOptions,
    stopping_criteria: StoppingCriteria,
) -> dict[str, Any]:
    """The settings that the rows depend on, with hashes of the model, the tokenizer and the prompts."""
    digest = hashlib.sha256()
    for prompt in prompt_texts:
        digest.update(prompt.text.encode() + b"\0")
    kind = str(next(model.parameters()).dtype).removeprefix("torch.")
    settings_kept = {
        "model": name_or_path,
        "weights": weights_hash(model),
        "tokenizer": tokenizer.hash,
        "prompts": digest.hexdigest(),
    }
    return settings_kept | {"dtype": kind, "eos": stopping_criteria.eos_token_ids} | options.as_settings()


def generate_missing(
    file: JsonlOutput,
    work: PromptSet,
    missing: Sequence[int],
    model: Decoder,
    options: GenerationOptions,
    stopping_criteria: StoppingCriteria,
    size: int,
    log: LogFn,
) -> int:
    """Generate the missing rows batch by batch and append them; returns the number of new tokens."""
    clock, began = EtaClock(0, len(missing)), time.perf_counter()
    done, tokens, reported = 0, 0, began
    for some in work.batches(missing, size):
        completions = complete_prompts(
            model, [work.ids[row] for row in some], options, stopping_criteria, [work.occurrence[row] for row in some]
        )
        file.append([work.make_row(row, completion) for row, completion in zip(some, completions, strict=True)])
        done, now = done + len(some), time.perf_counter()
        tokens += sum(len(completion.tokens) for completion in completions)
        if now - reported > PROGRESS_SECONDS or done == len(missing):
            elapsed, reported = now - began, now
            speed = f"{done / elapsed:,.1f} rows/s, {tokens / elapsed:,.0f} tokens/s"
            log(f"{done:,}/{len(missing):,} rows, {speed}, ETA {clock.time_left(done)}")
    return tokens
