"""`quest eval RUN`: the evaluations of a run on its held-out data, with the model of one of its checkpoints.

The job is assembled again from the run's config.yaml, with the recipe's own evaluators and data, so the numbers are
those that the run printed at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_quest.contracts import LogFn
from llm_quest.errors import DataError, UsageError
from llm_quest.formatting import align_columns
from llm_quest.hub.load_save import load
from llm_quest.hub.locate import locate_model, resolve_checkpoint, run_of_checkpoint
from llm_quest.manifest import read_manifest
from llm_quest.progress import phase
from llm_quest.recipes.config import load_run_config, parse_config
from llm_quest.recipes.engine import init_distributed
from llm_quest.recipes.recipe import Context, Job, get_recipe
from llm_quest.recipes.yaml_io import apply_overrides
from llm_quest.train.checkpoint import checkpoint_step
from llm_quest.train.rng_state import evaluation_mode
from llm_quest.train.step import autocast

SCORED = "eval"
"""The name of the evaluators that measure; the others write samples."""


@dataclass(frozen=True)
class HeldOutReport:
    """Numbers on a run's held-out data. step: of the checkpoint. intervals: name -> 95 % confidence interval.
    baselines: what other methods reach on the same data."""

    run: str
    recipe: str
    step: int
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The scores stand by their own names too."""
        return {**self.scores, **asdict(self)}

    def lines(self) -> list[str]:
        between = {name: f"(95 %: {low:.4f} to {high:.4f})" for name, (low, high) in self.intervals.items()}
        rows = [(name, f"{value:.4f}", between.get(name, "")) for name, value in self.scores.items()]
        result = [f"{self.run}: {self.recipe}, step {self.step:,}, on what it held out"]
        result += align_columns(rows)
        if self.baselines:
            others = sorted(self.baselines.items(), key=lambda one: one[1])
            result += ["", "others on the same bytes, in bits per byte"]
            result += align_columns([(f"  {name}", f"{bits:.4f}") for name, bits in others], right=(1,))
        return result


def find_run(name_or_path: str) -> Path | None:
    """The run folder of a run or of one of its checkpoints; None for anything else."""
    folder = run_of_checkpoint(resolve_checkpoint(name_or_path).resolve())
    return folder if (folder / "config.yaml").is_file() else None


def evaluate_run(name_or_path: str, overrides: Sequence[str] = (), *, log: LogFn) -> HeldOutReport:
    """Evaluate the newest checkpoint of a run, or one of its checkpoints. overrides: settings in place of the run's,
    such as `device=cpu`. DataError if the run's data have changed."""
    run_dir = find_run(name_or_path)
    if run_dir is None:
        raise UsageError(
            f"{name_or_path} is not a run, which holds out data of its own; name a text (--data FILE, or --data "
            "builtin:topics), or problems (--task)"
        )
    named_run = Path(name_or_path).expanduser().resolve() == run_dir
    run_dir = get_recipe(str(load_run_config(run_dir).tree["recipe"])).result_dir(run_dir)
    chosen = run_dir if named_run else resolve_checkpoint(name_or_path)
    settings = apply_overrides(load_run_config(run_dir), list(overrides))
    recipe = get_recipe(str(settings.tree["recipe"]))
    config = parse_config(recipe.Config, settings)
    with init_distributed(config, 1) as parallel:
        context = Context(run_dir, parallel, log, settings, planning=True)
        with phase("preparing"):
            job = recipe.build(config, context)
        if not any(evaluator.name == SCORED for evaluator in job.evaluators):
            raise UsageError(f"{run_dir} held nothing out (data.held_out=0): name a text, --data FILE, or --task")
        checkpoint = locate_model(chosen).folder
        require_same_data(job, checkpoint, run_dir)
        return measure(job, context, str(chosen), checkpoint)


def require_same_data(job: Job, checkpoint: Path, run_dir: Path) -> None:
    """Raise DataError if the data are not those that the run was trained with."""
    saved = read_manifest(checkpoint)["identity"]
    changed = [name for name, value in job.identity.items() if saved.get(name, value) != value]
    if changed:
        raise DataError(
            f"{run_dir} was trained with another {' and '.join(changed)} than there is now, so that what it held out "
            "is not known any more; bring the old files back, or name a text: --data FILE"
        )


def measure(job: Job, context: Context, name: str, checkpoint: Path) -> HeldOutReport:
    """Run the job's evaluators as after its last step, in the precision of the run."""
    config, device = job.config, context.parallel.device
    with phase("preparing the reference"):
        job.prepare()
    model: Any = load(checkpoint, device=device, dtype="float32", aligned=True)
    scores: dict[str, float] = {}
    with evaluation_mode(model), autocast(config.precision, device):
        for evaluator in job.evaluators:
            if evaluator.name == SCORED:
                with phase("evaluating"):
                    scores |= evaluator.evaluate(model, config.max_steps)
        with phase("measuring intervals"):
            intervals = job.intervals(model)
    return HeldOutReport(name, config.recipe, checkpoint_step(checkpoint), scores, intervals, job.baselines())
