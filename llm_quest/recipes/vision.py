"""What the two recipes that look have in common: a run folder, the loop, and an outcome with held-out scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llm_quest.contracts import Evaluator, Loader
from llm_quest.data.images import ImageProcessor
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.files import atomic_write_json
from llm_quest.hub.load_save import write_model_json
from llm_quest.models.build import count_parameters, family_of
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.run import (
    RunOutcome,
    build_lr_schedule,
    build_optimizer,
    finish_run,
    make_display,
    open_run_dir,
    require_matching_run,
    train_settings,
)
from llm_quest.recipes.techniques import apply_techniques
from llm_quest.recipes.vision_config import VisionConfig
from llm_quest.train.loop import train
from llm_quest.train.lr_schedule import scale_schedule_after
from llm_quest.train.parallel import DistributedContext

LogFn = Callable[[str], None]


@dataclass(frozen=True)
class ImageTrainingJob:
    """What a recipe has assembled. identity: name -> hash of what a run may not change; facts: about the images, for
    the report; adamw_parameters: what Muon leaves to AdamW; tokenizer: of a model that speaks;
    lr_scale_after: from this step on so much of the rate is left."""

    objective: nn.Module
    loader: Loader
    evaluator: Evaluator
    preprocess: ImageProcessor
    identity: Mapping[str, str]
    facts: Mapping[str, Any]
    adamw_parameters: Sequence[str] = ("embed.", "head.")
    tokenizer: Tokenizer | None = None
    lr_scale_after: tuple[int, float] = (0, 1.0)

    @property
    def model(self) -> Any:
        return self.objective.model


def run_image_job(
    job: ImageTrainingJob,
    config: VisionConfig,
    folder: Path,
    resume: str,
    env: Mapping[str, Any],
    quiet: bool,
    log: LogFn,
    parallel: DistributedContext,
) -> RunOutcome:
    """The loop over an assembled job, in a run folder."""
    chosen = resolve_precision(config.precision, parallel.device)
    config = config.model_copy(update={"precision": chosen.value})
    technique_callbacks = apply_techniques(config.all_techniques, job.model, log)
    parameters = count_parameters(job.model)
    log(f"model: {family_of(job.model.config).name}-style, {parameters:,} parameters, on {parallel.device}")
    log(f"precision: {chosen.value} ({chosen.reason}); compiled: {'yes' if config.compile else 'no'}")
    require_matching_run(config, folder)
    parallel.parallelize(job.objective, fsdp_blocks(job.model))
    with open_run_dir(config, folder, parallel, job.identity, env, resume) as run:
        if parallel.is_main_process:
            write_image_run_metadata(folder, job)
        result = train(
            job.objective,
            job.loader,
            build_optimizer(config, job.model, job.adamw_parameters),
            scale_schedule_after(build_lr_schedule(config), *job.lr_scale_after),
            train_settings(config),
            run,
            parallel=parallel,
            evaluators=[job.evaluator],
            callbacks=technique_callbacks,
            logger=make_display(config, folder, parallel, quiet),
        )
    return finish_run(config, folder, result, parameters, leader=parallel.is_main_process)


def write_image_run_metadata(folder: Path, job: ImageTrainingJob) -> None:
    """What loading, exporting and the report need beside the checkpoints."""
    write_model_json(folder, job.model)
    atomic_write_json(folder / "preprocessor_config.json", job.preprocess.to_preprocessor_config())
    atomic_write_json(folder / "data.json", dict(job.facts))
    if job.tokenizer is not None:
        job.tokenizer.save(folder / "tokenizer", model_max_length=job.model.config.max_position_embeddings)


def fsdp_blocks(model: Any) -> list[nn.Module]:
    """What FSDP shards one by one: every block of every part."""
    return [block for name, part in model.named_modules() if name.endswith("blocks") for block in part]
