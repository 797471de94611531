"""Pretraining in one file: a Llama-style model, bytes as tokens, AdamW, a cosine, a loop. Only PyTorch is needed.

    python -m llm_quest.recipes.flat.pretrain TEXT_FILE [steps]

It is the pretraining recipe without what makes it comfortable (tokenizer, packed documents, checkpoints, mixed
precision, several processes). A test starts this model and the house's from the same weights and holds their losses
equal, step by step."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    vocab: int = 256  # bytes
    width: int = 192
    layers: int = 4
    heads: int = 6
    groups: int = 2  # key/value heads: each is shared by heads / groups query heads
    head_width: int = 32
    hidden: int = 512
    theta: float = 10_000.0
    eps: float = 1e-5


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: no mean taken away, no bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """x (B,H,T,d): the pair (x_i, x_{i+d/2}) at position t is turned by the angle t * theta^(-2i/d), so that a query
    and a key meet at an angle that depends on their distance alone."""
    length, width = x.shape[-2:]
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.arange(length).float()[:, None] * frequencies  # (T, d/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Every position reads the ones before it: softmax(q k / sqrt(d)) v. Query heads share key/value heads."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.width, config.heads * config.head_width, bias=False)
        self.k = nn.Linear(config.width, config.groups * config.head_width, bias=False)
        self.v = nn.Linear(config.width, config.groups * config.head_width, bias=False)
        self.out = nn.Linear(config.heads * config.head_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, self.config.head_width).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = rotate(q, self.config.theta), rotate(k, self.config.theta)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention moves information between positions, then each position is worked on by itself; both beside the
    stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width, config.eps), Attention(config)
        self.ffn_norm, self.ffn = RMSNorm(config.width, config.eps), FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """tokens (B,T) -> logits (B,T,V). The output matrix is the embedding itself."""

    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        for name, weight in self.named_parameters():
            if (
                weight.ndim == 2
            ):  # what writes into the stream is smaller, so that the sum of all branches keeps its size
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5 if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    steps: int = 300
    rows: int = 16  # in a step
    at_once: int = 8  # in a pass: gradients of several passes add up to the step's
    length: int = 128
    rate: float = 3e-3
    warmup: int = 20
    floor: float = 0.1  # of the rate, at the end
    weight_decay: float = 0.1
    clip: float = 1.0


def optimizer_of(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """AdamW. Only matrices decay: a norm's gain has no business near zero."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def rate_at(step: int, training: Training) -> float:
    """A linear warm-up, then half a cosine down to the floor."""
    if step < training.warmup:
        return training.rate * (step + 1) / training.warmup
    done = (step - training.warmup) / max(1, training.steps - training.warmup)
    return training.rate * (training.floor + (1 - training.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, step: int, training: Training
) -> float:
    """One update; the loss in nats per token. Losses are *sums* over passes, divided once by the tokens of the whole
    step: the split into passes then changes nothing."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, training)
    total = 0.0
    for some, wanted in zip(inputs.split(training.at_once), targets.split(training.at_once), strict=True):
        loss = F.cross_entropy(model(some).flatten(0, 1), wanted.flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(targets.numel())
    nn.utils.clip_grad_norm_(model.parameters(), training.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / targets.numel()


def batch_of(text: Tensor, training: Training, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows from random places: what is read, and the same one byte later."""
    starts = torch.randint(len(text) - training.length, (training.rows,), generator=generator)
    rows = torch.stack([text[start : start + training.length + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


# ---- writing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write(model: nn.Module, prompt: bytes, number: int, generator: torch.Generator, length: int = 128) -> bytes:
    """Draw one byte after another. No cache: every byte reads the whole text again."""
    tokens = torch.tensor([list(prompt)])
    for _ in range(number):
        logits = model(tokens[:, -length:])[:, -1]
        drawn = torch.multinomial(torch.softmax(logits / 0.8, dim=-1), 1, generator=generator)
        tokens = torch.cat((tokens, drawn), dim=1)
    return bytes(tokens[0].tolist())


def main(file: str, steps: int = 300) -> None:
    torch.manual_seed(0)
    text = torch.tensor(list(Path(file).read_bytes()))
    held_out = text[-len(text) // 20 :]
    training, model = Training(steps=steps), Llama(Config())
    optimizer, generator = optimizer_of(model, training), torch.Generator().manual_seed(0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes")
    began = time.perf_counter()
    for step in range(steps):
        inputs, targets = batch_of(text[: -len(held_out)], training, generator)
        loss = train_step(model, optimizer, inputs, targets, step, training)
        if step % 20 == 0 or step == steps - 1:
            speed = (step + 1) * targets.numel() / (time.perf_counter() - began)
            print(f"step {step:4d}   {loss / math.log(2):.3f} bits per byte   {speed:,.0f} bytes/s")
    inputs, targets = batch_of(held_out, Training(rows=64), generator)
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    print(f"held out: {loss / math.log(2):.3f} bits per byte")
    print(write(model, b"The ", 300, generator).decode(errors="replace"))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
