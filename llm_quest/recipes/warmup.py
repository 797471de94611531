"""A fresh model learns a task's demonstrations before rewards can tell it anything: a run of its own, in `warmup/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llm_quest.data.alphabet import character_tokenizer
from llm_quest.data.demonstrations import DemonstrationFeed
from llm_quest.data.problems import Task, draw
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.hub.files import write_model_json
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder
from llm_quest.models.generation import GenerationDefaults
from llm_quest.objectives.next_token import NextToken
from llm_quest.recipes import seeds
from llm_quest.recipes.grpo_config import Grpo, Warmup
from llm_quest.recipes.sizes import model_config
from llm_quest.recipes.yaml import Settings as Given
from llm_quest.rollouts.evaluation import evaluate_problems
from llm_quest.train.loop import train
from llm_quest.train.optimizers import adamw
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.schedule import schedule
from llm_quest.train.settings import Settings

Say = Callable[[str], None]

CONTEXT = 128
CHUNK = 25
PROBLEMS, SAMPLES = 50, 4


def warmed(
    config: Grpo, part: Warmup, settings: Given, task: Task, folder: Path, parallel: Parallel, say: Say
) -> tuple[Decoder, Tokenizer]:
    """A model of the recipe's sizes that has seen the demonstrations, and its tokenizer of single characters. Done
    already: read from its checkpoint."""
    tokenizer = character_tokenizer(task.alphabet)
    model = build(
        model_config(config.model, settings, vocab=tokenizer.vocab_size, context=CONTEXT),
        seed=seeds.stream(config.seed, "init"),
    )
    model.generation = GenerationDefaults(bos=tokenizer.bos_id, eos=tuple(tokenizer.eos_ids), pad=tokenizer.pad_id)
    objective = parallel.place(NextToken(model))
    feed = DemonstrationFeed(task, tokenizer, rows=part.rows, seed=seeds.stream(config.seed, "demonstrations"))
    problems = [draw(task, "validation", index) for index in range(PROBLEMS)]
    share, step = 0.0, 0
    while step < part.steps and share < part.until:
        step = min((step // CHUNK + 1) * CHUNK, part.steps)
        with Run(folder, identity={"tokenizer": tokenizer.hash}) as run:
            write_model_json(folder, model)
            tokenizer.save(folder / "tokenizer", model_max_length=model.config.context)
            done = train(
                objective,
                feed,
                adamw(model, lr=part.lr, betas=(0.9, 0.95)),
                schedule(part.steps, shape="constant", warmup=min(CHUNK, part.steps)),
                Settings(steps=step, log_every=CHUNK, keep=1, seed=seeds.stream(config.seed, "dropout")),
                run,
                parallel=parallel,
            )
        step = done.step
        if done.status == "interrupted":
            say(f"Interrupted; the warm-up is saved at step {step}. quest train {folder.parent} goes on with it.")
            raise KeyboardInterrupt
        if step % CHUNK and step < part.steps:
            continue  # an interrupted warm-up goes on; it is looked at where it would have been
        model.eval()
        share = evaluate_problems(
            model, tokenizer, problems, samples=SAMPLES, max_new_tokens=config.rollout.new_tokens
        ).mean
    say(f"warm-up: {step} steps on demonstrations; {share:.0%} of samples are right")
    return model, tokenizer
