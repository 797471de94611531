"""The held-out part of a policy's run: how its answers are drawn, and what is said before the first step and after the
last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from llm_quest.contracts import LogFn
from llm_quest.data.problems import Problem
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.eval.policy import DrawAnswers, PolicyEvaluator
from llm_quest.eval.problems import sample_answers
from llm_quest.generation.sampling import SamplingParams
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.environment_setup import draw_episodes
from llm_quest.recipes.policy_prompts import PromptEncoder
from llm_quest.rollouts.episodes import EpisodeSampler
from llm_quest.rollouts.sampler import RolloutSampler, Sample
from llm_quest.train.arguments import TrainResult


def draw_held_out(
    sampler: RolloutSampler, tokenizer: Tokenizer, encode: PromptEncoder, max_new_tokens: int
) -> DrawAnswers:
    """Draws answers as the rollouts do: episodes where there is an environment."""
    if isinstance(sampler, EpisodeSampler):
        return partial(draw_episodes, sampler, encode)
    return partial(draw_answers, tokenizer, encode, max_new_tokens)


def draw_answers(
    tokenizer: Tokenizer, encode: PromptEncoder, max_new_tokens: int, model: Decoder, problems: Sequence[Problem],
    sampling: SamplingParams, n: int, seed: int,
) -> list[list[Sample]]:  # fmt: skip
    """n answers of each problem, in one turn."""
    encode.encode_problems(problems)
    return sample_answers(
        model, tokenizer, problems, sampling, encode_prompt=encode, max_new_tokens=max_new_tokens, n=n, seed=seed
    )


@dataclass(frozen=True)
class HeldOutLog:
    """What is said of the held-out problems before the first step and after the last. failure_lines: of rewards and
    environments."""

    evaluator: PolicyEvaluator
    model: Decoder
    log: LogFn
    failure_lines: Callable[[], Sequence[str]]

    def before(self) -> Mapping[str, float]:
        found = self.evaluator.evaluate_first(self.model)
        self.log(f"held out, before: {found.line()}")
        return {f"eval/{name}": value for name, value in found.metrics().items()}

    def after(self, result: TrainResult) -> list[str]:
        lines = []
        if result.status == "finished":
            kl = f", KL {result.metrics['kl']:.3g} nats a token" if "kl" in result.metrics else ""
            found = self.evaluator.newest or self.evaluator.scores(self.model.eval())
            lines.append(f"held out, after:  {found.line()}{kl}")
        return [*lines, *self.failure_lines()]
