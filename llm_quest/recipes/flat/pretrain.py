"""Pretraining in one file: a Llama-style model, bytes as tokens, AdamW, a cosine, a loop. Only PyTorch is needed.

    python -m llm_quest.recipes.flat.pretrain TEXT_FILE [steps]

It is the pretraining recipe without tokenizer, packed documents, checkpoints, mixed precision and several processes.
A test starts this model and the package's from the same weights and holds their losses equal at every step."""

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
class LlamaConfig:
    vocab_size: int = 256  # bytes
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2  # each is shared by num_attention_heads / num_key_value_heads query heads
    head_dim: int = 32
    intermediate_size: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight: no mean is subtracted, no bias."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def apply_rotary(x: Tensor, theta: float) -> Tensor:
    """x (B,H,T,d): the pair (x_i, x_{i+d/2}) at position t is turned by the angle t * theta^(-2i/d), so that a query
    and a key meet at an angle that depends on their distance alone."""
    length, width = x.shape[-2:]
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    angles = torch.arange(length).float()[:, None] * frequencies  # (T, d/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention, softmax(q k / sqrt(d)) v over the positions up to each. Query heads share key/value heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, -1, self.config.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = apply_rotary(q, self.config.rope_theta), apply_rotary(k, self.config.rope_theta)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then a feed-forward layer at each position; both add to the residual stream."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.hidden_size, config.rms_norm_eps), Attention(config)
        self.ffn_norm, self.ffn = RMSNorm(config.hidden_size, config.rms_norm_eps), FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """tokens (B,T) -> logits (B,T,V). The output matrix is the embedding itself."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # branches write with a smaller std, so that their sum has the size of the stream
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.num_hidden_layers) ** 0.5 if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainArguments:
    max_steps: int = 300
    batch_size: int = 16  # in a step
    micro_batch_size: int = 8  # in a pass: gradients of several passes add up to the step's
    sequence_length: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    min_lr_ratio: float = 0.1  # of the peak rate, at the end
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0


def build_adamw(model: nn.Module, training: PretrainArguments) -> torch.optim.Optimizer:
    """AdamW. Weight decay is for matrices only, not for the gains of norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate_at(step: int, training: PretrainArguments) -> float:
    """A linear warm-up, then half a cosine down to the floor."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, training.max_steps - training.warmup_steps)
    return training.learning_rate * (
        training.min_lr_ratio + (1 - training.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    )


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    step: int,
    training: PretrainArguments,
) -> float:
    """One optimizer step; returns the loss in nats per token. Losses are *sums* over passes, divided once by the tokens
    of the whole step: the split into passes then changes nothing."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, training)
    total = 0.0
    for some, wanted in zip(
        inputs.split(training.micro_batch_size), targets.split(training.micro_batch_size), strict=True
    ):
        loss = F.cross_entropy(model(some).flatten(0, 1), wanted.flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(targets.numel())
    nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / targets.numel()


def sample_rows(text: Tensor, training: PretrainArguments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows from random places: inputs, and targets one byte later."""
    starts = torch.randint(len(text) - training.sequence_length, (training.batch_size,), generator=generator)
    rows = torch.stack([text[start : start + training.sequence_length + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]


# ---- writing ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_bytes(
    model: nn.Module, prompt: bytes, max_new_tokens: int, generator: torch.Generator, context: int = 128
) -> bytes:
    """Draw one byte after another. Without a cache: every byte reads the whole text again."""
    tokens = torch.tensor([list(prompt)])
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -context:])[:, -1]
        drawn = torch.multinomial(torch.softmax(logits / 0.8, dim=-1), 1, generator=generator)
        tokens = torch.cat((tokens, drawn), dim=1)
    return bytes(tokens[0].tolist())


def main(file: str, steps: int = 300) -> None:
    torch.manual_seed(0)
    text = torch.tensor(list(Path(file).read_bytes()))
    held_out = text[-len(text) // 20 :]
    training, model = PretrainArguments(max_steps=steps), Llama(LlamaConfig())
    optimizer, generator = build_adamw(model, training), torch.Generator().manual_seed(0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes")
    began = time.perf_counter()
    for step in range(steps):
        inputs, targets = sample_rows(text[: -len(held_out)], training, generator)
        loss = train_step(model, optimizer, inputs, targets, step, training)
        if step % 20 == 0 or step == steps - 1:
            speed = (step + 1) * targets.numel() / (time.perf_counter() - began)
            print(f"step {step:4d}   {loss / math.log(2):.3f} bits per byte   {speed:,.0f} bytes/s")
    inputs, targets = sample_rows(held_out, PretrainArguments(batch_size=64), generator)
    with torch.no_grad():
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    print(f"held out: {loss / math.log(2):.3f} bits per byte")
    print(generate_bytes(model, b"The ", 300, generator).decode(errors="replace"))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
