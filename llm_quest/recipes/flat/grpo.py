"""GRPO in one file (DeepSeekMath, arXiv:2402.03300): a small model that is fine-tuned on partly wrong demonstrations
of reversed words and improves by rewards. The model is the one of `flat/pretrain.py`.

    python -m llm_quest.recipes.flat.grpo [steps]

It is the grpo recipe without a cache while sampling, early removal of finished rows, other objectives and held-out
splits by content. A test holds its log-probabilities, loss and gradients equal to the package's, also after several
updates on the same samples."""

import random
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_quest.recipes.flat.pretrain import Llama, LlamaConfig

ALPHABET = "abcdefgh"
VOCABULARY = ["<end>", *ALPHABET, ">"]  # a word is read up to '>', its reverse is written up to the end
END = 0


@dataclass(frozen=True)
class GrpoSettings:
    max_steps: int = 40
    prompts_per_rollout: int = 16  # questions in a rollout
    num_generations: int = 8  # samples of each
    num_iterations: int = 2  # optimizer steps on one rollout
    max_new_tokens: int = 6
    epsilon: float = 0.2
    beta: float = 0.0  # of the KL to where it began
    learning_rate: float = 1e-3


# ---- the task --------------------------------------------------------------------------------------------------------


def encode(text: str) -> list[int]:
    return [VOCABULARY.index(sign) for sign in text]


def random_letters(rng: random.Random) -> str:
    return "".join(rng.choices(ALPHABET, k=rng.randint(3, 4)))


def exact_match_reward(prompt: list[int], completion: list[int]) -> float:
    """The reward: 1 for the reversed word followed by the end, else 0."""
    return float(completion == [*prompt[:-1][::-1], END])


# ---- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_group(
    model: Llama, prompt: list[int], settings: GrpoSettings, generator: torch.Generator
) -> list[list[int]]:
    """A group of completions of one prompt, each up to its first end (included) or `max_new_tokens`."""
    tokens = torch.tensor([prompt] * settings.num_generations)
    for _ in range(settings.max_new_tokens):
        p = torch.softmax(model(tokens)[:, -1], dim=-1)
        tokens = torch.cat((tokens, torch.multinomial(p, 1, generator=generator)), dim=1)
    rows = tokens[:, len(prompt) :].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


# ---- learning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutBatch:
    """Rows of prompt and completion, padded on the right. completion_mask (B,T): the tokens of completions, each at the
    position that predicts it. old_log_probs, reference_log_probs: of the policy that sampled, and of the one it began
    as."""

    inputs: Tensor
    targets: Tensor
    completion_mask: Tensor
    advantages: Tensor
    old_log_probs: Tensor
    reference_log_probs: Tensor | None = None


def group_advantages(rewards: Tensor) -> Tensor:
    """rewards (P,G) -> how much better than its siblings each was, in standard deviations of its group. A group whose
    rewards are all equal: exactly 0."""
    spread = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)
    scaled = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(spread > 1e-4, scaled, torch.zeros_like(scaled))


def target_log_probs(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """log p (B,T) of each target given what stands before it."""
    return model(inputs).log_softmax(dim=-1).gather(2, targets[:, :, None]).squeeze(2)


def grpo_loss(log_probs: Tensor, batch: RolloutBatch, settings: GrpoSettings) -> Tensor:
    """Per token: min(rho A, clip(rho) A) - beta (e^-l + l - 1), with rho = pi / pi_old and l = log pi / pi_reference.
    Then the mean over each completion's tokens, then over completions: long answers weigh no more than short ones."""
    ratio = (log_probs - batch.old_log_probs).exp()
    A = batch.advantages[:, None]
    objective = torch.minimum(ratio * A, ratio.clamp(1 - settings.epsilon, 1 + settings.epsilon) * A)
    if batch.reference_log_probs is not None:
        log_ratio = log_probs - batch.reference_log_probs
        objective = objective - settings.beta * ((-log_ratio).exp() + log_ratio - 1)
    per_row = (objective * batch.completion_mask).sum(dim=1) / batch.completion_mask.sum(dim=1)
    return -per_row.mean()


def pad_batch(prompts: list[list[int]], completions: list[list[int]], advantages: Tensor) -> RolloutBatch:
    """Pad rows of prompt and completion. Those with advantage 0 stay: the loss is a mean over all of them (eq. 3)."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(map(len, rows))
    padded = torch.tensor([row + [END] * (length - len(row)) for row in rows])
    completion_mask = torch.zeros(len(rows), length - 1)
    for place, prompt in enumerate(prompts):
        completion_mask[place, len(prompt) - 1 : len(rows[place]) - 1] = 1.0
    inputs, targets = padded[:, :-1], padded[:, 1:]
    return RolloutBatch(inputs, targets, completion_mask, advantages, torch.zeros(0))


def policy_step(model: Llama, optimizer: torch.optim.Optimizer, batch: RolloutBatch, settings: GrpoSettings) -> float:
    """One optimizer step; the loss."""
    loss = grpo_loss(target_log_probs(model, batch.inputs, batch.targets), batch, settings)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def train_on_rollout(
    model: Llama,
    reference_model: Llama | None,
    optimizer: torch.optim.Optimizer,
    batch: RolloutBatch,
    settings: GrpoSettings,
) -> list[float]:
    """All updates on one rollout. The old log-probabilities are computed once, before the first."""
    with torch.no_grad():
        old = target_log_probs(model, batch.inputs, batch.targets)
        reference = (
            target_log_probs(reference_model, batch.inputs, batch.targets) if reference_model is not None else None
        )
    batch = RolloutBatch(batch.inputs, batch.targets, batch.completion_mask, batch.advantages, old, reference)
    return [policy_step(model, optimizer, batch, settings) for _ in range(settings.num_iterations)]


# ---- the teacher, and the whole --------------------------------------------------------------------------------------


def train_sft_warmup(model: Llama, steps: int, rng: random.Random) -> None:
    """Learn from a teacher who half of the time copies the word instead of reversing it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = []
        for _ in range(64):
            letters = random_letters(rng)
            rows.append([*encode(letters + ">"), *encode(letters if rng.random() < 0.5 else letters[::-1]), END])
        length = max(map(len, rows))
        tokens = torch.tensor([row + [END] * (length - len(row)) for row in rows])
        wanted = torch.tensor([row[1:] + [-100] * (length - len(row)) for row in rows])
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), wanted.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sampled_accuracy(model: Llama, settings: GrpoSettings, rng: random.Random, generator: torch.Generator) -> float:
    """The share of right samples."""
    prompts = [encode(random_letters(rng) + ">") for _ in range(64)]
    scores = [
        exact_match_reward(prompt, row)
        for prompt in prompts
        for row in sample_group(model, prompt, settings, generator)
    ]
    return sum(scores) / len(scores)


def main(steps: int = GrpoSettings.max_steps, warmup: int = 400) -> tuple[float, float]:
    torch.manual_seed(0)
    settings, rng, generator = GrpoSettings(max_steps=steps), random.Random(0), torch.Generator().manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            intermediate_size=192,
        )
    )
    train_sft_warmup(model, warmup, rng)
    before = sampled_accuracy(model, settings, rng, generator)
    print(f"after imitation: {before:.3f} of the samples are right")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    for step in range(settings.max_steps):
        asked = [encode(random_letters(rng) + ">") for _ in range(settings.prompts_per_rollout)]
        groups = [sample_group(model, prompt, settings, generator) for prompt in asked]
        rewards = torch.tensor(
            [[exact_match_reward(p, row) for row in group] for p, group in zip(asked, groups, strict=True)]
        )
        advantages = group_advantages(rewards).flatten()
        if advantages.any():
            prompts = [prompt for prompt in asked for _ in range(settings.num_generations)]
            batch = pad_batch(prompts, [row for group in groups for row in group], advantages)
            train_on_rollout(model, None, optimizer, batch, settings)
        if step % 5 == 0 or step == settings.max_steps - 1:
            print(f"step {step:3d}   mean reward {rewards.mean():.3f}")
    after = sampled_accuracy(model, settings, rng, generator)
    print(f"after rewards: {after:.3f}")
    return before, after


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
