"""The step of Muon, its share of a training step, and torch.optim.Muon's: the shapes of `quest train quickstart` (2M,
8 rows of 256 tokens) and `quest train pretrain` (11M, 32 rows).

OMP_NUM_THREADS=1 python -m benchmarks.muon [--pairs 5] [--shape 2m] [--alone] [--forms]
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 python -m benchmarks.muon    without AVX512

torch.optim.Muon always iterates in bfloat16 and takes a fused projection as one matrix (without bfloat16 instructions
a step of it takes half a minute: --alone leaves it out); AdamW has the rest on both sides. The forward and backward
pass is in the precision that `auto` takes here. --forms: every form of the iterations, in turn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import llm_quest as quest
from benchmarks.pairs import race
from llm_quest.data.batch import TokenBatch
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.machine.choices import choose_muon_form, choose_precision
from llm_quest.machine.hardware import bf16_support
from llm_quest.machine.profile import load_muon_rates
from llm_quest.models.decoder import Decoder
from llm_quest.models.llama import Config
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.train.newton_schulz import MUON_FORMS
from llm_quest.train.optimizers import make_muon
from llm_quest.train.step import autocast

LENGTH = 256
ROWS = {"2m": 8, "11m": 32}
SHAPES = {
    "2m": Config(2048, 192, 4, 3, 1, 64, 512, LENGTH, RotaryEmbedding(64, 10_000.0), tie_word_embeddings=False),
    "11m": Config(4096, 384, 6, 6, 2, 64, 1024, LENGTH, RotaryEmbedding(64, 500_000.0), tie_word_embeddings=False),
}


def hardware_forms() -> list[str]:
    """The forms whose products this processor has instructions for."""
    has_bfloat16, _ = bf16_support(torch.device("cpu"))
    return [form for form in MUON_FORMS if has_bfloat16 or "bfloat16" not in form]


def our_step(model: Decoder, form: str) -> Callable[[], object]:
    return make_muon(model, lr=1e-6, row_splits=model.row_splits(), form=form).step


def torch_step(model: Decoder) -> Callable[[], object]:
    """torch's Muon on the same matrices, AdamW on the same rest."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith(("embed.", "head."))]
    rest = [p for p in model.parameters() if all(p is not one for one in hidden)]
    muon = torch.optim.Muon(hidden, lr=1e-6, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-6, fused=True)
    return lambda: (muon.step(), adamw.step())


def passes(model: Decoder, precision: str, rows: int) -> Callable[[], object]:
    """Forward and backward over one batch; the gradients stay."""
    objective = NextTokenLoss(model.train())
    tokens = torch.randint(0, model.config.vocab_size, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], None, None)

    def run() -> None:
        model.zero_grad()
        with autocast(precision, torch.device("cpu")):
            loss = objective(batch)
        (loss.total / loss.count).backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--forms", action="store_true")
    options = parser.parse_args()
    profile = load_muon_rates(print)
    precision, form = choose_precision(profile).value, choose_muon_form(profile).value
    print(f"{torch.get_num_threads()} threads; passes in {precision}, iterations: {form}\n")
    print("| shape, form | passes, ms | our step, ms | of a training step | x torch.optim.Muon (range) |")
    print("| --- " * 5 + "|")
    for name in [options.shape] if options.shape else SHAPES:
        model = quest.build(SHAPES[name])
        run = passes(model, precision, ROWS[name])
        run()
        forms = hardware_forms() if options.forms else [form]
        contestants = {} if options.alone else {"torch": torch_step(model)}
        contestants |= {one: our_step(model, one) for one in forms} | {"passes": run}
        rows = {row.name: row for row in race(contestants, pairs=options.pairs)}
        both = rows["passes"].seconds
        for one in forms:
            ours = rows[one]
            ratio = "-" if options.alone else f"{ours.times_reference:.2f} ({ours.low:.2f}-{ours.high:.2f})"
            share = ours.seconds / (ours.seconds + both)
            print(
                f"| {name}, {one} | {both * 1e3:.0f} | {ours.seconds * 1e3:.1f} | {share:.1%} | {ratio} |", flush=True
            )


if __name__ == "__main__":
    main()
