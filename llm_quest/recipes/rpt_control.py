"""`quest train rpt_control run=RUN`: what RPT has to be compared with. Its start goes on with plain next-token training
on the same documents for as many FLOPs as RPT took, its places searched and its samples drawn included.

A step of n documents of T tokens costs 3 (a T + b T^2) each (`models/flops.py`); the run ends with the first step that
reaches what RPT spent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from llm_quest.contracts import Probe
from llm_quest.data.whole import WholeFeed
from llm_quest.disk import replace_text
from llm_quest.errors import DataError, UsageError
from llm_quest.models.flops import Cost, cost_of
from llm_quest.objectives.next_token import NextToken
from llm_quest.recipes.choices import precision
from llm_quest.recipes.config import as_yaml, gather, resolve
from llm_quest.recipes.course import Outcome, company, require_same_run
from llm_quest.recipes.foretold import TABLES, ByBucket
from llm_quest.recipes.policy import Say
from llm_quest.recipes.rpt import Made, foretelling
from llm_quest.recipes.rpt_config import Rpt, RptControl
from llm_quest.recipes.rpt_start import start_of
from llm_quest.recipes.rpt_text import Passage, Places, kept, passage
from llm_quest.recipes.tuning import Job, carried_out, edited, opened
from llm_quest.recipes.tuning_config import Start
from llm_quest.recipes.yaml import Settings
from llm_quest.rollouts.metered import TERA
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.state import derive_seed


def train_rpt_control(
    config: RptControl, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder."""
    with company(config, config.batch.rows) as parallel:
        say = say if parallel.leader else lambda text: None
        rpt, teraflops = compared_with(config.run)
        chosen = precision(config.precision, parallel.device).value
        config = config.model_copy(update={"precision": chosen, "compile": config.compile is True})
        config, made = assembled(config, settings, rpt, teraflops, out, parallel, say)
        made.eye.show("before", say)
        outcome = carried_out(made.job, config, out, resume, env or {}, quiet, say, parallel)
        if outcome.status == "finished":
            made.eye.show("after", say)
        return outcome


def compared_with(run: str) -> tuple[Rpt, float]:
    """The RPT run's settings, and what it spent."""
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"run={run} is no run folder; train one first: quest train rpt --out {run}")
    found = gather(str(folder))
    if found.tree.get("recipe") != "rpt":
        raise UsageError(f"{run} is a run of the recipe {found.tree.get('recipe')}; give one of rpt")
    summary = folder / "summary.json"
    told = json.loads(summary.read_text()) if summary.is_file() else {}
    if told.get("status") != "finished":
        raise UsageError(f"{run} is not finished, so what it takes is not known: quest train {run}")
    return resolve(Rpt, found), float(told["metrics"]["teraflops"])


def assembled(
    config: RptControl, settings: Settings, rpt: Rpt, teraflops: float, out: Path, parallel: Parallel, say: Say
) -> tuple[RptControl, Made]:
    """The config with its steps, which the compute decides; model, documents, objective."""
    model, tokenizer = opened(Start(load=start_of(rpt, Path(config.run))))
    model.to(parallel.device)
    text = passage(rpt, tokenizer, model.config.context, parallel, say)
    found = kept(Path(config.run), {"documents": text.hash})
    if found is None:
        raise DataError(f"the places of {config.run} belong to another text than its config names; train it anew")
    riding = edited(config, model, say)
    feed = documents(config, text, found, parallel)
    spent = Spent(feed, cost_of(model))
    config = with_steps(config, settings, spent, teraflops)
    say(f"compute: {teraflops:.4g} teraflops of RPT are {config.steps:,} steps of {config.batch.rows} documents")
    require_same_run(config, out)
    if parallel.leader:
        out.mkdir(parents=True, exist_ok=True)
        replace_text(out / "config.yaml", as_yaml(config))
    looked = foretelling(rpt, model, tokenizer, text, found, parallel)
    eye = ByBucket(looked, model, config.evaluate.every, out / TABLES if parallel.leader else None)

    def probes(run: Run) -> Sequence[Probe]:
        eye.samples = run.samples if run.leader else None
        return [eye]

    facts = {"source": rpt.data.source, **found.facts, "tokenizer_sha256": tokenizer.hash, "rpt": config.run}
    identity = {"documents": text.hash}
    return config, Made(Job(NextToken(model), feed, probes, tokenizer, facts, identity, [*riding, spent]), eye)


def documents(config: RptControl, text: Passage, found: Places, parallel: Parallel) -> WholeFeed:
    """The documents that RPT thought about, each whole."""
    places: dict[int, list[int]] = {}
    for one in found.train:
        places.setdefault(one.document, []).append(one.place)
    numbers = sorted(places)
    return WholeFeed(
        [text.train[number] for number in numbers],
        rows=config.batch.rows,
        seed=derive_seed(config.seed, "order"),
        learn=[places[number] for number in numbers] if config.targets == "selected" else None,
        micro_tokens=config.batch.micro_tokens,
        share=parallel.share,
    )


class Spent:
    """A callback that tells what has been spent, over all processes. `at(step)` is a function of the step alone."""

    def __init__(self, feed: WholeFeed, cost: Cost):
        self.feed, self.cost = feed, cost
        self.sums = [0.0]

    def at(self, step: int) -> float:
        """FLOPs after so many steps."""
        while len(self.sums) <= step:
            first = (len(self.sums) - 1) * self.feed.rows
            rows = (self.feed.documents[self.feed.number(first + place)] for place in range(self.feed.rows))
            self.sums.append(self.sums[-1] + sum(self.cost.training(len(ids) - 1) for ids in rows))
        return self.sums[step]

    def after_step(self, model: nn.Module, step: int) -> Mapping[str, float]:
        return {"teraflops": self.at(step) / TERA}

    def after_refusal(self, model: nn.Module) -> None:
        """Nothing is kept between steps: a refused one has been paid for like the others."""


def with_steps(config: RptControl, settings: Settings, spent: Spent, teraflops: float) -> RptControl:
    """As many steps as the compute allows for. UsageError where another number was asked for."""
    steps = 1
    while spent.at(steps) < teraflops * TERA:
        steps += 1
    if "steps" in settings.tree and config.steps != steps:
        raise UsageError(
            f"steps follows from what {config.run} spent and is {steps:,}, not {config.steps:,}: leave it out"
        )
    warmup = min(config.schedule.warmup, steps)
    return config.model_copy(update={"steps": steps, "schedule": config.schedule.model_copy(update={"warmup": warmup})})
