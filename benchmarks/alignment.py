"""A GRPO step at the 11M Llama shape (V 4096, D 384, 6 layers, 6/2 heads, F 1024): 8 prompts x 8 samples, 64 new
tokens, KL against the frozen start; TRL and ours in turn, in one process, from the same weights, on the same prompts.

python -m benchmarks.alignment [--pairs 5] [--steps 2]
Both sample from a random model, whose end-of-text token is rare: every answer is about 64 tokens. The wall split of our
step (sampling, scoring, training) is printed below the table.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import llm_quest as quest
from benchmarks.pairs import race, table
from benchmarks.training import CONFIG
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.kl_penalty import KLPenalty
from llm_quest.objectives.log_probs import token_log_probs
from llm_quest.objectives.policy_gradient import PolicyGradientLoss
from llm_quest.recipes.auto import resolve_precision
from llm_quest.rollouts.advantages import RewardPipeline, WeightedReward
from llm_quest.rollouts.rollouts import RolloutLoader, RolloutPlan
from llm_quest.rollouts.sampler import PolicyPrompt, Sampler
from llm_quest.train.arguments import TrainingArguments
from llm_quest.train.loop import train
from llm_quest.train.optimizers import make_adamw
from llm_quest.train.step import autocast

CPU = torch.device("cpu")
PROMPTS, GROUP, NEW, BETA, LR = 8, 8, 64, 0.04, 1e-6
SENTENCE = "Question {}: how far is it from here to there, and how long does it take?"
TEXTS = [SENTENCE.format(number)[: 40 + 3 * number] for number in range(PROMPTS)]


def tokenizer_of_its_own() -> Tokenizer:
    from llm_quest.data.corpus import load_corpus

    return train_bpe((document.text for document in load_corpus("builtin:topics").documents), CONFIG.vocab_size)


class Again:
    """The same eight prompts again and again."""

    def __init__(self, tokenizer: Tokenizer):
        self.prompts = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]

    def __call__(self, index: int) -> PolicyPrompt:
        return PolicyPrompt(self.prompts[index % PROMPTS])


def ours(
    model: Decoder,
    tokenizer: Tokenizer,
    kind: str,
    steps: int,
    split: dict[str, float],
    device: torch.device = CPU,
) -> Callable[[], None]:
    policy = copy.deepcopy(model)
    reference = copy.deepcopy(model).requires_grad_(False)
    writer = Sampler(
        tokenizer=tokenizer,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        max_new_tokens=NEW,
        autocast_context=partial(autocast, kind, device),
    )
    scoring = RewardPipeline(
        rewards=(WeightedReward("even", lambda group: [float(len(s.text) % 2) for s in group]),),
        keep_uniform_groups=True,
    )
    plan = RolloutPlan(prompts_per_rollout=PROMPTS, num_generations=GROUP)
    feed = RolloutLoader(
        policy,
        Again(tokenizer),
        writer,
        scoring,
        plan,
        scorers={"reference_log_probs": partial(token_log_probs, reference)},
    )
    objective = PolicyGradientLoss(policy, kl=KLPenalty(BETA))

    def run() -> None:
        feed.rollout = None
        optimizer = make_adamw(policy, lr=LR)
        result = train(
            objective,
            feed,
            optimizer,
            lambda step: 1.0,
            TrainingArguments(max_steps=steps, precision=kind, logging_steps=1),
        )
        split["sampling"] = result.metrics["sampling_seconds"]
        split["scoring"] = result.metrics["scoring_seconds"]
        split["training"] = result.metrics["train_seconds"] / steps - split["sampling"] - split["scoring"]

    return run


def trls(folder: Path, steps: int, kind: str, device: torch.device = CPU) -> Callable[[], None]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    def even(completions: list[str], **rest: Any) -> list[float]:
        return [float(len(text) % 2) for text in completions]

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
        max_completion_length=NEW, max_steps=steps, beta=BETA, learning_rate=LR, use_cpu=device == CPU,
        bf16=kind == "bf16", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        loss_type="grpo", gradient_checkpointing=False, lr_scheduler_type="constant",
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": text} for text in TEXTS] * 50)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        reward_funcs=even, args=arguments, train_dataset=dataset,
    )  # fmt: skip
    return trainer.train  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    fast = resolve_precision("auto", torch.device("cpu"))
    tokenizer, model = tokenizer_of_its_own(), quest.build(CONFIG)
    splits: dict[str, dict[str, float]] = {"fp32": {}, fast.value: {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        quest.save(model, folder / "model", tokenizer=tokenizer)
        contestants = {"TRL, fp32": trls(folder, given.steps, "fp32")}
        for kind, split in splits.items():
            contestants[f"ours, {kind}"] = ours(model, tokenizer, kind, given.steps, split)
        rows = race(contestants, pairs=given.pairs)
    print(f"our default precision here: {fast.value} ({fast.reason}); {torch.get_num_threads()} threads\n")
    print(table(rows, given.steps, "GRPO steps/s"))
    for kind, split in splits.items():
        print(
            f"\nours, {kind}, seconds of a step: " + ", ".join(f"{name} {value:.2f}" for name, value in split.items())
        )


if __name__ == "__main__":
    main()
