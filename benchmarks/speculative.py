"""Speculative decoding at batch 1 against plain decoding and transformers' assisted generation, in turn, one process.

TARGET and DRAFT are Hugging Face folders with one tokenizer. Where they are absent, both are trained into runs/ on the
built-in corpus first (about 3 and 7 minutes on two cores). mtp: the target again, with multi-token modules.

python -m benchmarks.speculative [--target FOLDER] [--draft FOLDER] [--mtp FOLDER] [--new 128] [--pairs 5]
    [--temperature 0] [--poor]
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

import llm_quest as quest
from benchmarks.pairs import race, table
from llm_quest.generation.generate import complete
from llm_quest.generation.pace import Tally
from llm_quest.generation.sampling import Sampling
from llm_quest.generation.speculative import Draft
from llm_quest.generation.until import Until
from llm_quest.hub.files import load_tokenizer
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder

PROMPTS = (
    "Return the ",
    "The file object is ",
    "def __init__(self, ",
    "If the argument is not given, ",
    "class Error(Exception):\n    ",
    "Raises ValueError if ",
)
SIZES = "model.sizes={width: 512, layers: 10, heads: 8, groups: 2, hidden: 1408, rotary: {rope_theta: 10000}}"
QUIET = ["evaluate.every=0", "evaluate.baselines=false", "samples.every=0"]


def trained(target: Path, draft: Path) -> None:
    """Both models, with the draft's tokenizer, where they are not there yet."""
    run = Path("runs")
    if not draft.is_dir():
        quest_("train", "quickstart", "--out", str(run / "spec-draft"), *QUIET)
        quest_("export", str(run / "spec-draft"), str(draft))
    if not target.is_dir():
        schedule = ["schedule.shape=linear", "schedule.warmup=8", "schedule.floor=0.01", "optimizer.lr=3e-3"]
        size = ["batch.rows=8", "batch.length=256", "steps=130", SIZES, f"tokenizer.load={draft}"]
        quest_("train", "pretrain", "--out", str(run / "spec-target"), *size, *schedule, *QUIET)
        quest_("export", str(run / "spec-target"), str(target))


def quest_(*words: str) -> None:
    subprocess.run(["quest", *words], check=True)


class Writer:
    """All prompts, one after another, in one manner; counts what speculation did."""

    def __init__(self, model: Decoder, prompts: list[list[int]], sampling: Sampling, until: Until):
        self.model, self.prompts, self.sampling, self.until = model, prompts, sampling, until
        self.tallies: dict[str, Tally] = {}

    def by(self, name: str, draft: Draft | None) -> Callable[[], list[list[int]]]:
        def write() -> list[list[int]]:
            self.tallies[name] = tally = Tally()
            rows = [
                complete(self.model, [one], self.sampling, self.until, draft=draft, tally=tally) for one in self.prompts
            ]
            return [row[0].tokens for row in rows]

        return write


def theirs(target: Path, draft: Path, prompts: list[list[int]], new: int, temperature: float) -> dict[str, Callable]:
    """transformers, plain and assisted, with its own defaults for the assistant's schedule."""
    import transformers

    model, assistant = (
        transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        for where in (target, draft)
    )
    manner = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    length = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, **manner}

    def write(**more: object) -> list[list[int]]:
        texts = []
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), **length, **more)
            texts.append(out[0, len(prompt) :].tolist())
        return texts

    return {"transformers, plain": write, "transformers, assisted": lambda: write(assistant_model=assistant)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=Path("runs/spec-target-hf"))
    parser.add_argument("--draft", type=Path, default=Path("runs/spec-draft-hf"))
    parser.add_argument("--mtp", type=Path)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--poor", action="store_true", help="a draft with random weights instead")
    options = parser.parse_args()
    trained(options.target, options.draft)
    model, draft = quest.load(str(options.target)), quest.load(str(options.draft))
    if options.poor:
        draft = build(draft.config, seed=3).eval()
    prompts = [load_tokenizer(str(options.target)).encode(text) for text in PROMPTS]
    sampling, until = Sampling(temperature=options.temperature), Until(max_new_tokens=options.new, eos=())
    writer = Writer(model, prompts, sampling, until)
    racing = {"plain": writer.by("plain", None), "draft model": writer.by("draft model", draft)}
    if not options.poor:
        racing["ngram"] = writer.by("ngram", "ngram")
        racing |= theirs(options.target, options.draft, prompts, options.new, options.temperature)
    if options.mtp is not None:
        ahead = Writer(quest.load(str(options.mtp)), prompts, sampling, until)
        writer.tallies = ahead.tallies
        racing |= {"plain, of the model with modules": ahead.by("-", None), "mtp": ahead.by("mtp", "mtp")}
    if options.temperature == 0:
        plain = racing["plain"]()
        for name in set(racing) & {"draft model", "ngram", "transformers, plain"}:
            same = sum(a == b for a, b in zip(racing[name](), plain, strict=True))
            print(f"{name}: {same} of {len(plain)} texts are the plain ones token for token")
    rows = race(racing, pairs=options.pairs)
    print(table(rows, options.new * len(prompts), "tokens/s"))
    for name, tally in writer.tallies.items():
        if tally.passes:
            per_pass = tally.tokens / tally.passes
            print(f"{name}: acceptance {tally.acceptance:.0%}, {per_pass:.2f} tokens per pass of the target")


if __name__ == "__main__":
    main()
