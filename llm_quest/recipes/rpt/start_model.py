"""The model that RPT starts from, and the proxy that selects its places.

A fresh model first learns the documents by next-token loss (`base/`), then the form of reasoning from a teacher's
demonstrations on a few of them (`warmup/`); the proxy is the model between the two.

      document   3*2+1%7:0        thought at the answer   <think>3*2=6;6+1=0;</think><answer>0</answer>
                                  elsewhere               <think></think><answer>+</answer>

A document is a function of (task, seed, part, index), and its part follows from its content, as with problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from llm_quest.contracts import LogFn
from llm_quest.data.batch import TokenBatch
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.problems import Problem, Task, parse_task, teacher_demonstration
from llm_quest.data.problems.chained import ANSWER_PREFIX
from llm_quest.data.problems.problem import make_rng
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.data.whole_documents import WholeDocuments, collate_demonstrations
from llm_quest.errors import UsageError
from llm_quest.hub.load_save import load, require_language_model
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.layers.initialize import copy_module
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.assembly import source_name
from llm_quest.recipes.config_schema import PositiveInt
from llm_quest.recipes.finetuning import StartModelConfig, load_for_finetuning
from llm_quest.recipes.model_config import WARMUP_CONTEXT, init_model
from llm_quest.recipes.policy_setup import policy_sampler
from llm_quest.recipes.recipe import Context
from llm_quest.recipes.rpt.documents import RptTextConfig, encode_problem, split_problems
from llm_quest.recipes.rpt.prompts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    REASONING_TAGS,
    THINK_CLOSE,
    THINK_OPEN,
    PrefixMatchReward,
    make_prompt_builder,
)
from llm_quest.recipes.schema import StrictModel
from llm_quest.recipes.sft_warmup import (
    CHECK_DEMONSTRATIONS,
    CHECK_PROBLEMS,
    CHECK_SAMPLES,
    StopRule,
    require_lengths_fit,
    train_until,
)
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed


class PretrainStageConfig(StrictModel):
    """The first stage of the warm-up: next-token loss on the documents."""

    max_steps: PositiveInt = Field(default=600, description="steps on plain documents")
    batch_size: PositiveInt = Field(default=64, description="documents in a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="learning rate after 25 steps of warm-up")


class ThinkingStageConfig(StrictModel):
    """The second stage of the warm-up: demonstrations of reasoning on a few documents. Best stopped where some samples
    are right."""

    max_steps: PositiveInt = Field(default=600, description="at most")
    target_accuracy: float = Field(
        default=0.4, gt=0, le=1, description="stop when this share of samples is right, held out"
    )
    num_examples: PositiveInt = Field(default=400, description="documents with demonstrations of the teacher")
    batch_size: PositiveInt = Field(default=48, description="demonstrations in a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="learning rate after 25 steps of warm-up")


class RptWarmupConfig(StrictModel):
    """The warm-up of a fresh model."""

    pretrain: PretrainStageConfig = PretrainStageConfig()
    sft: ThinkingStageConfig = ThinkingStageConfig()


@dataclass(frozen=True)
class RptStart:
    """The models that RPT starts with, on the device, in float32."""

    model: Decoder
    tokenizer: Tokenizer
    proxy: Decoder


def start_model_path(config: RptTextConfig, out: Path) -> str:
    """The path, for `load`, of the model that the run in this folder started from."""
    return config.model.load or str(out / "warmup")


def init_rpt_models(config: RptTextConfig, warmup: RptWarmupConfig | None, context: Context) -> RptStart:
    """Load the models, or train them (not for a plan)."""
    if config.model.load is not None:
        model, tokenizer = load_for_finetuning(StartModelConfig(load=config.model.load))
        proxy = model
    else:
        assert warmup is not None
        model, tokenizer, proxy = train_start_models(config, warmup, context)
    if config.selection.proxy_model is not None:
        where = config.selection.proxy_model
        proxy = require_language_model(load(where, dtype="float32", aligned=True), where)
        if load_tokenizer(config.selection.proxy_model).hash != tokenizer.hash:
            raise UsageError(
                f"the proxy {config.selection.proxy_model} has another tokenizer than the model: it reads other ids"
            )
    proxy = copy_module(proxy) if proxy is model else proxy
    device = context.parallel.device
    return RptStart(model.to(device), tokenizer, proxy.to(device).eval())


def train_start_models(
    config: RptTextConfig, warmup: RptWarmupConfig, context: Context
) -> tuple[Decoder, Tokenizer, Decoder]:
    """Train a fresh model in both stages; return it, its tokenizer, and a copy from before the second stage."""
    out, parallel, log = context.run_dir, context.parallel, context.log
    tokenizer = reasoning_tokenizer(parse_task(source_name(config.data)))
    model = init_model(config.model, context.settings, tokenizer, context=WARMUP_CONTEXT, seed=config.seed)
    if context.planning:
        return model, tokenizer, model
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
    proxy = copy_module(model)
    train_thinking(config, warmup, model, tokenizer, out / "warmup", parallel, log)
    return model, tokenizer, proxy


def train_thinking(
    config: RptTextConfig,
    part: RptWarmupConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    folder: Path,
    parallel: DistributedContext,
    log: LogFn,
) -> None:
    """Train on a teacher's demonstrations of reasoning, until the target accuracy on held-out documents."""
    task, (train, held_out) = parse_task(source_name(config.data)), split_problems(config.data, config.seed)
    loader = ReasoningLoader(
        task, train, tokenizer, num_examples=part.sft.num_examples, batch_size=part.sft.batch_size,
        seed=derive_seed(config.seed, "demonstrations"),
    )  # fmt: skip
    held_out_documents = [encode_problem(problem, tokenizer) for problem in held_out[:CHECK_PROBLEMS]]
    ends = [len(ids) - 1 - len(problem.answer) for ids, problem in zip(held_out_documents, held_out, strict=False)]
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


def check_thoughts(config: Any, settings: RawConfig) -> Any:
    """Return the config; UsageError for a warm-up whose demonstrations do not fit into max_new_tokens. config: with
    `warmup`."""
    if config.warmup is not None:
        stage, task = config.warmup.sft, parse_task(source_name(config.data))
        train, _ = split_problems(config.data, config.seed)
        thinking = ReasoningLoader(
            task, train, reasoning_tokenizer(task), num_examples=stage.num_examples, batch_size=stage.batch_size,
            seed=derive_seed(config.seed, "demonstrations"),
        )  # fmt: skip
        count = min(len(thinking.problems), CHECK_DEMONSTRATIONS)
        lengths = [len(thinking.reasoning_example(number)[1]) for number in range(count)]
        key = "warmup.sft.target_accuracy"
        require_lengths_fit(lengths, config.max_new_tokens, stage.target_accuracy, key, lambda line: None)
    return config


def reasoning_tokenizer(task: Task) -> Tokenizer:
    """A tokenizer of single characters, with each tag as one token."""
    return character_tokenizer(task.alphabet, REASONING_TAGS)


def teacher_reasoning(task: Task, problem: Problem, index: int, seed: int) -> tuple[str, str]:
    """The reasoning of the teacher and its answer, which may be wrong (the task's noise). A task without steps has no
    reasoning."""
    completion = teacher_demonstration(task, problem, index, seed)
    before, _, answer = completion.rpartition(ANSWER_PREFIX) if problem.steps else ("", "", completion)
    return before, answer


class ReasoningLoader:
    """A loader of `batch_size` demonstrations a step, of the first `num_examples` problems in turn: the teacher's
    reasoning, then the answer. A quarter as many are of other places, without reasoning, and again as many rows are
    plain documents, so that the model keeps its next-token predictions."""

    def __init__(
        self,
        task: Task,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        *,
        num_examples: int,
        batch_size: int,
        seed: int = 0,
    ):
        self.task, self.tokenizer = task, tokenizer
        self.batch_size, self.seed = batch_size, seed
        self.problems = list(problems[:num_examples])
        self.documents = [encode_problem(problem, tokenizer) for problem in self.problems]
        self.num_direct = max(1, batch_size // 4)
        self.document_loader = ShardedLoader(
            WholeDocuments(self.documents), batch_size=self.num_direct, micro_batch_size=self.num_direct, seed=seed
        )

    def batches(self, step: int) -> list[TokenBatch]:
        shown = [self.reasoning_example(step * self.batch_size + number) for number in range(self.batch_size)]
        quick = [self.direct_example(step * self.num_direct + number) for number in range(self.num_direct)]
        return [collate_demonstrations([*shown, *quick]), *self.document_loader.batches(step)]

    def reasoning_example(self, index: int) -> tuple[list[int], list[int]]:
        """The ids of prompt and completion of a demonstration with reasoning."""
        number = index % len(self.problems)
        problem = self.problems[number]
        _, answer = self.tokenizer.encode_pieces(problem.prompt, problem.answer)
        thought, answer_text = teacher_reasoning(self.task, problem, number, self.seed)
        return self.build_example(number, len(self.documents[number]) - 1 - len(answer), thought, answer_text)

    def direct_example(self, index: int) -> tuple[list[int], list[int]]:
        """The ids of prompt and completion at some other place, without reasoning."""
        number = index % len(self.problems)
        ids = self.documents[number]
        _, answer = self.tokenizer.encode_pieces(self.problems[number].prompt, self.problems[number].answer)
        place = make_rng("quick", self.seed, index).randrange(1, len(ids) - 1 - len(answer))
        return self.build_example(
            number, place, "", self.tokenizer.decode_continuation(ids[:place], ids[place : place + 1])
        )

    def build_example(self, number: int, place: int, thought: str, answer_text: str) -> tuple[list[int], list[int]]:
        completion = f"{thought}{THINK_CLOSE}{ANSWER_OPEN}{answer_text}{ANSWER_CLOSE}"
        completion_ids = [*self.tokenizer.encode_continuation(completion), self.tokenizer.eos_token_id]
        return [
            *self.documents[number][:place],
            *self.tokenizer.encode_continuation(THINK_OPEN),
        ], completion_ids

    def state_dict(self) -> dict[str, Any]:
        return {"task": repr(self.task), "rows": self.batch_size, "seed": self.seed, "examples": len(self.problems)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict != self.state_dict():
            raise ValueError(f"the loader's state belongs to other demonstrations: {state_dict}")
