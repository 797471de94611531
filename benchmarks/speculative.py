"""Speculative decoding at batch 1 against plain decoding and transformers' assisted generation, in turn, one process.

TARGET and DRAFT are Hugging Face folders with one tokenizer. Where they are absent, both are trained into runs/ on the
built-in corpus first (minutes, and an hour on two cores). A target with multi-token modules drafts with them too, and
transformers gets it without.

python -m benchmarks.speculative [--target FOLDER] [--draft FOLDER] [--new 128] [--pairs 5] [--temperature 0]
    [--dtype float32] [--draft-dtype DTYPE] [--compile] [--poor]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import llm_quest as quest
from benchmarks.pairs import race, table
from llm_quest.generation.generate import generate_completions
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.speculative.decoder import DraftSource
from llm_quest.generation.speculative.draft_length import SpeculationStats
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.hub.load_tokenizer import load_tokenizer
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
SIZES = (
    "model.config={hidden_size: 512, num_hidden_layers: 10, num_attention_heads: 8, num_key_value_heads: 2, "
    "intermediate_size: 1408, rotary: {rope_theta: 10000}}"
)
QUIET = ["eval_steps=0", "eval_baselines=false", "samples.every_steps=0"]


def trained(target: Path, draft: Path) -> None:
    """Both models, with the first draft's tokenizer, where they are not there yet. The draft learns from the text, and
    then what the target says about it (DistillSpec, arXiv:2310.08461)."""
    run = Path("runs")
    first = draft.with_name(draft.name + "-untaught")
    if not draft.is_dir() and not first.is_dir():
        quest_("train", "quickstart", "--out", str(run / "spec-draft"), "max_steps=1500", *QUIET)
        quest_("export", str(run / "spec-draft"), str(first))
    if not target.is_dir():
        schedule = ["lr_scheduler_type=linear", "warmup_steps=40", "min_lr_ratio=0.01"]
        muon = ["optim=muon", "learning_rate=1.5e-3", "techniques=[{name: multi_token, depth: 2}]"]
        read = f"tokenizer.load={first if first.is_dir() else draft}"
        size = ["batch_size=8", "sequence_length=256", "max_steps=900", SIZES, read]
        fast = ["precision=bf16", "compile=true"]
        quest_("train", "pretrain", "--out", str(run / "spec-target"), *size, *schedule, *muon, *fast, *QUIET)
        quest_("export", str(run / "spec-target"), str(target))
    if not draft.is_dir():
        both = ["model=null", f"model.load={first}", f"tokenizer.load={first}", f"teacher.load={target}"]
        adamw = ["optim=adamw", "learning_rate=1e-3", "weight_decay=0"]
        falling = ["lr_scheduler_type=linear", "warmup_steps=20", "min_lr_ratio=0.01"]
        size = ["batch_size=8", "sequence_length=256", "max_steps=1000", "precision=bf16", "compile=true"]
        quest_("train", "pretrain", "--out", str(run / "spec-draft-taught"), *both, *size, *adamw, *falling, *QUIET)
        quest_("export", str(run / "spec-draft-taught"), str(draft))


def quest_(*words: str) -> None:
    subprocess.run(["quest", *words], check=True)


class Writer:
    """All prompts, one after another, in one manner; counts what speculation did."""

    def __init__(
        self, model: Decoder, prompts: list[list[int]], sampling: SamplingParams, until: StoppingCriteria, compile: bool
    ):
        self.model, self.prompts, self.sampling, self.until, self.compile = model, prompts, sampling, until, compile
        self.tallies: dict[str, SpeculationStats] = {}

    def by(self, name: str, draft: DraftSource | None) -> Callable[[], list[list[int]]]:
        def write() -> list[list[int]]:
            self.tallies[name] = tally = SpeculationStats()
            rows = [
                generate_completions(
                    self.model, [one], self.sampling, self.until, draft=draft, compile=self.compile, stats=tally
                )
                for one in self.prompts
            ]
            return [row[0].tokens for row in rows]

        return write


def without_modules(model: Decoder, folder: Path, to: Path) -> Path:
    """The same model as transformers can read it: its published weights alone, beside the folder's tokenizer."""
    plain = build(model.config, seed=0)
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("mtp_modules.")}
    )
    quest.save(plain.eval(), str(to))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(folder / name, to / name)
    return to


def theirs(
    target: Path, draft: Path, prompts: list[list[int]], new: int, temperature: float, dtype: torch.dtype
) -> dict[str, Callable]:
    """transformers, plain and assisted, with its own defaults for the assistant's schedule."""
    import transformers

    model, assistant = (
        transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype).eval() for where in (target, draft)
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
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all models")
    parser.add_argument("--draft-dtype", choices=("float32", "bfloat16"), help="our draft in another")
    parser.add_argument("--compile", action="store_true", help="our passes compiled, plain and drafting")
    parser.add_argument("--poor", action="store_true", help="a draft with random weights, and nothing else")
    options = parser.parse_args()
    trained(options.target, options.draft)
    dtype = getattr(torch, options.dtype)
    model, draft = quest.load(str(options.target)).to(dtype), quest.load(str(options.draft))
    if options.poor:
        draft = build(draft.config, seed=3).eval()
    draft = draft.to(getattr(torch, options.draft_dtype or options.dtype))
    prompts = [load_tokenizer(str(options.target)).encode(text) for text in PROMPTS]
    sampling, until = (
        SamplingParams(temperature=options.temperature),
        StoppingCriteria(max_new_tokens=options.new, eos_token_ids=()),
    )
    writer = Writer(model, prompts, sampling, until, options.compile)
    racing = {"plain": writer.by("plain", None), "draft model": writer.by("draft model", draft)}
    with tempfile.TemporaryDirectory() as room:
        if not options.poor:
            racing["ngram"] = writer.by("ngram", "ngram")
            if len(model.mtp_modules):
                racing["mtp"] = writer.by("mtp", "mtp")
            readable = without_modules(model, options.target, Path(room))
            racing |= theirs(readable, options.draft, prompts, options.new, options.temperature, dtype)
        if options.temperature == 0:
            plain = racing["plain"]()
            for name in [name for name in racing if name not in ("plain", "transformers, assisted")]:
                same = sum(a == b for a, b in zip(racing[name](), plain, strict=True))
                print(f"{name}: {same} of {len(plain)} texts are the plain ones token for token")
        rows = race(racing, pairs=options.pairs, warm_up=2 if options.compile else 1)
    print(table(rows, options.new * len(prompts), "tokens/s"))
    for name, tally in writer.tallies.items():
        if tally.num_passes:
            per_pass = tally.num_generated_tokens / tally.num_passes
            print(f"{name}: acceptance {tally.acceptance_rate:.0%}, {per_pass:.2f} tokens per pass of the target")


if __name__ == "__main__":
    main()
