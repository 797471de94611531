"""Data parallelism by adding gradients: every process holds the whole model and its own rows (DDP, Li et al. 2020,
arXiv:2006.15704).

      backward:   head.weight  blocks.1...  | blocks.0...  embed.weight       gradients become ready from the end
      buckets:    [ 0: sent as soon as full ] [ 1: sent when 0 has been sent ]
      bucket:     [ gradient, gradient, ... | 1 1 0 ]                         was each parameter used?

A bucket is sent while the backward pass goes on. Buckets are sent in one order on every process, whatever became ready
first. A parameter that no process used keeps no gradient: an optimizer that skips it on one process skips it here.

Commonly got wrong: waiting for the gradient of every parameter. An objective that does not call a part of the model
(preference losses and multi-token modules), or that calls it for some rows alone, then never ends. Differs from torch's
DistributedDataParallel: sums in place of means; which parameters were used is sent with the gradients, so that the
graph is not searched; the number of micro-batches may differ between processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20


class GradientReducer:
    """Sums gradients over all processes, in buckets and during the backward pass.

    parameters: in the order of their use; the trainable ones take part. bucket_bytes: of one collective."""

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self.buckets = split_into_buckets([p for p in parameters if p.requires_grad][::-1], bucket_bytes)
        self.bucket_of = {id(p): number for number, bucket in enumerate(self.buckets) for p in bucket}
        self.missing: list[set[int]] = []
        self.sent: list[tuple[Tensor, Any]] = []

    @contextmanager
    def synchronize(self) -> Iterator[None]:
        """Reduce gradients during the backward passes inside (the last of a step): afterwards each is the sum over all
        processes."""
        self.missing = [{id(p) for p in bucket} for bucket in self.buckets]
        self.sent = []
        hooks = [p.register_post_accumulate_grad_hook(self._mark_ready) for bucket in self.buckets for p in bucket]
        try:
            yield
            while len(self.sent) < len(self.buckets):
                self._send_next()
            for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
                work.wait()
                unpack_gradients(bucket, flat)
        finally:
            self.sent = []  # what is held here keeps the connections open
            for hook in hooks:
                hook.remove()

    def _mark_ready(self, p: Tensor) -> None:
        self.missing[self.bucket_of[id(p)]].discard(id(p))
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send_next()

    def _send_next(self) -> None:
        flat = pack_gradients(self.buckets[len(self.sent)])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))


class DataParallel(nn.Module):
    """The module that the loop calls, beside the reducer of its gradients."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.reducer = module, GradientReducer(module.parameters())

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def split_into_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, up to `bucket_bytes` together."""
    buckets: list[list[nn.Parameter]] = []
    filled = 0
    for p in parameters:
        size = p.numel() * p.element_size()
        if not buckets or buckets[-1][0].dtype != p.dtype or filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(p)
        filled += size
    return buckets


@torch.no_grad()
def pack_gradients(bucket: list[nn.Parameter]) -> Tensor:
    """The gradients one after another, and for each a 1 if there is one and a 0 if not."""
    used = bucket[0].new_tensor([p.grad is not None for p in bucket])
    return torch.cat([*(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket), used])


@torch.no_grad()
def unpack_gradients(bucket: list[nn.Parameter], flat: Tensor) -> None:
    """Give each parameter its summed gradient, a view of the bucket, and none to those that no process used."""
    *sums, used = flat.split([*(p.numel() for p in bucket), len(bucket)])
    for p, total, users in zip(bucket, sums, used.tolist(), strict=True):
        if users:
            p.grad = total.view_as(p)
