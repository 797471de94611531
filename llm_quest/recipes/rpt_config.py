"""The settings of `quest train rpt` and of its control."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from llm_quest.data.problems import TASKS, spelled
from llm_quest.data.worked import SAID, SAY, THINK, THOUGHT
from llm_quest.recipes.config import Strict
from llm_quest.recipes.parts import Count, Course, Data, Few, Model
from llm_quest.recipes.policy_config import Policy
from llm_quest.recipes.tuning_config import Looking
from llm_quest.rollouts.positions import THRESHOLDS, TOP


class Passages(Data):
    """The text whose tokens are to be foretold: what pretraining takes, or a task, whose problems and answers are
    written out as documents."""

    source: str = Field(
        default="registers",
        min_length=1,
        description="a task, options after a colon; or builtin, builtin:PARTS, a text or JSONL file, a folder",
    )
    documents: Count | None = Field(default=None, description="of a task: how many are drawn; null: 8000")
    length: Count | None = Field(
        default=None, description="tokens of a document that are read at once; null: as many as leave room to think"
    )

    @property
    def task(self) -> bool:
        return self.source.partition(":")[0] in TASKS

    @property
    def number(self) -> int:
        return self.documents or 8000

    @model_validator(mode="after")
    def keys_of_the_source(self) -> Passages:
        if self.task:
            spelled(self.source)
        if not self.task and self.documents is not None:
            raise ValueError(
                f"data.documents has no effect on {self.source}, whose documents are what they are: leave out"
            )
        for name in ("column", "separator", "held_out") if self.task else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"data.{name} has no effect on a task, whose content decides its splits; leave it out")
        return self


class Reading(Strict):
    """A fresh model learns the text, by its next tokens."""

    steps: Count = 600
    rows: Count = Field(default=64, description="documents in a step")
    lr: float = Field(default=3e-3, gt=0, le=1)


class Thinking(Strict):
    """And in which form to think, from a teacher's thoughts about a few documents. Best stopped where thoughts help now
    and then."""

    steps: Count = Field(default=600, description="at most")
    until: float = Field(default=0.4, gt=0, le=1, description="stop when this share of samples is right, held out")
    examples: Count = Field(default=400, description="documents that the teacher has thought about")
    rows: Count = 48
    lr: float = Field(default=3e-3, gt=0, le=1)


class Schooling(Strict):
    """What a fresh model goes through before it can be asked to think."""

    read: Reading = Reading()
    think: Thinking = Thinking()


class Selection(Strict):
    """Which places are worth thinking about: where a proxy does not know the next token."""

    proxy: str | None = Field(default=None, description="a model's folder or run; null: the model as it began to think")
    above: float = Field(default=THRESHOLDS[0], ge=0, description="nats of entropy over the likeliest `top` tokens")
    top: int = Field(default=TOP, ge=2)
    renormalised: bool = Field(default=True, description="those tokens' probabilities are made to sum to one")
    number: Count | None = Field(default=None, description="keep so many places, drawn evenly; null: all")


class Ask(Strict):
    """What stands around the text so far; control tokens may be written out (a chat template's). The answer has to
    have the form <think>...</think><answer>...</answer>, of which `after` may hold the beginning."""

    before: str = ""
    after: str = THINK
    ahead: Count = Field(default=8, description="true tokens that an answer may foretell")

    @property
    def opening(self) -> str:
        return THINK if self.after.endswith(THINK) else ""


class Places(Strict):
    """Held-out places, by the proxy's entropy."""

    every: Few = Field(default=50, description="steps; 0: only at the end")
    each: Count = Field(default=150, description="places of each bucket (trivial, easy, medium, hard)")


class Rpt(Policy):
    """A model and text in, a model that thinks before it says the next token out."""

    recipe: Literal["rpt"]
    data: Passages = Passages()
    model: Model
    schooling: Schooling | None = Field(default=None, description="for a fresh model, on a task's documents")
    select: Selection = Selection()
    ask: Ask = Ask()
    reward: Literal["prefix", "format", "random"] = Field(
        default="prefix", description="format and random are controls, without which a curve proves nothing"
    )
    evaluate: Places = Places()

    @model_validator(mode="after")
    def whole(self) -> Rpt:
        fresh = self.model.load is None
        if fresh and (self.schooling is None or not self.data.task):
            raise ValueError(
                "a fresh model has not learned to think, and only a task's documents come with thoughts to learn from "
                "(data.source=registers schooling={}); or give model.load=FOLDER"
            )
        if not fresh and self.schooling is not None:
            raise ValueError("schooling has no effect on a model that is loaded; leave it out (schooling=null)")
        if fresh and (self.ask.before or self.ask.after != THINK):
            raise ValueError(
                "a fresh model is taught to think behind the text alone; leave ask.before and ask.after out"
            )
        if any(tag in self.ask.after.removesuffix(THINK) for tag in (THINK, THOUGHT, SAY, SAID)):
            raise ValueError(f"ask.after may end with {THINK} and hold no other tag of the answer's form")
        return self


class Rows(Strict):
    """Documents of a step."""

    rows: Count = Field(default=64, description="documents in a step, over all processes")
    micro_tokens: Count = Field(default=8192, description="tokens in a micro-batch")


class RptControl(Course):
    """The same model goes on with plain next-token training on the same documents, for as many FLOPs as an RPT run
    took."""

    recipe: Literal["rpt_control"]
    run: str = Field(min_length=1, description="the RPT run: its start, documents, places and FLOPs are taken")
    targets: Literal["all", "selected"] = Field(
        default="all", description="what is learned: every token, or those at the places that RPT thought about"
    )
    batch: Rows = Rows()
    evaluate: Looking = Looking()
