"""What a fresh model learns before rewards can tell it anything: a run of its own inside the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.contracts import Feed
from llm_quest.data.alphabet import character_tokenizer
from llm_quest.data.demonstrations import DemonstrationFeed
from llm_quest.data.problems import Task, draw
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.hub.files import write_model_json
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.objectives.next_token import NextToken
from llm_quest.recipes.grpo_config import Grpo, Warmup
from llm_quest.recipes.parts import Course, Model
from llm_quest.recipes.sizes import model_config
from llm_quest.recipes.yaml import Settings as Given
from llm_quest.rollouts.evaluation import evaluate_problems
from llm_quest.train.loop import train
from llm_quest.train.optimizers import adamw
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.schedule import schedule
from llm_quest.train.settings import Settings
from llm_quest.train.state import derive_seed

Say = Callable[[str], None]

CONTEXT = 128
CHUNK = 25
PROBLEMS, SAMPLES = 50, 4


@dataclass(frozen=True)
class Pace:
    """How long a warm-up goes on: at most `steps`, until `share` (looked at every CHUNK steps) reaches `until`."""

    steps: int
    lr: float
    until: float = 1.0
    share: Callable[[], float] | None = None


def warmed(
    config: Grpo, part: Warmup, settings: Given, task: Task, folder: Path, parallel: Parallel, say: Say
) -> tuple[Decoder, Tokenizer]:
    """A model of the recipe's sizes that has seen the demonstrations, and its tokenizer of single characters. Done
    already: read from its checkpoint."""
    tokenizer = character_tokenizer(task.alphabet)
    model = newborn(config.model, settings, tokenizer, config.seed)
    feed = DemonstrationFeed(task, tokenizer, rows=part.rows, seed=derive_seed(config.seed, "demonstrations"))
    problems = [draw(task, "validation", index) for index in range(PROBLEMS)]

    def share() -> float:
        new_tokens = config.rollout.new_tokens
        return evaluate_problems(model, tokenizer, problems, samples=SAMPLES, max_new_tokens=new_tokens).mean

    pace = Pace(part.steps, part.lr, part.until, share)
    step, reached = schooled(config, model, tokenizer, feed, pace, folder, parallel, say)
    say(f"warm-up: {step} steps on demonstrations; {reached:.0%} of samples are right")
    return model, tokenizer


def newborn(part: Model, settings: Given, tokenizer: Tokenizer, seed: int) -> Decoder:
    """A model of the recipe's sizes with first values."""
    numbers: Any = model_config(part, settings, vocab=tokenizer.vocab_size, context=CONTEXT)
    model = build(numbers, seed=derive_seed(seed, "init"))
    model.generation = GenerationDefaults(bos=tokenizer.bos_id, eos=tuple(tokenizer.eos_ids), pad=tokenizer.pad_id)
    return model


def schooled(
    config: Course, model: Decoder, tokenizer: Tokenizer, feed: Feed, pace: Pace, folder: Path, parallel: Parallel,
    say: Say,
) -> tuple[int, float]:  # fmt: skip
    """The model learns from a feed, in a run folder: steps done, and the share it reached. KeyboardInterrupt where the
    user stopped it: what there is is saved."""
    objective = parallel.place(NextToken(model))
    every = CHUNK if pace.share is not None else pace.steps
    share, step = 0.0, 0
    while step < pace.steps and share < pace.until:
        step = min((step // every + 1) * every, pace.steps)
        with Run(folder, identity={"tokenizer": tokenizer.hash}, leader=parallel.leader) as run:
            if parallel.leader:
                write_model_json(folder, model)
                tokenizer.save(folder / "tokenizer", model_max_length=model.config.context)
            done = train(
                objective,
                feed,
                adamw(model, lr=pace.lr, betas=(0.9, 0.95)),
                schedule(pace.steps, shape="constant", warmup=min(CHUNK, pace.steps)),
                Settings(steps=step, log_every=CHUNK, keep=1, seed=derive_seed(config.seed, "dropout")),
                run,
                parallel=parallel,
            )
        step = done.step
        if done.status == "interrupted":
            say(f"Interrupted; the warm-up is saved at step {step}. quest train {folder.parent} goes on with it.")
            raise KeyboardInterrupt
        if step % every and step < pace.steps:
            continue  # an interrupted warm-up goes on; it is looked at where it would have been
        model.eval()
        share = pace.share() if pace.share is not None else 0.0
    return step, share
