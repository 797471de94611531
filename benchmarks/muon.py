"""The step of Muon, its share of a training step, and torch.optim.Muon's: the shapes of `quest train quickstart` (2M; 8
rows of 256 tokens, where the recipe has 6) and `quest train pretrain` (11M, 32 rows).

OMP_NUM_THREADS=1 python -m benchmarks.muon [--pairs 5] [--shape 2m] [--alone] [--forms] [--kernels]
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 python -m benchmarks.muon    without AVX512

torch.optim.Muon always iterates in bfloat16 and takes a fused projection as one matrix (without bfloat16 instructions
a step of it takes half a minute: --alone leaves it out); AdamW has the rest on both sides. The forward and backward
pass is in the precision that `auto` takes here. --forms: every form of the iterations, in turn. --kernels: layers in
C++, as in a run that is long enough. The last column: FLOPs of the passes (6 for each number of a matrix and
token, and 7 products of causal scores) in the time of the whole step, as a share of the rate of a float32 product of
2048 x 2048 in turn with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import llm_quest as quest
from benchmarks.pairs import race
from llm_quest.data.batch import TokenBatch
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.layers.training_kernels import set_training_kernels
from llm_quest.machine.choices import choose_muon_form, choose_precision
from llm_quest.machine.hardware import bf16_support
from llm_quest.machine.profile import load_muon_rates
from llm_quest.models.decoder import Decoder
from llm_quest.models.llama import Config
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.train.newton_schulz import MUON_FORMS
from llm_quest.train.optimizers import make_muon
from llm_quest.train.step import autocast

LENGTH, PRODUCT = 256, 2048
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


def pass_flops(config: Config, rows: int) -> float:
    """Of the forward and the backward pass of so many rows."""
    dim, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * 64
    attention = dim * (2 * heads + 2 * config.num_key_value_heads * 64)
    numbers = layers * (attention + 3 * dim * config.intermediate_size) + dim * config.vocab_size
    return rows * LENGTH * (6 * numbers + 7 * layers * heads * LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--forms", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    options = parser.parse_args()
    profile = load_muon_rates(print)
    precision, form = choose_precision(profile).value, choose_muon_form(profile).value
    print(f"{torch.get_num_threads()} threads; passes in {precision}, iterations: {form}\n")
    if options.kernels and (missing := set_training_kernels(True)):
        raise SystemExit(f"no layers in C++: {missing}")
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    titles = ("shape, form", "passes, ms", "our step, ms", "of a training step", "x torch.optim.Muon (range)")
    print(f"| {' | '.join(titles)} | of the product rate |")
    print("| --- " * 6 + "|")
    for name in [options.shape] if options.shape else SHAPES:
        model = quest.build(SHAPES[name])
        run = passes(model, precision, ROWS[name])
        run()
        forms = hardware_forms() if options.forms else [form]
        contestants = {} if options.alone else {"torch": torch_step(model)}
        contestants |= {one: our_step(model, one) for one in forms} | {"passes": run, "product": lambda: a @ b}
        rows = {row.name: row for row in race(contestants, pairs=options.pairs)}
        both = rows["passes"].seconds
        for one in forms:
            ours = rows[one]
            ratio = "-" if options.alone else f"{ours.times_reference:.2f} ({ours.low:.2f}-{ours.high:.2f})"
            share = ours.seconds / (ours.seconds + both)
            rate = 2 * PRODUCT**3 / rows["product"].seconds
            reached = pass_flops(SHAPES[name], ROWS[name]) / (ours.seconds + both) / rate
            times = f"{both * 1e3:.0f} | {ours.seconds * 1e3:.1f} | {share:.1%}"
            print(f"| {name}, {one} | {times} | {ratio} | {reached:.0%} of {rate / 1e9:.0f} GFLOP/s |", flush=True)


if __name__ == "__main__":
    main()
