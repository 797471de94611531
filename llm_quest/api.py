"""LLM Quest from Python: `quest.train`, `quest.evaluate`, `quest.generate` and `quest.chat`.

A model is named as on the command line: a Hugging Face folder, a hub id, a run (RUN, RUN@best, RUN@120) or the result
of `quest.train`; or it is a model that `quest.load` gave, with its tokenizer beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from llm_quest.cli.eval_options import ChatOptions
from llm_quest.cli.evaluate import evaluate_held_out, evaluate_problem_task, evaluate_text
from llm_quest.cli.generation_options import CHAT_DEFAULTS, GENERATE_DEFAULTS, GenerationOptions
from llm_quest.cli.train import start_training
from llm_quest.contracts import LogFn
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.template_sandbox import Messages
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.eval.problems import ProblemEvalOptions
from llm_quest.generation import generate as decoding
from llm_quest.generation.speculative.decoder import DraftSource
from llm_quest.generation.stopping import Completion
from llm_quest.hub.load_save import load, load_model_and_tokenizer
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.models.build import presets
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.config import load_run_config
from llm_quest.recipes.recipe import RunOutcome, get_recipe
from llm_quest.recipes.yaml_io import flatten_tree


@dataclass(frozen=True)
class Result:
    """What `quest.train` gives: the run's folder and how it ended. It stands for its model wherever one is named.

    run: the folder. status: finished, interrupted or time. step: how many steps are done. metrics: the last row of
    metrics.jsonl, held-out numbers under `eval/`."""

    run: Path
    status: str
    step: int
    metrics: Mapping[str, Any]

    def __fspath__(self) -> str:
        return str(self.model_path)

    @property
    def model_path(self) -> Path:
        """The folder that holds the run's model: of a recipe of several runs the last policy's."""
        recipe = get_recipe(str(load_run_config(self.run).tree["recipe"]))
        return recipe.result_dir(self.run)

    @cached_property
    def model(self) -> Any:
        """The trained model, in eval mode; read from the run when it is first asked for."""
        return load(self.model_path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer. DataError for a recipe without one."""
        return load_tokenizer(self.model_path)


ModelName = str | os.PathLike[str]
"""A folder, hub id or run; a `Result` is one."""


def train(
    recipe: str,
    *,
    model: ModelName | Mapping[str, Any] | None = None,
    data: ModelName | Mapping[str, Any] | Sequence[Any] | None = None,
    out: ModelName | None = None,
    resume: str = "auto",
    log: LogFn | None = None,
    **settings: Any,
) -> Result:
    """Train with a recipe, as `quest train RECIPE` does; the run folder resumes if it is there already.

        quest.train("sft", model="folder", data="rows.jsonl", max_steps=100, techniques=["lora"])

    recipe: a name, a YAML file or a run folder. model: what to start from: a preset's name builds that size, anything
    else is loaded; or a group of settings. data: a file, a folder or a list of them; or a group of settings. out: the
    run folder (None: a new one in runs/). resume: auto, never or a checkpoint. log: takes each line of progress (None:
    nothing is printed).
    settings: any of the recipe's, groups as dicts (`quest train RECIPE --help` lists them). Raises UsageError with
    every mistake in them at once, GuardStop for a run that was stopped."""
    groups = {"model": model_settings(model), "data": data_settings(data), **settings}
    outcome = start_training(
        recipe, list(setting_pairs(groups)), out=None if out is None else Path(out), resume=resume,
        quiet=log is None, log=log or (lambda text: None),
    )  # fmt: skip
    assert isinstance(outcome, RunOutcome), "this is no dry run"
    return Result(Path(outcome.run), outcome.status, outcome.step, dict(outcome.metrics))


def model_settings(model: ModelName | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The group `model` of a recipe's settings."""
    if model is None or isinstance(model, Mapping):
        return model or {}
    name = path_of(model, "model", "a folder, a hub id, a run or a preset; save a model with quest.save first")
    return {"preset": name} if name in presets() and not Path(name).is_dir() else {"load": name}


def data_settings(data: ModelName | Mapping[str, Any] | Sequence[Any] | None) -> Mapping[str, Any]:
    """The group `data` of a recipe's settings. UsageError for rows in place of the name of a file."""
    if data is None or isinstance(data, Mapping):
        return data or {}
    expected = "the name of a file or folder, hf:NAME, or FILE.py:FUNCTION, which may return rows that a program makes"
    if not isinstance(data, list | tuple):
        return {"source": path_of(data, "data", expected)}
    return {
        "source": [
            {**one, "path": os.fspath(one["path"])}
            if isinstance(one, Mapping) and "path" in one
            else path_of(one, "an item of data", expected)
            for one in data
        ]
    }


def path_of(value: Any, what: str, expected: str) -> str:
    """A name or path as text. UsageError for another kind of value."""
    try:
        return os.fspath(value)
    except TypeError:
        raise UsageError(f"{what} is a {type(value).__name__}; expected {expected}") from None


def setting_pairs(settings: Mapping[str, Any]) -> Iterator[str]:
    """`key=value` of every setting; a group's keys one by one, so that the others keep their defaults."""
    for key, value in flatten_tree({key: value for key, value in settings.items() if value != {}}):
        yield f"{key}={json.dumps(value, default=os.fspath)}"


def evaluate(
    model: ModelName,
    data: str = "",
    *,
    task: str = "",
    num_problems: int = 200,
    num_samples: int = 0,
    vote: int = 0,
    refine: int = 0,
    chat: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    log: LogFn | None = None,
) -> dict[str, Any]:
    """Evaluate a model, as `quest eval` does: numbers by name.

    Without data and task: what a run measures on the data that it held out. data: a text file, a folder or builtin:
    loss, perplexity and bits per byte. task: problems with a verifier, such as countdown: accuracy, on num_problems of
    its test part; num_samples: of each, for pass@k; vote: among up to how many; refine: rounds of self-refinement;
    chat: whether through the chat template (None: as a run was trained). max_tokens: of the text that are read, or of
    an answer (None: all; 64)."""
    name = path_of(model, "model", "a folder, a hub id, a run or a Result; save a model with quest.save first")
    say = log or (lambda text: None)
    if data and task:
        raise UsageError("data is a text and task a kind of problem: give one of them")
    if task:
        options = ProblemEvalOptions(
            task, num_problems=num_problems, num_samples=num_samples, vote=vote, max_new_tokens=max_tokens or 64
        )
        chat_options = ChatOptions(chat, template_kwargs=chat_template_kwargs or {})
        done = evaluate_problem_task(
            name, options, chat=chat_options, refine=refine, device=device, dtype="auto", log=say
        )
        return done.as_json()
    if num_samples or vote or refine or chat is not None or chat_template_kwargs:
        raise UsageError("num_samples, vote, refine, chat and chat_template_kwargs are about a task: give task too")
    if data:
        return evaluate_text(name, data, max_tokens=max_tokens, device=device, dtype="auto", log=say).as_json()
    return evaluate_held_out(name, device=device, dtype="auto", threads=0, log=say).as_json()


class GenerateOptions(TypedDict, total=False):
    """The options of `quest.generate` and `quest.chat`; see `SamplingParams` and `StoppingCriteria`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None
    min_new_tokens: int
    n: int
    seed: int
    eos_token_id: int | Sequence[int] | None
    stop: str | Sequence[str | Sequence[int]]
    on_full_context: Literal["stop", "slide"]
    compile: bool
    draft: DraftSource | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]


def generate(
    model: Decoder | ModelName,
    prompts: str | Sequence[str] | decoding.TokenPrompts,
    *,
    tokenizer: Any = None,
    **options: Unpack[GenerateOptions],
) -> list[Completion]:
    """Generate a completion of each prompt (`n` of them, one after another): tokens, logprobs, finish_reason, and text
    where there is a tokenizer.

        quest.generate("folder", "Once upon a time", max_new_tokens=32)[0].text

    model: a name (its tokenizer and the sampling that its generation_config.json advises are used), or a model.
    prompts: a text, texts, or lists of token ids. tokenizer: of a model that was given itself; texts need it. options:
    see `GenerateOptions`; max_new_tokens is 128 for texts and has to be given for ids. Where neither the options nor
    the folder say how to sample, the temperature is 0.8 for texts, 1 for ids."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(model, str | os.PathLike):
        model, tokenizer = load_model_and_tokenizer(os.fspath(model))
    if not is_text(texts):
        return decoding.generate(model, texts, tokenizer=tokenizer, **options)  # type: ignore[misc, arg-type]
    if tokenizer is None:
        raise UsageError(
            "texts need the model's tokenizer: give tokenizer=quest.Tokenizer.load(FOLDER), or the folder instead of "
            "the model"
        )
    ids = [one or [tokenizer.start_token_id] for one in tokenizer.encode_batch(texts, allow_special_tokens=False)]
    chosen = with_advice(model, options, GENERATE_DEFAULTS)
    return decoding.generate(model, ids, tokenizer=tokenizer, **{"max_new_tokens": 128, **chosen})  # type: ignore[misc, arg-type]


def is_text(prompts: Any) -> bool:
    """Whether prompts are texts, not token ids."""
    return isinstance(prompts, list | tuple) and len(prompts) > 0 and all(isinstance(one, str) for one in prompts)


def with_advice(model: Decoder, options: GenerateOptions, defaults: Mapping[str, float]) -> dict[str, Any]:
    """The options, and where they do not say how to sample, what the model's makers advise, else the defaults."""
    if options.get("num_beams", 1) > 1:
        return {"temperature": 0.0, **options}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given: dict[str, Any] = {name: options.get(name) for name in names}
    generation_options = GenerationOptions(tokens=128, **given, stop=(), slide=False, seed=0)
    decided = generation_options.with_advice(model.generation_config, defaults, lambda text: None)
    return {**options, **{name: getattr(decided, name) for name in names}}


def chat(
    model: Decoder | ModelName,
    messages: str | Messages,
    *,
    tokenizer: Any = None,
    **options: Unpack[GenerateOptions],
) -> str:
    """The assistant's answer to a conversation, through the model's chat template.

        quest.chat("folder", [{"role": "user", "content": "Who are you?"}])

    messages: `role` and `content` of each, the last one the user's; or a text, which is the user's. model, tokenizer,
    options: as for `quest.generate`; max_new_tokens is 256."""
    if isinstance(model, str | os.PathLike):
        model, tokenizer = load_model_and_tokenizer(os.fspath(model))
    if tokenizer is None:
        raise UsageError(
            "a conversation needs the model's tokenizer: give tokenizer=, or the folder instead of the model"
        )
    conversation = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    template = ChatTemplate(tokenizer)
    chosen = {"max_new_tokens": 256, **with_advice(model, options, CHAT_DEFAULTS)}
    done = decoding.generate(model, [template.encode_prompt(conversation)], tokenizer=tokenizer, **chosen)  # type: ignore[arg-type]
    return template.message_of_reply(conversation, done[0].text or "")
