"""`quest eval MODEL`: evaluates a run on its held-out data, or a model by bits per byte on a text, by accuracy on
problems, or on lm-eval tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_quest.cli.chat import load_text_model
from llm_quest.cli.eval_options import ChatOptions
from llm_quest.cli.generation_options import parse_template_kwargs
from llm_quest.cli.score import load_reward_model
from llm_quest.contracts import LogFn
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.corpus import load_corpus
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError, import_extra, install_command
from llm_quest.eval.perplexity import PerplexityReport, evaluate_documents
from llm_quest.eval.problems import ProblemAccuracy, ProblemEvalOptions, evaluate_task, load_eval_problems
from llm_quest.eval.self_refinement import RefinePrompts, SelfRefinement
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.objectives.reward_model import score_rows
from llm_quest.recipes.config import load_run_config
from llm_quest.recipes.held_out import HeldOutReport, evaluate_run, find_run
from llm_quest.recipes.policy_prompts import PromptEncoder
from llm_quest.recipes.yaml_io import read_yaml_file
from llm_quest.rollouts.model_reward import ModelReward


@dataclass(frozen=True)
class EvalContext:
    """The device, dtype, seed, threads and log of an evaluation."""

    device: str
    dtype: str
    log: LogFn
    seed: int = 0
    threads: int = 0


def evaluate_measure(model: str, measures: Mapping[str, str], given: Mapping[str, Any], context: EvalContext) -> Any:
    """Evaluate by the measure whose source is given, otherwise by the run's own; the report. given: options by their
    names in the command; None where one was left out."""
    machine: dict[str, Any] = {"device": context.device, "dtype": context.dtype, "log": context.log}
    kwargs = parse_template_kwargs(given["--chat-template-kwargs"])
    chat, number = ChatOptions(given["--chat"], given["--system"], kwargs), given["--problems"] or 200
    if tasks := measures["--harness"]:
        return evaluate_with_lm_eval(
            model, tasks.split(","), limit=number, seed=context.seed, chat=chat, fewshot=given["--fewshot"],
            fewshot_as_multiturn=given["--fewshot-as-multiturn"], **machine,
        )  # fmt: skip
    if task := measures["--task"]:
        options = ProblemEvalOptions(
            task, given["--part"] or "test", number, given["--samples"] or 0, given["--temperature"] or 1.0,
            given["--tokens"] or 64, context.seed, given["--vote"] or 0, given["--best-of"] or 0,
        )  # fmt: skip
        return evaluate_problem_task(
            model, options, chat=chat, reward_model=given["--reward-model"], refine=given["--refine"] or 0,
            refine_prompts=given["--refine-prompts"], **machine,
        )  # fmt: skip
    if data := measures["--data"]:
        return evaluate_text(model, data, max_tokens=given["--tokens"] or None, **machine)
    return evaluate_held_out(model, threads=context.threads, **machine)


def evaluate_held_out(name_or_path: str, *, device: str, dtype: str, threads: int, log: LogFn) -> HeldOutReport:
    """Evaluate a run on its held-out data by its recipe's measure, in the run's own precision, threads and device where
    the options say nothing."""
    given = {"device": device, "precision": dtype, "threads": threads or "auto"}
    return evaluate_run(name_or_path, [f"{key}={value}" for key, value in given.items() if value != "auto"], log=log)


def evaluate_text(
    name_or_path: str, source: str, *, max_tokens: int | None, device: str, dtype: str, log: LogFn
) -> PerplexityReport:
    """Bits per byte on a source."""
    corpus = load_corpus(source)
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    return evaluate_documents(model, tokenizer, corpus.documents, source=corpus.name, max_tokens=max_tokens, log=log)


def evaluate_problem_task(
    name_or_path: str,
    options: ProblemEvalOptions,
    *,
    chat: ChatOptions = ChatOptions(),
    reward_model: str | None = None,
    refine: int = 0,
    refine_prompts: str | None = None,
    device: str,
    dtype: str,
    log: LogFn,
) -> ProblemAccuracy:
    """Greedy accuracy on a task, and from samples mean@k, pass@k, the majority's and a reward model's choice. refine:
    rounds of self-refinement, with the prompts of a YAML file or the default ones."""
    problems = load_eval_problems(options)  # a mistake in its name is reported before the model is loaded
    prompts = read_refine_prompts(refine_prompts)
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    if refine and chat.chat is None:
        chat = replace(chat, chat=True)
    encode = eval_prompt_encoder(name_or_path, tokenizer, chat)
    refinement = None
    if refine:
        if encode.chat is None:
            raise UsageError("--refine is a conversation with the model: leave --no-chat out")
        context = int(model.config.max_position_embeddings)
        refinement = SelfRefinement(refine, encode.messages, encode.chat.encode_prompts, context, prompts)
    reward = (
        None if reward_model is None else load_matching_reward(reward_model, tokenizer, next(model.parameters()).device)
    )
    samples = max(options.num_samples, options.vote, options.best_of)
    how = f"greedy{f' and {samples} samples' if samples else ''}{', through the chat template' if encode.chat else ''}"
    log(f"{options.task}: {len(problems):,} problems, {how}")
    encode.encode_problems(problems)  # all in one call of the template
    return evaluate_task(
        model, tokenizer, problems, options, encode_prompt=encode, reward=reward, refinement=refinement
    )


def read_refine_prompts(path: str | None) -> RefinePrompts:
    """The prompts of self-refinement from a YAML file; None: the default ones."""
    if path is None:
        return RefinePrompts()
    try:
        given = read_yaml_file(Path(path))
    except DataError as error:
        raise UsageError(f"--refine-prompts {path} cannot be read: {error}") from None
    if given.problems:
        raise UsageError(f"--refine-prompts {path} cannot be read: {given.problems[0]}")
    return RefinePrompts.parse(given.tree, f"--refine-prompts {path}")


def eval_prompt_encoder(name_or_path: str, tokenizer: Tokenizer, chat: ChatOptions) -> PromptEncoder:
    """The encoder of problems: that of the recipe for a run that was trained on problems, else as `chat` says."""
    run_dir = find_run(name_or_path)
    tree = {} if run_dir is None else load_run_config(run_dir).tree
    use = tree.get("apply_chat_template") if chat.chat is None else chat.chat
    if not use:
        if chat.system is not None or chat.template_kwargs:
            raise UsageError("--system and --chat-template-kwargs are read by a chat template: give --chat too")
        return PromptEncoder(tokenizer)
    kwargs = chat.template_kwargs or recorded_template_kwargs(tree)
    template = open_eval_template(name_or_path, tokenizer, kwargs)
    return PromptEncoder(tokenizer, template, tree.get("system_prompt") if chat.system is None else chat.system)


def recorded_template_kwargs(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments that a run gave to its chat template."""
    return tree.get("chat_template_kwargs") or (tree.get("data") or {}).get("chat_template_kwargs") or {}


def open_eval_template(name_or_path: str, tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise UsageError(f"--chat: {name_or_path} has no chat template; leave --chat out to ask in plain text")
    return ChatTemplate(tokenizer, chat_template_kwargs=kwargs)


def load_matching_reward(name_or_path: str, tokenizer: Tokenizer, device: torch.device) -> ModelReward:
    """A reward model that reads the same ids as the model whose samples it scores."""
    model = load_reward_model(name_or_path, device)
    if load_tokenizer(name_or_path).hash != tokenizer.hash:
        raise UsageError(f"--reward-model {name_or_path} has another tokenizer than the model whose samples it scores")
    return ModelReward(partial(score_rows, model))


def evaluate_with_lm_eval(
    name_or_path: str,
    tasks: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    chat: ChatOptions = ChatOptions(),
    fewshot: int | None = None,
    fewshot_as_multiturn: bool | None = None,
    device: str,
    dtype: str,
    log: LogFn,
) -> Any:
    """The tasks of EleutherAI's harness, through the chat template with --chat. MissingError without its package."""
    import_extra("lm_eval", install_command("harness"))
    if chat.template_kwargs and not chat.chat:
        raise UsageError("--chat-template-kwargs are read by a chat template: give --chat too")
    from llm_quest.eval.lm_eval_harness import run_lm_eval

    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    template = open_eval_template(name_or_path, tokenizer, chat.template_kwargs) if chat.chat else None
    return run_lm_eval(
        model, tokenizer, tasks, limit=limit, seed=seed, chat_template=template, system_instruction=chat.system,
        num_fewshot=fewshot, fewshot_as_multiturn=True if fewshot_as_multiturn is None else fewshot_as_multiturn,
    )  # fmt: skip
