"""Held-out problems of a policy's run: sampling their answers, refining them, and the log lines before the first step
and after the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pydantic import Field

from llm_quest.contracts import LogFn
from llm_quest.data.problems import Problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.eval.policy import DrawAnswers, PolicyEvaluator, Refinement
from llm_quest.eval.problems import sample_answers, sample_problems
from llm_quest.eval.self_refinement import RefinePrompts, SelfRefinement
from llm_quest.generation.sampling import SamplingParams
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.config_schema import PositiveInt
from llm_quest.recipes.environment_setup import draw_episodes
from llm_quest.recipes.policy_prompts import PromptEncoder
from llm_quest.recipes.schema import StrictModel
from llm_quest.rollouts.episodes import EpisodeSampler
from llm_quest.rollouts.sampler import RolloutSampler, Sample
from llm_quest.train.arguments import TrainResult


def draw_held_out(
    sampler: RolloutSampler, tokenizer: Tokenizer, encode: PromptEncoder, max_new_tokens: int
) -> DrawAnswers:
    """A function that samples answers as the rollouts do: episodes if there is an environment."""
    if isinstance(sampler, EpisodeSampler):
        return partial(draw_episodes, sampler, encode)
    return partial(draw_answers, tokenizer, encode, max_new_tokens)


def draw_answers(
    tokenizer: Tokenizer, encode: PromptEncoder, max_new_tokens: int, model: Decoder, problems: Sequence[Problem],
    sampling: SamplingParams, n: int, seed: int,
) -> list[list[Sample]]:  # fmt: skip
    """Sample n answers of each problem, in one turn."""
    encode.encode_problems(problems)
    return sample_answers(
        model, tokenizer, problems, sampling, encode_prompt=encode, max_new_tokens=max_new_tokens, n=n, seed=seed
    )


class RefinementConfig(StrictModel):
    """Self-refinement of held-out answers, as `quest eval --refine` has it."""

    rounds: PositiveInt = Field(default=1, description="rounds of feedback and another answer")
    feedback: str = Field(default=RefinePrompts.feedback, min_length=1, description="what asks for feedback")
    refine: str = Field(default=RefinePrompts.refine, min_length=1, description="what asks for another answer")
    stop: str = Field(default=RefinePrompts.stop, min_length=1, description="words of the feedback that end it")


def make_refinement(
    config: RefinementConfig | None, tokenizer: Tokenizer, encode: PromptEncoder, context: int, max_new_tokens: int
) -> Refinement | None:
    """The self-refinement of a policy's held-out answers. context: the model's longest. UsageError where the policy is
    not asked through a chat template."""
    if config is None:
        return None
    if encode.chat is None:
        raise UsageError("eval_refinement is a conversation with the policy: set apply_chat_template=true")
    prompts = RefinePrompts(config.feedback, config.refine, config.stop)
    loop = SelfRefinement(config.rounds, encode.messages, encode.chat.encode_prompts, context, prompts)
    return Refinement(loop, lambda model: partial(complete_greedily, model, tokenizer, max_new_tokens))


def complete_greedily(
    model: Decoder, tokenizer: Tokenizer, max_new_tokens: int, problems: Sequence[Problem],
    prompts: Sequence[list[int]],
) -> list[Sample]:  # fmt: skip
    """The greedy completion of each prompt."""
    greedy = SamplingParams(temperature=0.0)
    groups = sample_problems(model, tokenizer, problems, prompts, greedy, max_new_tokens=max_new_tokens)
    return [group[0] for group in groups]


@dataclass(frozen=True)
class HeldOutLog:
    """Logs the scores of held-out problems before the first step and after the last. failure_lines: of rewards and
    environments."""

    evaluator: PolicyEvaluator
    model: Decoder
    log: LogFn
    failure_lines: Callable[[], Sequence[str]]

    def before(self) -> Mapping[str, float]:
        scores = self.evaluator.evaluate_first(self.model)
        self.log(f"held out, before: {scores.line()}")
        return {f"eval/{name}": value for name, value in scores.metrics().items()}

    def after(self, result: TrainResult) -> list[str]:
        lines = []
        if result.status == "finished":
            kl = f", KL {result.metrics['kl']:.3g} nats a token" if "kl" in result.metrics else ""
            scores = self.evaluator.newest or self.evaluator.scores(self.model.eval())
            lines.append(f"held out, after:  {scores.line()}{kl}")
        return [*lines, *self.failure_lines()]
