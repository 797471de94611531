"""The model that RPT begins with, and the proxy that says where it is worth thinking.

A fresh model first learns the documents by their next tokens (`base/`), then from a teacher's thoughts about a few of
them in which form to think (`warmup/`); the proxy is the model between the two."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from llm_quest.data.loader import ShardedLoader
from llm_quest.data.problems import parse_task
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole_documents import WholeDocuments
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.finetuning import StartModelConfig
from llm_quest.recipes.job import load_for_finetuning
from llm_quest.recipes.policy import LogFn, policy_sampler
from llm_quest.recipes.rpt.config import RptConfig, RptWarmupConfig
from llm_quest.recipes.rpt.demonstrations import ReasoningLoader, encode_problem, reasoning_tokenizer
from llm_quest.recipes.rpt.passages import split_problems
from llm_quest.recipes.rpt.prefix_match import PrefixMatchReward
from llm_quest.recipes.rpt.prompts import make_prompt_builder
from llm_quest.recipes.sft_warmup import CHECK_PROBLEMS, CHECK_SAMPLES, StopRule, init_model, train_until
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import derive_seed


@dataclass(frozen=True)
class RptStart:
    """On the device, in float32."""

    model: Decoder
    tokenizer: Tokenizer
    proxy: Decoder


def start_model_path(config: RptConfig, out: Path) -> str:
    """Where `load` finds the model that the run in this folder began with."""
    return config.model.load or str(out / "warmup")


def init_rpt_models(
    config: RptConfig, settings: RawConfig, out: Path, parallel: DistributedContext, log: LogFn
) -> RptStart:
    """Loaded, or made; on the device."""
    if config.model.load is not None:
        model, tokenizer = load_for_finetuning(StartModelConfig(load=config.model.load))
        proxy = model
    else:
        model, tokenizer, proxy = train_start_models(config, settings, out, parallel, log)
    if config.selection.proxy_model is not None:
        proxy = load(config.selection.proxy_model, dtype="float32", aligned=True)
        if load_tokenizer(config.selection.proxy_model).hash != tokenizer.hash:
            raise UsageError(
                f"the proxy {config.selection.proxy_model} has another tokenizer than the model: it reads other ids"
            )
    proxy = copy.deepcopy(proxy) if proxy is model else proxy
    return RptStart(model.to(parallel.device), tokenizer, proxy.to(parallel.device).eval())


def train_start_models(
    config: RptConfig, settings: RawConfig, out: Path, parallel: DistributedContext, log: LogFn
) -> tuple[Decoder, Tokenizer, Decoder]:
    """A fresh model that reads and thinks, its tokenizer, and a copy that only reads."""
    assert config.warmup is not None
    warmup = config.warmup
    tokenizer = reasoning_tokenizer(parse_task(config.data.source))
    model = init_model(config.model, settings, tokenizer, config.seed)
    train, _ = split_problems(config.data, config.seed)
    documents = [encode_problem(problem, tokenizer) for problem in train]
    reading = ShardedLoader(
        WholeDocuments(documents),
        batch_size=warmup.pretrain.batch_size,
        micro_batch_size=warmup.pretrain.batch_size,
        seed=derive_seed(config.seed, "reading"),
    )
    stop_rule = StopRule(warmup.pretrain.max_steps, warmup.pretrain.learning_rate)
    train_until(config, model, tokenizer, reading, stop_rule, out / "base", parallel, log)
    log(f"read: {warmup.pretrain.max_steps} steps on {len(documents):,} documents")
    proxy = copy.deepcopy(model)
    train_thinking(config, warmup, model, tokenizer, out / "warmup", parallel, log)
    return model, tokenizer, proxy


def train_thinking(
    config: RptConfig,
    part: RptWarmupConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    folder: Path,
    parallel: DistributedContext,
    log: LogFn,
) -> None:
    """The model sees a teacher think, until that helps it now and then on held-out documents."""
    task, (train, held) = parse_task(config.data.source), split_problems(config.data, config.seed)
    loader = ReasoningLoader(
        task, train, tokenizer, num_examples=part.sft.num_examples, batch_size=part.sft.batch_size,
        seed=derive_seed(config.seed, "demonstrations"),
    )  # fmt: skip
    held_out_documents = [encode_problem(problem, tokenizer) for problem in held[:CHECK_PROBLEMS]]
    ends = [len(ids) - 1 - len(problem.answer) for ids, problem in zip(held_out_documents, held, strict=False)]
    prompt_builder = make_prompt_builder(
        tokenizer,
        held_out_documents,
        prefix=config.prompt.prefix,
        suffix=config.prompt.suffix,
        max_target_tokens=config.prompt.max_target_tokens,
    )
    questions = [prompt_builder.build_prompt(ids, end) for ids, end in zip(held_out_documents, ends, strict=True)]
    reward, writer = PrefixMatchReward(config.prompt.opening_tag), policy_sampler(config, model, tokenizer, parallel)

    def share() -> float:
        values = [value for group in writer(model, questions, CHECK_SAMPLES, config.seed) for value in reward(group)]
        return sum(values) / len(values)

    stop_rule = StopRule(part.sft.max_steps, part.sft.learning_rate, part.sft.target_accuracy, share)
    step, reached = train_until(config, model, tokenizer, loader, stop_rule, folder, parallel, log)
    log(f"warm-up: {step} steps on {len(loader.problems)} thoughts; {reached:.0%} of sampled answers are right")
