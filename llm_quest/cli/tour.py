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

from llm_quest.cli.exporting import export
from llm_quest.cli.machine import doctor
from llm_quest.cli.planning import Plan, plan
from llm_quest.cli.stages import Answer, Guide, Stage, answers, conversation, preferences, reasons, require_whole
from llm_quest.cli.training import conclude, sizes, understood, work
from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate
from llm_quest.hub.files import load, load_tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.config import differences, gather, resolve
from llm_quest.recipes.course import Outcome
from llm_quest.recipes.parts import FREE
from llm_quest.recipes.pretrain_config import Pretrain

Say = Callable[[str], None]

PROMPTS = ("Return the ", "The value of ")
NGRAM = "Kneser-Ney"


@dataclass(frozen=True)
class Tour:
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
    stages: dict[str, Stage]
    answers: list[Answer]
    reload_difference: float
    exit_code: int

    @property
    def best_ngram(self) -> float:
        return min(bits for name, bits in self.baselines.items() if NGRAM in name)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"best_ngram": self.best_ngram}

    def lines(self) -> list[str]:
        ours = f"this model (llama3-style, {self.parameters:,} parameters)"
        table = sorted({**self.baselines, ours: self.bits_per_byte}.items(), key=lambda one: one[1])
        told = ["", "Held-out text, bits per byte (fewer is better):"]
        told += [f"  {bits:6.3f}  {name}{'  <--' if name == ours else ''}" for name, bits in table]
        told += ["", "Before and after each stage (held out; shares with their 95 % interval):"]
        told += [f"  {recipe:4}  {stage.line()}" for recipe, stage in self.stages.items()]
        told += [
            "",
            f"Took {self.seconds:.0f} s. The report: {self.report}, and one beside each stage",
            f"The model that answers: {self.export} (transformers loads it)",
        ]
        return [*told, "", "What next:", *(f"  {line}" for line in self.next_steps())]

    def next_steps(self) -> list[str]:
        return [
            f"quest chat {self.export}",
            f"quest generate {self.run} -p 'The '",
            f"quest eval {self.run}",
            "quest diff gpt2 llama                 what is new in Llama, line by line",
            "quest train pretrain data.source=YOUR_FOLDER   the same on your own text",
        ]


class Interruption:
    """After so many steps this process sends itself what Ctrl-C sends. `done`: once is enough."""

    def __init__(self, at: int):
        self.at = at
        self.done = False

    def after_step(self, model: Any, step: int) -> None:
        if step == self.at and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)

    def after_refusal(self, model: Any) -> None:
        """Nothing was left."""


def tour(
    out: Path, *, seed: int = 0, device: str = "auto", pairs: Sequence[str] = (),
    changes: Mapping[str, Sequence[str]] = MappingProxyType({}), say: Say,
) -> Tour:  # fmt: skip
    """The tour, in a folder. An earlier tour in it is replaced; anything else there is left alone (UsageError).

    pairs: settings of the pretraining. changes: of the stages after it, by recipe."""
    began = time.monotonic()
    settings, config, run = understood("quickstart", [f"seed={seed}", f"device={device}", *pairs])
    clear(out, config)
    env = doctor(out.parent if out.parent.exists() else Path()).as_json()
    with farewell(out, say):
        say("1. Text. No network is needed: Python brings its manual and the documentation of its library.")
        say("2. A tokenizer and a small model in the style of Llama 3: both begin knowing nothing.")
        say(f"3. Training for {config.steps} steps; a third of the way in, the run is interrupted on purpose, as by")
        say("   Ctrl-C.")
        foreseen = plan(work(config, sizes(config, settings)), measure=True, say=say)
        once = Interruption(max(1, config.steps // 3))
        outcome = run(config, settings, out, env=env, callbacks=(once,), say=say)
        resumed_at = outcome.step
        if outcome.status == "interrupted" and once.done:
            say(f"   Interrupted, and saved at step {outcome.step}. It goes on there, and will end with the same bits:")
            outcome = run(config, settings, out, env=env, callbacks=(), say=say)
        require_whole(outcome, say)
        guide = Guide(out, seed, device, env, say, changes)
        return finished(guide, foreseen, outcome, resumed_at, began)


@contextmanager
def farewell(out: Path, say: Say) -> Iterator[None]:
    """Ctrl-C at any place: what is finished stays, and it is said how to begin again."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"The tour ends here; what it finished stays in {out}. quest quickstart --out {out} begins it anew.")
        raise


def clear(out: Path, config: Pretrain) -> None:
    """Only what an earlier tour left is removed."""
    if out.is_dir() and any(out.iterdir()):
        old = out / "config.yaml"
        ours = old.is_file() and not differences(
            resolve(Pretrain, gather(str(old))), config, (*FREE, "seed", "precision", "compile")
        )
        if not ours:
            raise UsageError(f"{out} is not empty and not from an earlier tour; choose another --out")
        shutil.rmtree(out)


def finished(guide: Guide, foreseen: Plan, outcome: Outcome, resumed_at: int, began: float) -> Tour:
    """Look at what was pretrained, go through the stages, export, load again, report."""
    out, say = guide.root, guide.say
    say("4. What it writes now (it has read two and a half megabytes; it knows the tone, not the facts):")
    texts = written(load(out, dtype="float32"), out)
    for prompt, text in texts.items():
        quote(f"{prompt}{text}", say)
    stages, said = staged(guide)
    say("9. Exporting the model that answers to the Hugging Face layout, and loading that again.")
    folder = out / "export"
    export(out / "dpo", folder, overwrite=True)
    model, again = load(out / "dpo", dtype="float32"), load(folder, dtype="float32")
    say("10. The report of the pretraining; those of the stages lie beside them.")
    conclude(out, foreseen, say)
    return Tour(
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
        reload_difference=difference(model, again),
        exit_code=0,
    )


def staged(guide: Guide) -> tuple[dict[str, Stage], list[Answer]]:
    """From the pretrained model to one that answers, and one that prefers; and from nothing to one that reasons."""
    say, out = guide.say, guide.root
    say("5. Fine-tuning: questions about Python's functions, and their answers. Only the answers are learned.")
    sft = answers(guide)
    say(f"   {sft.line()}")
    say("6. Preferences (DPO): an answer that is one whole sentence is preferred to one that is cut off, or that")
    say("   runs on. How to answer can be learned; what is true takes more than so small a model holds:")
    dpo = preferences(guide, out / "sft")
    say(f"   {dpo.line()}")
    say("7. A conversation. It was never taught these questions:")
    said = conversation(guide, out / "dpo")
    for one in said:
        quote("\n".join(one.lines()), say)
    say("8. Reasoning by rewards (GRPO). A new, smaller model learns to reverse words from a teacher who is wrong half")
    say("   of the time; then it is told only whether its own answers are right:")
    grpo = reasons(guide)
    say(f"   {grpo.line()}")
    return {"sft": sft, "dpo": dpo, "grpo": grpo}, said


def quote(text: str, say: Say) -> None:
    say(f"   | {text}".replace("\n", "\n   | "))


def written(model: Decoder, folder: Path) -> dict[str, str]:
    """A continuation of each prompt."""
    tokenizer = load_tokenizer(folder)
    starts = [[tokenizer.start_id, *tokenizer.encode(prompt, template=False)] for prompt in PROMPTS]
    done = generate(model, starts, max_new_tokens=80, temperature=0.7, top_p=0.95, tokenizer=tokenizer)
    return {prompt: one.text or "" for prompt, one in zip(PROMPTS, done, strict=True)}


@torch.inference_mode()
def difference(model: Decoder, again: Decoder) -> float:
    """The largest difference between two models' logits on some tokens."""
    tokens = torch.arange(64)[None] % model.config.vocab
    return float((model(tokens) - again(tokens)).abs().max())
