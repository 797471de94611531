"""A DPO step at the 11M Llama shape (V 4096, D 384, 6 layers, 6/2 heads, F 1024): 8 pairs, questions of about 64
tokens, answers of about 64; TRL and ours in turn, in one process, from the same weights, on the same ids.

    OMP_NUM_THREADS=1 python -m benchmarks.preferences [--pairs 5] [--steps 4] [--precomputed]

TRL works out the reference's log-probabilities in every step unless it is told to do so beforehand; --precomputed races
against that. Ours are worked out once, outside the clock there as here.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import llm_quest as quest
from benchmarks.alignment import tokenizer_of_its_own
from benchmarks.pairs import race, table
from benchmarks.training import CONFIG
from llm_quest.data.loader import ShardedLoader
from llm_quest.data.preference_pairs import PreferenceDataset
from llm_quest.data.preferences import TokenizedPreference
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.preference import DPO, PreferenceLoss
from llm_quest.recipes.auto import resolve_precision
from llm_quest.recipes.reference_model import compute_log_probs
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw

ROWS, SHORTEST, LONGEST, BETA, LR, COUNT = 8, 56, 72, 0.1, 1e-6, 200


def texts(tokenizer: Tokenizer) -> list[dict[str, str]]:
    """Pairs cut from Python's own help: no two alike."""
    from llm_quest.data.corpus import load_corpus

    chance = random.Random(0)
    ids = [i for document in load_corpus("builtin:topics").documents for i in tokenizer.encode(document.text)]

    def piece() -> str:
        start = chance.randrange(len(ids) - LONGEST)
        return tokenizer.decode(ids[start : start + chance.randint(SHORTEST, LONGEST)])

    return [{"prompt": piece(), "chosen": piece(), "rejected": piece()} for _ in range(COUNT)]


def ours(model: Decoder, rows: list[TokenizedPreference], kind: str, steps: int) -> Callable[[], None]:
    policy = copy.deepcopy(model)
    source = PreferenceDataset(rows, share_prompts=True)
    with torch.no_grad():
        source.reference_log_probs = compute_log_probs(policy, source, torch.device("cpu"))
    objective = PreferenceLoss(policy, DPO(BETA))

    def run() -> None:
        feed = ShardedLoader(source, batch_size=ROWS, micro_batch_size=ROWS, seed=0)
        settings = TrainingArguments(max_steps=steps, precision=kind, logging_steps=1)
        train(objective, feed, make_adamw(policy, lr=LR), lambda step: 1.0, settings)

    return run


def trls(folder: Path, rows: list[dict[str, str]], steps: int, kind: str, *, precomputed: bool) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=ROWS, max_steps=steps, beta=BETA, learning_rate=LR,
        use_cpu=True, bf16=kind == "bf16", report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, lr_scheduler_type="constant", gradient_checkpointing=False,
        precompute_ref_log_probs=precomputed,
    )  # fmt: skip
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        args=arguments, train_dataset=Dataset.from_list(rows),
    )  # fmt: skip


def ids_of(trainer: Any) -> list[TokenizedPreference]:
    """The very ids that TRL reads."""
    return [
        TokenizedPreference(np.array(row["prompt_ids"]), (np.array(row["chosen_ids"]), np.array(row["rejected_ids"])))
        for row in trainer.train_dataset
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--precomputed", action="store_true")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    fast = resolve_precision("auto", torch.device("cpu"))
    tokenizer, model = tokenizer_of_its_own(), quest.build(CONFIG)
    kinds = list(dict.fromkeys(["fp32", fast.value]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        quest.save(model, folder / "model", tokenizer=tokenizer)
        how = ", reference precomputed" if given.precomputed else ""
        rows = texts(tokenizer)
        trainers = [trls(folder, rows, given.steps, kind, precomputed=given.precomputed) for kind in kinds]
        contestants: dict[str, Callable[[], object]] = {
            f"TRL, {kind}{how}": trainer.train for kind, trainer in zip(kinds, trainers, strict=True)
        }
        ids = ids_of(trainers[0])
        contestants |= {f"ours, {kind}": ours(model, ids, kind, given.steps) for kind in kinds}
        raced = race(contestants, pairs=given.pairs)
    print(f"our default precision here: {fast.value} ({fast.reason}); {torch.get_num_threads()} threads\n")
    print(table(raced, given.steps, "DPO steps/s"))


if __name__ == "__main__":
    main()
