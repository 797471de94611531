"""What the two recipes that look have in common: a run folder, the loop, and an outcome with held-out scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llm_quest.contracts import Feed, Probe
from llm_quest.data.images import Preprocess
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.disk import replace_json
from llm_quest.hub.files import write_model_json
from llm_quest.models.build import count_parameters, page_of
from llm_quest.recipes.choices import precision
from llm_quest.recipes.course import Outcome, ended, folder_of, loop_settings, optimizer, require_same_run, shown
from llm_quest.recipes.techniques import applied_all
from llm_quest.recipes.vision_config import Vision
from llm_quest.techniques.checkpointing import Checkpointing
from llm_quest.train.loop import train
from llm_quest.train.parallel import Parallel
from llm_quest.train.schedule import schedule, slowed

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a recipe has assembled. identity: name -> hash of what a run may not change; facts: about the images, for
    the report; by_adamw: what Muon leaves to AdamW; tokenizer: of a model that speaks;
    slower: from this step on so much of the rate is left."""

    objective: nn.Module
    feed: Feed
    probe: Probe
    preprocess: Preprocess
    identity: Mapping[str, str]
    facts: Mapping[str, Any]
    by_adamw: Sequence[str] = ("embed.", "head.")
    tokenizer: Tokenizer | None = None
    slower: tuple[int, float] = (0, 1.0)

    @property
    def model(self) -> Any:
        return self.objective.model


def carried_out(
    job: Job,
    config: Vision,
    folder: Path,
    resume: str,
    env: Mapping[str, Any],
    quiet: bool,
    say: Say,
    parallel: Parallel,
) -> Outcome:
    """The loop over an assembled job, in a run folder."""
    chosen = precision(config.precision, parallel.device)
    config = config.model_copy(update={"precision": chosen.value})
    riding = applied_all(config.techniques, job.model, say)
    parameters = count_parameters(job.model)
    say(f"model: {page_of(job.model.config).name}-style, {parameters:,} parameters, on {parallel.device}")
    say(f"precision: {chosen.value} ({chosen.why}); compiled: {'yes' if config.compile else 'no'}")
    require_same_run(config, folder)
    if config.activation_checkpointing:
        Checkpointing()(job.model)
    parallel.place(job.objective, blocks(job.model))
    with folder_of(config, folder, parallel, job.identity, env, resume) as run:
        if parallel.leader:
            describe(folder, job)
        result = train(
            job.objective,
            job.feed,
            optimizer(config.optimizer, job.model, job.by_adamw),
            slowed(schedule(config.steps, **config.schedule.model_dump()), *job.slower),
            loop_settings(config),
            run,
            parallel=parallel,
            probes=[job.probe],
            callbacks=riding,
            display=shown(config, folder, parallel, quiet),
        )
    return ended(config, folder, result, parameters, leader=parallel.leader)


def describe(folder: Path, job: Job) -> None:
    """What loading, exporting and the report need beside the checkpoints."""
    write_model_json(folder, job.model)
    replace_json(folder / "preprocessor_config.json", job.preprocess.publish())
    replace_json(folder / "data.json", dict(job.facts))
    if job.tokenizer is not None:
        job.tokenizer.save(folder / "tokenizer", model_max_length=job.model.config.context)


def blocks(model: Any) -> list[nn.Module]:
    """What FSDP shards one by one: every block of every part."""
    return [block for name, part in model.named_modules() if name.endswith("blocks") for block in part]
