"""`quest quickstart`: the whole workflow once, offline, in three to nine minutes.

Text, tokenizer, pretraining with an interruption and a resume, fine-tuning (SFT), preferences (DPO), a conversation,
GRPO, export to the Hugging Face layout and back, reports.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llm_quest.cli.doctor import inspect_machine
from llm_quest.cli.export import export_run
from llm_quest.cli.quickstart_stages import (
    AnsweredQuestion,
    QuickstartContext,
    StageResult,
    answer_held_out_questions,
    require_finished,
    run_dpo_stage,
    run_grpo_stage,
    run_sft_stage,
)
from llm_quest.cli.train import write_plan_and_report
from llm_quest.contracts import LogFn
from llm_quest.cost.plan import Plan
from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.auto import RESOLVERS
from llm_quest.recipes.config import config_differences, load_raw_config, parse_config
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.planning import plan_recipe
from llm_quest.recipes.pretrain import PretrainConfig
from llm_quest.recipes.recipe import RunOutcome, load_recipe

SAMPLE_PROMPTS = ("Return the ", "The value of ")
NGRAM_BASELINE = "Kneser-Ney"


@dataclass(frozen=True)
class QuickstartReport:
    """Results of the quickstart. bits_per_byte: on held-out text, as the baselines are. stages: the result of each
    recipe. export: the folder of the final model."""

    run: str
    export: str
    report: str
    parameters: int
    seconds: float
    resumed_at: int
    bits_per_byte: float
    baselines: dict[str, float]
    texts: dict[str, str]
    stages: dict[str, StageResult]
    answers: list[AnsweredQuestion]
    reload_difference: float
    exit_code: int

    @property
    def best_ngram(self) -> float:
        return min(bits for name, bits in self.baselines.items() if NGRAM_BASELINE in name)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"best_ngram": self.best_ngram}

    def lines(self) -> list[str]:
        ours = f"this model (llama3-style, {self.parameters:,} parameters)"
        table = sorted({**self.baselines, ours: self.bits_per_byte}.items(), key=lambda one: one[1])
        result = ["", "Held-out text, bits per byte (fewer is better):"]
        result += [f"  {bits:6.3f}  {name}{'  <--' if name == ours else ''}" for name, bits in table]
        result += ["", "Before and after each stage (held-out data; shares with their 95 % interval):"]
        result += [f"  {recipe:4}  {stage.line()}" for recipe, stage in self.stages.items()]
        result += [
            "",
            f"Took {self.seconds:.0f} s. Report: {self.report}; each stage has its own",
            f"The final model: {self.export} (transformers loads it)",
        ]
        return [*result, "", "What next:", *(f"  {line}" for line in self.next_steps())]

    def next_steps(self) -> list[str]:
        return [
            f"quest chat {self.export}",
            f"quest generate {self.run} -p 'The '",
            f"quest eval {self.run}",
            "quest diff gpt2 llama                 the changes from GPT-2 to Llama, line by line",
            "quest train pretrain data.source=YOUR_FOLDER   the same on your own text",
        ]


class InterruptCallback:
    """Sends SIGINT to this process, once, after step `at`."""

    def __init__(self, at: int):
        self.at = at
        self.done = False

    def on_step_end(self, model: Any, step: int) -> None:
        if step == self.at and not self.done:
            self.done = True
            signal.raise_signal(signal.SIGINT)

    def on_step_skipped(self, model: Any) -> None:
        """A skipped step is not counted."""


def run_quickstart(
    out: Path, *, seed: int = 0, device: str = "auto", overrides: Sequence[str] = (),
    stage_overrides: Mapping[str, Sequence[str]] = MappingProxyType({}), log: LogFn,
) -> QuickstartReport:  # fmt: skip
    """Run the quickstart in a folder. An earlier quickstart there is replaced; a folder with other files is refused
    (UsageError).

    overrides: settings of the pretraining. stage_overrides: settings of the later stages, by recipe."""
    began = time.monotonic()
    require_folder(out)
    recipe, config, settings = load_recipe("quickstart", [f"seed={seed}", f"device={device}", *overrides])
    clear_previous_run(out, config)
    env = inspect_machine(out.parent if out.parent.exists() else Path()).as_json()
    with announce_interrupt(out, log):
        log("1. Text: the documentation that is installed with Python. No network is needed.")
        log("2. A tokenizer and a small Llama 3 model, both trained from scratch.")
        log(f"3. Training for {config.max_steps} steps. After a third of them an interrupt is sent on purpose, as by")
        log("   Ctrl-C.")
        training_plan = plan_recipe(recipe, config, settings, out, measure=True, log=log)
        once = InterruptCallback(max(1, config.max_steps // 3))
        outcome = run_recipe(recipe, config, settings, out, env=env, callbacks=(once,), log=log)
        resumed_at = outcome.step
        if outcome.status == "interrupted" and once.done:
            log(f"   Interrupted and saved at step {outcome.step}. It resumes there and ends with the same bits:")
            outcome = run_recipe(recipe, config, settings, out, env=env, log=log)
        require_finished(outcome, log)
        context = QuickstartContext(out, seed, device, env, log, stage_overrides)
        return finish_quickstart(context, training_plan, outcome, resumed_at, began)


@contextmanager
def announce_interrupt(out: Path, log: LogFn) -> Iterator[None]:
    """At Ctrl-C, say which files stay and how to start again."""
    try:
        yield
    except KeyboardInterrupt:
        log(f"Interrupted. The finished stages stay in {out}; quest quickstart --out {out} starts again.")
        raise


def require_folder(out: Path) -> None:
    """UsageError where a file is in the way of a folder, before anything is measured or trained."""
    there = next((one for one in (out, *out.absolute().parents) if one.exists()), out)
    if there.exists() and not there.is_dir():
        raise UsageError(f"{out} cannot be a folder: {there} is a file; choose another --out")


def clear_previous_run(out: Path, config: PretrainConfig) -> None:
    """Remove the files of an earlier quickstart; UsageError if the folder holds anything else."""
    if out.is_dir() and any(out.iterdir()):
        old = out / "config.yaml"
        ours = old.is_file() and not config_differences(
            parse_config(PretrainConfig, load_raw_config(str(old))),
            config,
            (*KEYS_FREE_ON_RESUME, "seed", *RESOLVERS),
        )
        if not ours:
            raise UsageError(f"{out} is not empty and not from an earlier quickstart; choose another --out")
        shutil.rmtree(out)


def finish_quickstart(
    context: QuickstartContext, training_plan: Plan, outcome: RunOutcome, resumed_at: int, began: float
) -> QuickstartReport:
    """Sample from the pretrained model, run the later stages, export, load again, report."""
    out, log = context.root, context.log
    log("4. Samples (after 2.5 MB of text it imitates the style; it does not know facts):")
    texts = sample_texts(load(out, dtype="float32"), out)
    for prompt, text in texts.items():
        print_quoted(f"{prompt}{text}", log)
    stages, answers = run_stages(context)
    log("9. Exporting the DPO model to the Hugging Face layout, and loading it again.")
    folder = out / "export"
    export_run(out / "dpo", folder, overwrite=True)
    model, again = load(out / "dpo", dtype="float32"), load(folder, dtype="float32")
    log("10. The report of the pretraining. Each later stage has its own.")
    write_plan_and_report(out, training_plan, log)
    return QuickstartReport(
        run=str(out),
        export=str(folder),
        report=str((out / "report.html").resolve()),
        parameters=outcome.parameters,
        seconds=time.monotonic() - began,
        resumed_at=resumed_at,
        bits_per_byte=float(outcome.metrics["eval/bits_per_byte"]),
        baselines=dict(outcome.baselines),
        texts=texts,
        stages=stages,
        answers=answers,
        reload_difference=max_logit_difference(model, again),
        exit_code=0,
    )


def run_stages(context: QuickstartContext) -> tuple[dict[str, StageResult], list[AnsweredQuestion]]:
    """SFT and DPO of the pretrained model, a conversation, and GRPO of a new model."""
    log, out = context.log, context.root
    log("5. Fine-tuning (SFT) on questions about Python's functions. Only the answers have a loss.")
    sft = run_sft_stage(context)
    log(f"   {sft.line()}")
    log("6. Preferences (DPO): an answer of one whole sentence is preferred to one that is cut off or too long.")
    log("   The form of an answer can be learned; facts need a larger model:")
    dpo = run_dpo_stage(context, out / "sft")
    log(f"   {dpo.line()}")
    log("7. A conversation, with questions that it was not trained on:")
    answers = answer_held_out_questions(context, out / "dpo")
    for answer in answers:
        print_quoted("\n".join(answer.lines()), log)
    log("8. Reinforcement learning (GRPO). A new, smaller model first imitates demonstrations of reversed words of")
    log("   which half are wrong; then its only signal is whether its own answers are right:")
    grpo = run_grpo_stage(context)
    log(f"   {grpo.line()}")
    return {"sft": sft, "dpo": dpo, "grpo": grpo}, answers


def print_quoted(text: str, log: LogFn) -> None:
    log(f"   | {text}".replace("\n", "\n   | "))


def sample_texts(model: Decoder, folder: Path) -> dict[str, str]:
    """Generate a continuation of each prompt."""
    tokenizer = load_tokenizer(folder)
    starts = [
        [tokenizer.start_token_id, *tokenizer.encode(prompt, add_special_tokens=False)] for prompt in SAMPLE_PROMPTS
    ]
    done = generate(model, starts, max_new_tokens=80, temperature=0.7, top_p=0.95, tokenizer=tokenizer)
    return {prompt: one.text or "" for prompt, one in zip(SAMPLE_PROMPTS, done, strict=True)}


@torch.inference_mode()
def max_logit_difference(model: Decoder, again: Decoder) -> float:
    """The largest difference between two models' logits on some tokens."""
    tokens = torch.arange(64)[None] % model.config.vocab_size
    return float((model(tokens) - again(tokens)).abs().max())
