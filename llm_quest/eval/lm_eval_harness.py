"""Adapter for EleutherAI's lm-evaluation-harness (`pip install 'llm-quest[harness]'`): log-likelihoods of continuations
and of whole texts, and generation up to a stop string.

Only this file imports lm_eval, and only `quest eval --harness` imports this file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from llm_quest.data.chat import ChatTemplate
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.decoding import pad_left
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import StoppingCriteria, end_token_ids
from llm_quest.models.decoder import Decoder
from llm_quest.rollouts.sampler import copy_numbers
from llm_quest.scope import Scope

DEFAULT_MAX_GEN_TOKS = 256
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that tasks have for the length, the first of several counts."""
SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams) if field.name != "logit_bias")
OTHER_KEYS = ("until", "do_sample")
CHAT_MARK = "\ufdd3"  # a noncharacter: no task's text begins with it


@dataclass(frozen=True)
class GenKwargs:
    """A task's generation_kwargs: how texts are drawn, where they end."""

    sampling: SamplingParams
    until: tuple[str, ...]
    max_new_tokens: int


def parse_gen_kwargs(given: Mapping[str, Any]) -> GenKwargs:
    """Parse a task's generation arguments as transformers reads them: do_sample false is greedy, true without a
    temperature is temperature 1; without do_sample the temperature decides. UsageError for a key without effect
    here."""
    known = (*LENGTH_KEYS, *SAMPLING_KEYS, *OTHER_KEYS)
    if unknown := [key for key in given if key not in known]:
        raise UsageError(
            f"the task's generation_kwargs has {', '.join(unknown)}, which would have no effect; known: "
            f"{', '.join(known)}"
        )
    temperature = given.get("temperature")
    do_sample = given.get("do_sample")
    sampled = bool(temperature) if do_sample is None else do_sample
    values = {key: given[key] for key in SAMPLING_KEYS if given.get(key) is not None}
    if not sampled:
        values = {key: value for key, value in values.items() if key not in ("top_k", "top_p", "min_p")}
    values["temperature"] = (1.0 if temperature is None else float(temperature)) if sampled else 0.0
    until = given.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
    length = next((int(given[key]) for key in LENGTH_KEYS if given.get(key) is not None), DEFAULT_MAX_GEN_TOKS)
    return GenKwargs(SamplingParams(**values), stops, length)


def request_args(request: Instance) -> tuple[str, Mapping[str, Any]]:
    """The context of a request and its generation_kwargs."""
    context, given = request.args
    return context, given


class LmEvalModel(LM):
    """A Decoder and its tokenizer as an lm_eval model. batch_size: sequences in a forward pass. seed: of samples. chat:
    for tasks that are run through a chat template."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        seed: int = 0,
        chat: ChatTemplate | None = None,
    ):
        super().__init__()
        self.chat, self.rendered = chat, dict[str, str]()
        self.model, self.tokenizer, self.batch_size, self.seed = model, tokenizer, batch_size, seed
        self.context = int(model.config.max_position_embeddings)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding gives the continuation) for each request."""
        self.render_contexts([request.args[0] for request in requests])
        pairs = [self.encode_pair(*request.args) for request in requests]
        return self.score_continuations(
            [(context + continuation, len(continuation)) for context, continuation in pairs]
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of whole texts. Each token is predicted once, with as much context as fits."""
        totals = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            totals.append(sum(total for total, _ in self.score_continuations(self.rolling_windows(ids))))
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to a stop string, which is not part of the text. Requests that are asked several times
        (lm-eval's repeats) are so many samples."""
        texts: dict[int, str] = {}
        self.render_contexts([request_args(request)[0] for request in requests])
        requests_left = [
            (self.encode_context(context), parse_gen_kwargs(kwargs)) for context, kwargs in map(request_args, requests)
        ]
        for options in dict.fromkeys(options for _, options in requests_left):
            rows = [number for number, (_, own) in enumerate(requests_left) if own == options]
            room = self.context - options.max_new_tokens
            prompts = [requests_left[number][0][-max(1, room) :] for number in rows]
            texts |= dict(zip(rows, self.complete(prompts, options), strict=True))
        return [texts[number] for number in range(len(requests))]

    def complete(self, prompts: Sequence[list[int]], options: GenKwargs) -> list[str]:
        """A completion of each prompt; equal prompts get different random numbers."""
        stopping_criteria = StoppingCriteria(
            max_new_tokens=options.max_new_tokens,
            eos_token_ids=end_token_ids(self.model, self.tokenizer),
            stop=options.until,
            tokenizer=self.tokenizer,
        )
        copies = copy_numbers([tuple(prompt) for prompt in prompts])
        texts: list[str] = []
        for at in range(0, len(prompts), self.batch_size):
            part = slice(at, at + self.batch_size)
            done = generate_completions(
                self.model, prompts[part], options.sampling, stopping_criteria,
                seed=self.seed, copy_offsets=copies[part],
            )  # fmt: skip
            texts += [one.text or "" for one in done]
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """What stands for a conversation until the requests come, so that the template runs once for all of them.
        add_generation_prompt: false where the last message is the beginning of the answer."""
        return CHAT_MARK + json.dumps([chat_history, add_generation_prompt])

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.hash

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.chat.template if self.chat is not None and chat_template else None

    def render_contexts(self, contexts: Sequence[str]) -> None:
        """Render the conversations among the contexts of requests."""
        new = [one for one in dict.fromkeys(contexts) if one.startswith(CHAT_MARK) and one not in self.rendered]
        if not new or self.chat is None:
            return
        conversations = [json.loads(one.removeprefix(CHAT_MARK)) for one in new]
        begun = ["" if is_whole else messages.pop()["content"] for messages, is_whole in conversations]
        texts = self.chat.render_prompts([messages for messages, _ in conversations])
        for context, text, beginning in zip(new, texts, begun, strict=True):
            self.rendered[context] = text + self.chat.control_encoder.escape(beginning)

    def encode_prompt(self, text: str) -> list[int]:
        return [self.tokenizer.start_token_id, *self.tokenizer.encode(text, add_special_tokens=False)]

    def encode_context(self, context: str) -> list[int]:
        """The ids of a context, plain or of a conversation; nothing is added to what the template writes."""
        if context in self.rendered and self.chat is not None:
            return self.chat.encode(self.rendered[context])
        return self.encode_prompt(context)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both. They are encoded in one piece, and whitespace at the end of the context belongs to the
        continuation, as the harness specifies."""
        encode = self.encode_prompt
        if context in self.rendered and self.chat is not None:
            encode, context = self.chat.encode, self.rendered[context]
            continuation = self.chat.control_encoder.escape(continuation)
        whole, before = encode(context + continuation), encode(context.rstrip())
        return whole[: len(before)], whole[len(before) :]

    def rolling_windows(self, ids: Sequence[int]) -> list[tuple[list[int], int]]:
        """Split a text into rows of at most context + 1 tokens; (row, number of tokens at its end that are new)."""
        row = [self.tokenizer.start_token_id, *ids]
        parts, done = [], 1
        while done < len(row):
            end = min(len(row), done + self.context)
            parts.append((row[max(0, end - self.context - 1) : end], end - done))
            done = end
        return parts

    @torch.inference_mode()
    def score_continuations(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """(log p, whether greedy) of the last `new` tokens of each (row, new), given the tokens before them."""
        cut = [(ids[-(self.context + 1) :], min(new, self.context)) for ids, new in rows]
        order = sorted(range(len(cut)), key=lambda number: len(cut[number][0]))
        scores: dict[int, tuple[float, bool]] = {}
        for at in range(0, len(order), self.batch_size):
            some = order[at : at + self.batch_size]
            scores |= dict(zip(some, self.score_batch([cut[number] for number in some]), strict=True))
        return [scores[number] for number in range(len(rows))]

    def score_batch(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        device = next(self.model.parameters()).device
        tokens, positions = (part.to(device) for part in pad_left([ids[:-1] for ids, _ in rows]))
        h = self.model.hidden_states(tokens, Scope(positions))
        scored = []
        for row, (ids, new) in enumerate(rows):
            log_probs = self.model.head(h[row, -new:] if new else h[row, :0]).float().log_softmax(dim=-1)
            targets = torch.tensor(ids[len(ids) - new :], device=device)
            total = log_probs.gather(1, targets[:, None]).sum() if new else log_probs.sum()
            scored.append((float(total), bool((log_probs.argmax(dim=-1) == targets).all())))
        return scored


@dataclass(frozen=True)
class HarnessResults:
    """Results of the harness: task -> metric -> value."""

    tasks: dict[str, dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        return self.tasks

    def lines(self) -> list[str]:
        return [
            f"{task:<24}{metric:<28}{value:.4f}"
            for task, metrics in self.tasks.items()
            for metric, value in metrics.items()
            if isinstance(value, float)
        ]


def run_lm_eval(
    model: Decoder,
    tokenizer: Tokenizer,
    tasks: Sequence[str | Any],
    *,
    limit: int | None,
    seed: int = 0,
    chat_template: ChatTemplate | None = None,
    system_instruction: str | None = None,
    num_fewshot: int | None = None,
    fewshot_as_multiturn: bool = True,
) -> HarnessResults:
    """Run tasks of the harness. Their data come from the hub or its cache. chat_template: what questions are asked
    through, None: as plain text. system_instruction: before every question. num_fewshot: examples before each; None: as
    the task has it. fewshot_as_multiturn: with a chat template, examples are turns of the conversation."""
    # The harness lists its own tasks from 14,000 files: only if one of them may be meant.
    are_own = all(isinstance(task, Mapping) and "dataset_path" in task for task in tasks)
    results = lm_eval.simple_evaluate(
        model=LmEvalModel(model, tokenizer, seed=seed, chat=chat_template),
        tasks=list(tasks),
        limit=limit,
        bootstrap_iters=0,
        num_fewshot=num_fewshot,
        system_instruction=system_instruction,
        apply_chat_template=chat_template is not None,
        fewshot_as_multiturn=fewshot_as_multiturn and chat_template is not None,
        task_manager=TaskManager(include_defaults=not are_own),
    )
    assert results is not None, "this process is the only one"
    return HarnessResults({name: dict(metrics) for name, metrics in results["results"].items()})
