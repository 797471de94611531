"""The contract between recipes and what runs, plans and inspects them.

A recipe is a schema and a function that assembles a `Job`; it knows no loop and no run folder. `engine.run_job`, `quest
plan` and `quest inspect-batch` read a job; they know no recipe. `recipes.RECIPES` lists the recipes by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llm_quest.contracts import Callback, Evaluator, Loader, LogFn, MetricsCallback, ParameterScale
from llm_quest.errors import UsageError
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import config_error, load_raw_config, parse_config
from llm_quest.recipes.dependent_defaults import WarmupOf, override_paths, shorten_warmup
from llm_quest.recipes.model_config import model_config_problems
from llm_quest.recipes.schema import did_you_mean
from llm_quest.recipes.yaml_io import ConfigProblem, RawConfig
from llm_quest.train.arguments import TrainResult
from llm_quest.train.optimizers import LRSchedule
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.run_dir import json_safe

if TYPE_CHECKING:
    from llm_quest.data.images import ImageProcessor
    from llm_quest.data.tokenizer import Tokenizer
    from llm_quest.recipes.config_schema import RunConfig


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a run. peak_memory_bytes: the most that this process held, on a GPU what torch allocated there;
    None if the system does not report it. baselines: bits per byte of other methods on the same held-out bytes."""

    run: str
    status: str
    step: int
    steps: int
    exit_code: int
    parameters: int
    seconds: float
    tokens_per_second: float
    metrics: Mapping[str, Any]
    peak_memory_bytes: int | None = None
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """The scores on held-out data, by name."""
        return {name[5:]: value for name, value in self.metrics.items() if name.startswith("eval/")}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"metrics": json_safe(self.metrics), "scores": json_safe(self.scores)}

    def lines(self) -> list[str]:
        """The outcome as lines for the screen."""
        result = [
            f"{self.status} at step {self.step} of {self.steps}, {self.parameters:,} parameters, "
            f"{self.seconds:.0f} s: {self.run}"
        ]
        if self.scores:
            result.append("held out: " + ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items()))
        if self.baselines:
            result.append(
                "others, bits per byte: " + ", ".join(f"{name} {b:.3f}" for name, b in self.baselines.items())
            )
        if self.status != "finished":
            result.append(f"go on with: quest train {self.run}")
        return result


@dataclass(frozen=True)
class Context:
    """The context in which a job is built and run. settings: where each key was written, for messages. resume: auto,
    never or a checkpoint. accept: names of the run's identity that may have changed since its checkpoint. env: facts
    about the machine. planning: the job is built to count its cost or to look at a batch: nothing is trained before the
    loop (no warm-up) and nothing is written."""

    run_dir: Path
    parallel: DistributedContext
    log: LogFn
    settings: RawConfig
    resume: str = "auto"
    accept: tuple[str, ...] = ()
    env: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False
    planning: bool = False

    @property
    def samples_dir(self) -> Path | None:
        """The folder of samples; None on processes that save none."""
        return self.run_dir / "samples" if self.parallel.is_main_process and not self.planning else None


def save_nothing(folder: Path) -> None:
    """Save nothing: the job prepared nothing for the run folder."""


@dataclass(frozen=True)
class Job:
    """An assembled run.

    config: without any `auto`; it is written to the run folder. lr_schedule: None for the config's own. blocks: what
    FSDP shards one by one; None for `model.blocks`. watch_loss: of TrainingArguments. adamw_parameters: prefixes of
    what Muon leaves to AdamW. identity: name -> hash of what a resumed run may not change. facts: about the data, for
    the report. expected_loss: of random weights. prepare: what the loss and the evaluators need of the model before the
    first step (a reference), while it is whole, before it is sharded; what it returns is called with the run folder
    once that is open. before: measures the model that a new run begins with, by name. finish: called after the loop;
    the lines that it returns are logged. baselines: bits per byte of other methods on the held-out data;
    with_baselines: whether a finished run computes them. intervals: name -> 95 % confidence interval of a held-out
    number. parameter_scales: of a parametrization, for the optimizer."""

    config: RunConfig
    objective: nn.Module
    loader: Loader
    evaluators: Sequence[Evaluator]
    identity: Mapping[str, str]
    facts: Mapping[str, Any]
    tokenizer: Tokenizer | None = None
    preprocessor: ImageProcessor | None = None
    callbacks: Sequence[Callback] = ()
    watchers: Sequence[MetricsCallback] = ()
    lr_schedule: LRSchedule | None = None
    blocks: Sequence[nn.Module] | None = None
    adamw_parameters: Sequence[str] = ("embed.", "head.", "value_head.", "value_model.embed.")
    expected_loss: float | None = None
    watch_loss: bool = True
    prepare: Callable[[], Callable[[Path], None]] = lambda: save_nothing
    before: Callable[[], Mapping[str, float]] = dict
    finish: Callable[[TrainResult], Sequence[str]] = lambda result: ()
    baselines: Callable[[], Mapping[str, float]] = dict
    with_baselines: bool = True
    intervals: Callable[[Any], Mapping[str, tuple[float, float]]] = lambda model: {}
    parameter_scales: Mapping[str, ParameterScale] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return self.objective.model


def no_further_rules(config: Any, settings: RawConfig) -> Any:
    """Return the config: the schema checks every rule."""
    return config


@dataclass(frozen=True)
class Recipe:
    """A recipe. name: what `recipe:` says in YAML. Config: the schema. build(config, context): assembles a job.
    check(config, settings): the config after the checks that need the model's own config, or UsageError, so that a dry
    run refuses what the run refuses. run: for a recipe of several jobs, in place of the engine's single one;
    result_dir(run folder): the one of its runs whose model is the result."""

    name: str
    Config: type[RunConfig]
    build: Callable[[Any, Context], Job]
    check: Callable[[Any, RawConfig], Any] = no_further_rules
    run: Callable[[Any, Context], RunOutcome] | None = None
    result_dir: Callable[[Path], Path] = lambda run_dir: run_dir


def no_single_job(config: Any, context: Context) -> Job:
    """`build` of a recipe of several jobs, which has `run` instead."""
    raise UsageError(f"{config.recipe} is a recipe of several runs: it has no single one to plan or to look at")


def get_recipe(name: str) -> Recipe:
    """The recipe of that name."""
    recipe: Recipe = importlib.import_module(RECIPES[name]).RECIPE
    return recipe


def conflicting_lengths(settings: RawConfig) -> list[ConfigProblem]:
    """The problem of `num_train_epochs` and `max_steps` that are both given on the command line, or in one file."""
    epochs, steps = (settings.locations.get((key,)) for key in ("num_train_epochs", "max_steps"))
    if settings.tree.get("num_train_epochs") is None or epochs is None or steps is None:
        return []
    if epochs.startswith("argument ") != steps.startswith("argument "):
        return []  # the command line's takes the place of the file's
    return [ConfigProblem(epochs, "num_train_epochs", "max_steps is given too: leave one of them out")]


def load_recipe(name: str, overrides: Sequence[str]) -> tuple[Recipe, Any, RawConfig]:
    """A recipe, its typed config, and where each key was written. UsageError with every mistake at once. name: of a
    recipe, a YAML file or a run folder. overrides: `key=value` pairs on top."""
    settings = load_raw_config(name, overrides)
    kind = settings.tree.get("recipe")
    if not settings.problems and kind not in RECIPES:
        what = "missing" if kind is None else f"{kind!r} is no kind of recipe{did_you_mean(str(kind), list(RECIPES))}"
        place = settings.location(("recipe",))
        raise config_error([ConfigProblem(place, "recipe", f"{what}; known: {', '.join(RECIPES)}")])
    recipe = get_recipe(str(kind) if kind in RECIPES else "pretrain")
    settings.problems += conflicting_lengths(settings)
    resumed = (Path(settings.source).parent / "checkpoints").is_dir()
    if (overrides or "warmup_steps" not in settings.tree) and not settings.problems and not resumed:
        default = WarmupOf(*(recipe.Config.model_fields[key].default for key in ("warmup_steps", "max_steps")))
        shorten_warmup(settings, override_paths(overrides), load_raw_config(name).tree, default)
    return recipe, parse_config(recipe.Config, settings, model_config_problems(recipe.Config, settings)), settings
