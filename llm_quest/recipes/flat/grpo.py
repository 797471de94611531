"""GRPO in one file (DeepSeekMath, arXiv:2402.03300): a small model that was taught to reverse words by a bad teacher,
and learns from rewards what the teacher could not show. The model is the one of `flat/pretrain.py`.

    python -m llm_quest.recipes.flat.grpo [steps]

It is the grpo recipe without what makes it comfortable and fast (a cache while sampling, finished rows that leave,
other objectives, held-out splits by content). A test holds its log-probabilities, loss and gradients equal to the
house's, also after several updates on the same samples."""

import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_quest.recipes.flat.pretrain import Config, Llama

LETTERS = "abcdefgh"
SIGNS = ["<end>", *LETTERS, ">"]  # a word is read up to '>', its reverse is written up to the end
END = 0


@dataclass(frozen=True)
class Settings:
    steps: int = 40
    prompts: int = 16  # questions in a rollout
    group: int = 8  # samples of each
    updates: int = 2  # optimiser steps on one rollout
    new_tokens: int = 6
    clip: float = 0.2
    beta: float = 0.0  # of the KL to where it began
    rate: float = 1e-3


# ---- the task --------------------------------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return [SIGNS.index(sign) for sign in text]


def word(chance: random.Random) -> str:
    return "".join(chance.choices(LETTERS, k=chance.randint(3, 4)))


def reward(prompt: list[int], completion: list[int]) -> float:
    """1 for the word backwards and the end after it, else 0."""
    return float(completion == [*prompt[:-1][::-1], END])


# ---- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: Llama, prompt: list[int], settings: Settings, generator: torch.Generator) -> list[list[int]]:
    """A group of completions of one prompt, each up to its first end (included) or `new_tokens`."""
    tokens = torch.tensor([prompt] * settings.group)
    for _ in range(settings.new_tokens):
        p = torch.softmax(model(tokens)[:, -1], dim=-1)
        tokens = torch.cat((tokens, torch.multinomial(p, 1, generator=generator)), dim=1)
    rows = tokens[:, len(prompt) :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


# ---- learning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows of prompt and completion, padded on the right. learn (B,T): the tokens of completions, each standing where
    it is predicted. old, reference: log-probabilities of the policy that sampled, and of the one it began as."""

    inputs: Tensor
    targets: Tensor
    learn: Tensor
    advantages: Tensor
    old: Tensor
    reference: Tensor | None = None


def advantages(rewards: Tensor) -> Tensor:
    """rewards (P,G) -> how much better than its siblings each was, in standard deviations of its group. A group whose
    rewards are all equal holds no news: exactly 0."""
    spread = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)
    scaled = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(spread > 1e-4, scaled, torch.zeros_like(scaled))


def log_probs(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """log p (B,T) of each target given what stands before it."""
    return model(inputs).log_softmax(dim=-1).gather(2, targets[:, :, None]).squeeze(2)


def loss_of(log_p: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """Per token: min(rho A, clip(rho) A) - beta (e^-l + l - 1), with rho = pi / pi_old and l = log pi / pi_reference.
    Then the mean over each completion's tokens, then over completions: long answers weigh no more than short ones."""
    rho = (log_p - batch.old).exp()
    A = batch.advantages[:, None]
    gain = torch.minimum(rho * A, rho.clamp(1 - settings.clip, 1 + settings.clip) * A)
    if batch.reference is not None:
        away = log_p - batch.reference
        gain = gain - settings.beta * ((-away).exp() + away - 1)
    per_row = (gain * batch.learn).sum(dim=1) / batch.learn.sum(dim=1)
    return -per_row.mean()


def laid_out(prompts: list[list[int]], completions: list[list[int]], worth: Tensor) -> Batch:
    """Completions side by side. Those that teach nothing too: the loss is a mean over all of them (eq. 3)."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(map(len, rows))
    padded = torch.tensor([row + [END] * (length - len(row)) for row in rows])
    learn = torch.zeros(len(rows), length - 1)
    for place, prompt in enumerate(prompts):
        learn[place, len(prompt) - 1 : len(rows[place]) - 1] = 1.0
    inputs, targets = padded[:, :-1], padded[:, 1:]
    return Batch(inputs, targets, learn, worth, torch.zeros(0))


def update(model: Llama, optimizer: torch.optim.Optimizer, batch: Batch, settings: Settings) -> float:
    """One optimiser step; the loss."""
    loss = loss_of(log_probs(model, batch.inputs, batch.targets), batch, settings)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def learn_from(
    model: Llama, first: Llama | None, optimizer: torch.optim.Optimizer, batch: Batch, settings: Settings
) -> list[float]:
    """All updates on one rollout. The old log-probabilities are worked out once, before the first."""
    with torch.no_grad():
        old = log_probs(model, batch.inputs, batch.targets)
        reference = log_probs(first, batch.inputs, batch.targets) if first is not None else None
    batch = Batch(batch.inputs, batch.targets, batch.learn, batch.advantages, old, reference)
    return [update(model, optimizer, batch, settings) for _ in range(settings.updates)]


# ---- the teacher, and the whole --------------------------------------------------------------------------------------


def imitate(model: Llama, steps: int, chance: random.Random) -> None:
    """Learn from a teacher who half of the time copies the word instead of reversing it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = []
        for _ in range(64):
            asked = word(chance)
            rows.append([*ids(asked + ">"), *ids(asked if chance.random() < 0.5 else asked[::-1]), END])
        length = max(map(len, rows))
        tokens = torch.tensor([row + [END] * (length - len(row)) for row in rows])
        wanted = torch.tensor([row[1:] + [-100] * (length - len(row)) for row in rows])
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), wanted.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: Llama, settings: Settings, chance: random.Random, generator: torch.Generator) -> float:
    """The share of right samples."""
    asked = [ids(word(chance) + ">") for _ in range(64)]
    scores = [reward(prompt, row) for prompt in asked for row in sample(model, prompt, settings, generator)]
    return sum(scores) / len(scores)


def main(steps: int = Settings.steps, warmup: int = 400) -> tuple[float, float]:
    torch.manual_seed(0)
    settings, chance, generator = Settings(steps=steps), random.Random(0), torch.Generator().manual_seed(0)
    model = Llama(Config(vocab=len(SIGNS), width=64, layers=2, heads=4, groups=4, head_width=16, hidden=192))
    imitate(model, warmup, chance)
    before = accuracy(model, settings, chance, generator)
    print(f"after imitation: {before:.3f} of the samples are right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=0.0)
    for step in range(settings.steps):
        asked = [ids(word(chance) + ">") for _ in range(settings.prompts)]
        groups = [sample(model, prompt, settings, generator) for prompt in asked]
        rewards = torch.tensor([[reward(p, row) for row in group] for p, group in zip(asked, groups, strict=True)])
        worth = advantages(rewards).flatten()
        if worth.any():
            prompts = [prompt for prompt in asked for _ in range(settings.group)]
            batch = laid_out(prompts, [row for group in groups for row in group], worth)
            learn_from(model, None, optimizer, batch, settings)
        if step % 5 == 0 or step == settings.steps - 1:
            print(f"step {step:3d}   mean reward {rewards.mean():.3f}")
    after = accuracy(model, settings, chance, generator)
    print(f"after rewards: {after:.3f}")
    return before, after


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
