"""`quest eval MODEL`: what a run measures on its held-out data, bits per byte on a text, accuracy on problems, or
lm-eval tasks."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from llm_quest.cli.chat import load_text_model
from llm_quest.contracts import LogFn
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.corpus import load_corpus
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import MissingError, UsageError
from llm_quest.eval.perplexity import PerplexityReport, evaluate_documents
from llm_quest.eval.problems import ProblemAccuracy, ProblemEvalOptions, evaluate_task, load_eval_problems
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.reward_model import score_rows
from llm_quest.recipes.config import load_run_config
from llm_quest.recipes.held_out import HeldOutReport, evaluate_run, find_run
from llm_quest.recipes.policy_prompts import PromptEncoder
from llm_quest.rollouts.model_reward import ModelReward
from llm_quest.techniques.score_head import find_score_head


def evaluate_held_out(name_or_path: str, *, device: str, dtype: str, threads: int, log: LogFn) -> HeldOutReport:
    """What a run measures on the data that it held out, in the run's own precision, threads and device where the
    options say nothing."""
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
    chat: bool | None = None,
    reward_model: str | None = None,
    device: str,
    dtype: str,
    log: LogFn,
) -> ProblemAccuracy:
    """Greedy accuracy on a task, and from samples mean@k, pass@k, the majority's and a reward model's choice. chat:
    whether problems are asked through the chat template; None: as the run was trained, else as plain text."""
    problems = load_eval_problems(options)  # a mistake in its name is reported before the model is loaded
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    encode = eval_prompt_encoder(name_or_path, tokenizer, chat)
    reward = None if reward_model is None else load_reward(reward_model, tokenizer, next(model.parameters()).device)
    samples = max(options.num_samples, options.vote, options.best_of)
    told = f"greedy{f' and {samples} samples' if samples else ''}{', through the chat template' if encode.chat else ''}"
    log(f"{options.task}: {len(problems):,} problems, {told}")
    return evaluate_task(model, tokenizer, problems, options, encode_prompt=encode, reward=reward)


def eval_prompt_encoder(name_or_path: str, tokenizer: Tokenizer, chat: bool | None) -> PromptEncoder:
    """How a model is asked: by the recipe's rule, where MODEL is a run that asked problems; else as `chat` says."""
    run_dir = find_run(name_or_path)
    tree = {} if run_dir is None else load_run_config(run_dir).tree
    use = tree.get("apply_chat_template") if chat is None else chat
    if use and not tokenizer.chat_template:
        raise UsageError(f"--chat: {name_or_path} has no chat template; leave --chat out to ask in plain text")
    system = tree.get("system_prompt") if use else None
    return PromptEncoder(tokenizer, ChatTemplate(tokenizer) if use else None, system)


def load_reward(name_or_path: str, tokenizer: Tokenizer, device: torch.device) -> ModelReward:
    """A reward model that reads the same ids as the model whose samples it scores."""
    model = load(name_or_path, device=device, dtype="float32")
    head = find_score_head(model) if isinstance(model, Decoder) else None
    if head is None or head.outputs != 1:
        raise UsageError(f"--reward-model {name_or_path} is no reward model; train one (quest train reward)")
    if load_tokenizer(name_or_path).hash != tokenizer.hash:
        raise UsageError(f"--reward-model {name_or_path} has another tokenizer than the model whose samples it scores")
    return ModelReward(partial(score_rows, model))


def evaluate_with_lm_eval(
    name_or_path: str, tasks: Sequence[str], *, limit: int | None, seed: int, device: str, dtype: str, log: LogFn
) -> Any:
    """The tasks of EleutherAI's harness. MissingError without its package."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingError("lm_eval is not installed: pip install 'llm-quest[harness]'")
    from llm_quest.eval.lm_eval_harness import run_lm_eval

    return run_lm_eval(*load_text_model(name_or_path, device, dtype, log), tasks, limit=limit, seed=seed)
