"""`quest quickstart`: the whole way once, offline, in about five minutes, told in plain sentences.

Text -> tokenizer -> pretraining -> an interruption, and going on -> fine-tuning -> preferences -> a conversation ->
reasoning by rewards -> the Hugging Face layout and back -> reports.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from llm_quest.cli.train import load_recipe, make_workload, resolve_model_config, write_plan_and_report
from llm_quest.cost.plan import TrainingPlan, plan_training
from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate
from llm_quest.hub.load_save import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.config import config_differences, load_raw_config, parse_config
from llm_quest.recipes.config_schema import KEYS_FREE_ON_RESUME
from llm_quest.recipes.pretrain_config import PretrainConfig
from llm_quest.recipes.run import RunOutcome

LogFn = Callable[[str], None]

SAMPLE_PROMPTS = ("Return the ", "The value of ")
NGRAM_BASELINE = "Kneser-Ney"


@dataclass(frozen=True)
class QuickstartReport:
    """What the tour reached. bits_per_byte on held-out text, beside the baselines on the same bytes. stages: by recipe,
    what each changed. export: the model that answers and prefers."""

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
        result += ["", "Before and after each stage (held out; shares with their 95 % interval):"]
        result += [f"  {recipe:4}  {stage.line()}" for recipe, stage in self.stages.items()]
        result += [
            "",
            f"Took {self.seconds:.0f} s. The report: {self.report}, and one beside each stage",
            f"The model that answers: {self.export} (transformers loads it)",
        ]
        return [*result, "", "What next:", *(f"  {line}" for line in self.next_steps())]

    def next_steps(self) -> list[str]:
        return [
            f"quest chat {self.export}",
            f"quest generate {self.run} -p 'The '",
            f"quest eval {self.run}",
            "quest diff gpt2 llama                 what is new in Llama, line by line",
            "quest train pretrain data.source=YOUR_FOLDER   the same on your own text",
        ]


class InterruptCallback:
    """After so many steps this process sends itself what Ctrl-C sends. `done`: once is enough."""

    def __init__(self, at: int):
        self.at = at
        self.done = False

    def on_step_end(self, model: Any, step: int) -> None:
        if step == self.at and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)

    def on_step_skipped(self, model: Any) -> None:
        """Nothing was left."""


def run_quickstart(
    out: Path, *, seed: int = 0, device: str = "auto", overrides: Sequence[str] = (),
    stage_overrides: Mapping[str, Sequence[str]] = MappingProxyType({}), log: LogFn,
) -> QuickstartReport:  # fmt: skip
    """The tour, in a folder. An earlier tour in it is replaced; anything else there is left alone (UsageError).

    overrides: settings of the pretraining. stage_overrides: of the stages after it, by recipe."""
    began = time.monotonic()
    settings, config, run = load_recipe("quickstart", [f"seed={seed}", f"device={device}", *overrides])
    clear_previous_run(out, config)
    env = inspect_machine(out.parent if out.parent.exists() else Path()).as_json()
    with announce_interrupt(out, log):
        log("1. Text. No network is needed: Python brings its manual and the documentation of its library.")
        log("2. A tokenizer and a small model in the style of Llama 3: both begin knowing nothing.")
        log(
            f"3. Training for {config.max_steps} steps; a third of the way in, the run is interrupted on purpose, as by"
        )
        log("   Ctrl-C.")
        foreseen = plan_training(make_workload(config, resolve_model_config(config, settings)), measure=True, log=log)
        once = InterruptCallback(max(1, config.max_steps // 3))
        outcome = run(config, settings, out, env=env, callbacks=(once,), log=log)
        resumed_at = outcome.step
        if outcome.status == "interrupted" and once.done:
            log(f"   Interrupted, and saved at step {outcome.step}. It goes on there, and will end with the same bits:")
            outcome = run(config, settings, out, env=env, callbacks=(), log=log)
        require_finished(outcome, log)
        guide = QuickstartContext(out, seed, device, env, log, stage_overrides)
        return finish_quickstart(guide, foreseen, outcome, resumed_at, began)


@contextmanager
def announce_interrupt(out: Path, log: LogFn) -> Iterator[None]:
    """Ctrl-C at any place: what is finished stays, and it is said how to begin again."""
    try:
        yield
    except KeyboardInterrupt:
        log(f"The tour ends here; what it finished stays in {out}. quest quickstart --out {out} begins it anew.")
        raise


def clear_previous_run(out: Path, config: PretrainConfig) -> None:
    """Only what an earlier tour left is removed."""
    if out.is_dir() and any(out.iterdir()):
        old = out / "config.yaml"
        ours = old.is_file() and not config_differences(
            parse_config(PretrainConfig, load_raw_config(str(old))),
            config,
            (*KEYS_FREE_ON_RESUME, "seed", "precision", "compile"),
        )
        if not ours:
            raise UsageError(f"{out} is not empty and not from an earlier tour; choose another --out")
        shutil.rmtree(out)


def finish_quickstart(
    guide: QuickstartContext, training_plan: TrainingPlan, outcome: RunOutcome, resumed_at: int, began: float
) -> QuickstartReport:
    """Look at what was pretrained, go through the stages, export, load again, report."""
    out, log = guide.root, guide.log
    log("4. What it writes now (it has read two and a half megabytes; it knows the tone, not the facts):")
    texts = sample_texts(load(out, dtype="float32"), out)
    for prompt, text in texts.items():
        print_quoted(f"{prompt}{text}", log)
    stages, said = run_stages(guide)
    log("9. Exporting the model that answers to the Hugging Face layout, and loading that again.")
    folder = out / "export"
    export_run(out / "dpo", folder, overwrite=True)
    model, again = load(out / "dpo", dtype="float32"), load(folder, dtype="float32")
    log("10. The report of the pretraining; those of the stages lie beside them.")
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
        answers=said,
        reload_difference=max_logit_difference(model, again),
        exit_code=0,
    )


def run_stages(guide: QuickstartContext) -> tuple[dict[str, StageResult], list[AnsweredQuestion]]:
    """From the pretrained model to one that answers, and one that prefers; and from nothing to one that reasons."""
    log, out = guide.log, guide.root
    log("5. Fine-tuning: questions about Python's functions, and their answers. Only the answers are learned.")
    sft = run_sft_stage(guide)
    log(f"   {sft.line()}")
    log("6. Preferences (DPO): an answer that is one whole sentence is preferred to one that is cut off, or that")
    log("   runs on. How to answer can be learned; what is true takes more than so small a model holds:")
    dpo = run_dpo_stage(guide, out / "sft")
    log(f"   {dpo.line()}")
    log("7. A conversation. It was never taught these questions:")
    said = answer_held_out_questions(guide, out / "dpo")
    for one in said:
        print_quoted("\n".join(one.lines()), log)
    log("8. Reasoning by rewards (GRPO). A new, smaller model learns to reverse words from a teacher who is wrong half")
    log("   of the time; then it is told only whether its own answers are right:")
    grpo = run_grpo_stage(guide)
    log(f"   {grpo.line()}")
    return {"sft": sft, "dpo": dpo, "grpo": grpo}, said


def print_quoted(text: str, log: LogFn) -> None:
    log(f"   | {text}".replace("\n", "\n   | "))


def sample_texts(model: Decoder, folder: Path) -> dict[str, str]:
    """A continuation of each prompt."""
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
