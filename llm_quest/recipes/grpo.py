"""`quest train grpo`: a model, problems that can be checked -> a model that solves more of them.

      questions -> samples -> rewards -> advantages -> policy gradient, with held-out accuracy before, during and after

How a policy learns from its samples is in `recipes/policy.py`; here is what it is asked, and who judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm_quest.contracts import Probe, Reward
from llm_quest.data.chat import Chat
from llm_quest.data.problems import Drawn, Problem, draw, spelled
from llm_quest.data.problems.problem import chance
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.hub.gsm8k import is_gsm8k, learned_and_held
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.reward_model import scores
from llm_quest.recipes.course import Outcome
from llm_quest.recipes.grpo_config import Grpo, Named
from llm_quest.recipes.policy import entered, learner
from llm_quest.recipes.policy_probes import Extremes, HeldOut
from llm_quest.recipes.tuning import Job, Say, carried_out, opened
from llm_quest.recipes.tuning_config import Start
from llm_quest.recipes.warmup import warmed
from llm_quest.recipes.yaml import Settings
from llm_quest.rollouts.doctor import Doctor
from llm_quest.rollouts.rewards import Correct, FormatOnly, RandomReward
from llm_quest.rollouts.scored import Scored
from llm_quest.rollouts.scoring import Judge
from llm_quest.rollouts.steps import step_rewards
from llm_quest.rollouts.writer import Question
from llm_quest.techniques.score_head import score_head
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.state import derive_seed

Encode = Callable[[str], list[int]]


def train_grpo(
    config: Grpo, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder."""
    with entered(config, out, say) as (config, parallel, tell):
        made = assembled(config, settings, out, parallel, tell)
        before = made.held.accuracy(made.job.model)
        tell(f"held out, before: accuracy {before.greedy}")
        outcome = carried_out(made.job, config, out, resume, env or {}, quiet, tell, parallel)
        if outcome.status == "finished":
            tell(f"held out, after:  accuracy {made.held.accuracy(made.job.model.eval()).greedy}")
        return outcome


@dataclass(frozen=True)
class Made:
    """The recipe's job, and the eye it keeps on held-out problems."""

    job: Job
    held: HeldOut


def assembled(config: Grpo, settings: Settings, out: Path, parallel: Parallel, say: Say) -> Made:
    """Model, problems, rollouts, objective."""
    problems = posed(config)
    model, tokenizer = begun(config, settings, out, parallel, say)
    model.to(parallel.device)
    encode = asking(config, tokenizer)
    judges = [Judge(one.name, rewarding(config, one, tokenizer, parallel), one.weight) for one in config.rewards]
    steps = partial(step_rewards, tokenizer) if config.process else None
    made = learner(
        config, model, tokenizer, partial(question, problems, encode), judges, parallel, say,
        separately=config.separately, steps=steps,
    )  # fmt: skip
    held = HeldOut(
        problems.held_out, tokenizer, encode, config.evaluate.every, config.rollout.new_tokens,
        config.evaluate.samples, config.rollout.temperature, derive_seed(config.seed, "evaluation"),
    )  # fmt: skip

    def probes(run: Run) -> Sequence[Probe]:
        held.folder = run.samples if run.leader else None
        return [held, Extremes(made.objective, config.log_every)]

    facts = {"task": config.task, "held_out_problems": len(problems.held_out), "tokenizer_sha256": tokenizer.hash}
    job = Job(
        made.objective, made.feed, probes, tokenizer, facts, {"task": problems.identity}, made.riding,
        watchers=[Doctor(config.patience)],
    )  # fmt: skip
    return Made(job, held)


@dataclass(frozen=True)
class Posed:
    """Problem number i of an endless list to learn from, and those that are held out."""

    train: Callable[[int], Problem]
    held_out: list[Problem]
    identity: str


def posed(config: Grpo) -> Posed:
    """A task's own splits, or GSM8K's: its training part in a new order every epoch, a part of it held out."""
    seed, number = derive_seed(config.seed, "order"), config.evaluate.problems
    if not is_gsm8k(config.task):
        task = spelled(config.task)
        return Posed(partial(Drawn(task), seed), [draw(task, "validation", i, seed) for i in range(number)], repr(task))
    learned, held = learned_and_held(config.task)
    return Posed(partial(in_turn, learned, seed), held[:number], f"{config.task}: {len(learned)}")


def in_turn(problems: Sequence[Problem], seed: int, index: int) -> Problem:
    """Every problem once per epoch, in an order of its own."""
    epoch, place = divmod(index, len(problems))
    order = list(range(len(problems)))
    chance("order", seed, epoch).shuffle(order)
    return problems[order[place]]


def begun(config: Grpo, settings: Settings, out: Path, parallel: Parallel, say: Say) -> tuple[Decoder, Tokenizer]:
    """The model that is loaded, or a fresh one that has been warmed up."""
    if config.model.load is not None:
        return opened(Start(load=config.model.load))
    assert config.warmup is not None
    return warmed(config, config.warmup, settings, spelled(config.task), out / "warmup", parallel, say)


def asking(config: Grpo, tokenizer: Tokenizer) -> Encode:
    """From a problem's prompt to ids: as plain text after the start token, or through the chat template."""
    if not config.chat:
        return lambda text: [tokenizer.start_id, *tokenizer.encode(text, template=False)]
    chat = Chat(tokenizer)
    return lambda text: chat.prompt([{"role": "user", "content": text}])


def question(problems: Posed, encode: Encode, index: int) -> Question:
    """Number `index` of those to learn from."""
    problem = problems.train(index)
    return Question(tuple(encode(problem.prompt)), problem)


def rewarding(config: Grpo, one: Named, tokenizer: Tokenizer, parallel: Parallel) -> Reward:
    return judge_called(str(one.load), tokenizer, parallel) if one.name == "model" else REWARDS[one.name](config)


def judge_called(where: str, tokenizer: Tokenizer, parallel: Parallel) -> Reward:
    """A reward model that reads the policy's ids."""
    judge = load(where, dtype="float32", aligned=True).to(parallel.device)
    if score_head(judge) is None:
        raise UsageError(f"{where} is no reward model; train one (quest train reward)")
    if load_tokenizer(where).hash != tokenizer.hash:
        raise UsageError(f"{where} has another tokenizer than the policy: it would read other ids than were sampled")
    return Scored(partial(scores, judge))


REWARDS: dict[str, Callable[[Grpo], Reward]] = {
    "correct": lambda config: Correct(),
    "format": lambda config: FormatOnly(),
    "random": lambda config: RandomReward(derive_seed(config.seed, "random reward")),
}
