"""The settings of `quest train rpt` and of its control."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llm_quest.contracts import Reward
from llm_quest.data.problems import TASKS, parse_task
from llm_quest.recipes.choice import Choice
from llm_quest.recipes.config import StrictModel
from llm_quest.recipes.config_schema import ModelConfig, NonNegativeInt, PositiveInt, RunConfig, TextDataConfig
from llm_quest.recipes.policy_config import PolicyConfig
from llm_quest.recipes.rpt.demonstrations import ANSWER_CLOSE, ANSWER_OPEN, THINK_CLOSE, THINK_OPEN
from llm_quest.recipes.rpt.positions import ENTROPY_THRESHOLDS, TOP_K_ENTROPY
from llm_quest.recipes.rpt.prefix_match import AnswerFormatReward, PrefixMatchReward
from llm_quest.rollouts.rewards import RandomReward
from llm_quest.train.state_dict import derive_seed


class RptDataConfig(TextDataConfig):
    """The text whose tokens are to be foretold: what pretraining takes, or a task, whose problems and answers are
    written out as documents."""

    source: str = Field(
        default="registers",
        min_length=1,
        description="a task, options after a colon; or builtin, builtin:PARTS, a text or JSONL file, a folder",
    )
    num_documents: PositiveInt | None = Field(default=None, description="of a task: how many are drawn; null: 8000")
    max_document_tokens: PositiveInt | None = Field(
        default=None, description="tokens of a document that are read at once; null: as many as leave room to think"
    )

    @property
    def is_task(self) -> bool:
        return self.source.partition(":")[0] in TASKS

    @property
    def document_count(self) -> int:
        return self.num_documents or 8000

    @model_validator(mode="after")
    def check_source_keys(self) -> RptDataConfig:
        if self.is_task:
            parse_task(self.source)
        if not self.is_task and self.num_documents is not None:
            raise ValueError(
                f"data.num_documents has no effect on {self.source}, whose documents are what they are: leave out"
            )
        for name in ("text_column", "separator", "held_out") if self.is_task else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"data.{name} has no effect on a task, whose content decides its splits; leave it out")
        return self


class PretrainStageConfig(StrictModel):
    """A fresh model learns the text, by its next tokens."""

    max_steps: PositiveInt = 600
    batch_size: PositiveInt = Field(default=64, description="documents in a step")
    learning_rate: float = Field(default=3e-3, gt=0, le=1)


class ThinkingStageConfig(StrictModel):
    """And in which form to think, from a teacher's thoughts about a few documents. Best stopped where thoughts help now
    and then."""

    max_steps: PositiveInt = Field(default=600, description="at most")
    target_accuracy: float = Field(
        default=0.4, gt=0, le=1, description="stop when this share of samples is right, held out"
    )
    num_examples: PositiveInt = Field(default=400, description="documents that the teacher has thought about")
    batch_size: PositiveInt = 48
    learning_rate: float = Field(default=3e-3, gt=0, le=1)


class RptWarmupConfig(StrictModel):
    """What a fresh model goes through before it can be asked to think."""

    pretrain: PretrainStageConfig = PretrainStageConfig()
    sft: ThinkingStageConfig = ThinkingStageConfig()


class PositionSelectionConfig(StrictModel):
    """Which places are worth thinking about: where a proxy does not know the next token."""

    proxy_model: str | None = Field(
        default=None, description="a model's folder or run; null: the model as it began to think"
    )
    entropy_threshold: float = Field(
        default=ENTROPY_THRESHOLDS[0], ge=0, description="nats of entropy over the likeliest top_k tokens"
    )
    top_k: int = Field(default=TOP_K_ENTROPY, ge=2)
    renormalize: bool = Field(default=True, description="those tokens' probabilities are made to sum to one")
    max_positions: PositiveInt | None = Field(default=None, description="keep so many places, drawn evenly; null: all")


class PromptConfig(StrictModel):
    """What stands around the text so far; control tokens may be written out (a chat template's). The answer has to
    have the form <think>...</think><answer>...</answer>, of which `suffix` may hold the beginning."""

    prefix: str = ""
    suffix: str = THINK_OPEN
    max_target_tokens: PositiveInt = Field(default=8, description="true tokens that an answer may foretell")

    @property
    def opening_tag(self) -> str:
        return THINK_OPEN if self.suffix.endswith(THINK_OPEN) else ""


RPT_REWARD_BUILDERS: dict[str, Callable[[RptConfig], Reward]] = {
    "prefix": lambda config: PrefixMatchReward(config.prompt.opening_tag),
    "format": lambda config: AnswerFormatReward(config.prompt.opening_tag),
    "random": lambda config: RandomReward(derive_seed(config.seed, "random reward")),
}


class RptConfig(PolicyConfig):
    """A model and text in, a model that thinks before it says the next token out."""

    recipe: Literal["rpt"]
    data: RptDataConfig = RptDataConfig()
    model: ModelConfig
    warmup: RptWarmupConfig | None = Field(default=None, description="for a fresh model, on a task's documents")
    selection: PositionSelectionConfig = PositionSelectionConfig()
    prompt: PromptConfig = PromptConfig()
    reward: Annotated[str, Choice(RPT_REWARD_BUILDERS)] = Field(
        default="prefix", description="format and random are controls, without which a curve proves nothing"
    )
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")
    eval_positions_per_bucket: PositiveInt = Field(
        default=150, description="held-out positions of each bucket (trivial, easy, medium, hard)"
    )

    @model_validator(mode="after")
    def check_combination(self) -> RptConfig:
        fresh = self.model.load is None
        if fresh and (self.warmup is None or not self.data.is_task):
            raise ValueError(
                "a fresh model has not learned to think, and only a task's documents come with thoughts to learn from "
                "(data.source=registers warmup={}); or give model.load=FOLDER"
            )
        if not fresh and self.warmup is not None:
            raise ValueError("warmup has no effect on a model that is loaded; leave it out (warmup=null)")
        if fresh and (self.prompt.prefix or self.prompt.suffix != THINK_OPEN):
            raise ValueError(
                "a fresh model is taught to think behind the text alone; leave prompt.prefix and prompt.suffix out"
            )
        if any(
            tag in self.prompt.suffix.removesuffix(THINK_OPEN)
            for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
        ):
            raise ValueError(f"prompt.suffix may end with {THINK_OPEN} and hold no other tag of the answer's form")
        return self


class RptControlConfig(RunConfig):
    """The same model goes on with plain next-token training on the same documents, for as many FLOPs as an RPT run
    took."""

    recipe: Literal["rpt_control"]
    rpt_run: str = Field(min_length=1, description="the RPT run: its start, documents, places and FLOPs are taken")
    targets: Literal["all", "selected"] = Field(
        default="all", description="what is learned: every token, or those at the places that RPT thought about"
    )
    batch_size: PositiveInt = Field(default=64, description="documents in an optimiser step, over all processes")
    micro_batch_tokens: PositiveInt = Field(default=8192, description="tokens in a micro-batch")
    eval_steps: NonNegativeInt = Field(default=50, description="steps between evaluations; 0: only at the end")

    @property
    def rows_per_step(self) -> int:
        return self.batch_size
