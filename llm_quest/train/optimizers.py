"""AdamW, Muon for the hidden matrices with AdamW for the rest, and the schedules of their learning rate.

Muon: momentum, then the nearest orthogonal matrix instead of the gradient (every direction of the matrix moves
equally):

      M <- mu M + (1 - mu) G        O = NS(G + mu (M - G))        W <- W - lr (0.2 sqrt(max(rows, columns)) O + decay W)

NS, five Newton-Schulz steps, turns U S V^T into about U V^T (`newton_schulz.py`). The
factor 0.2 sqrt(max) gives the update the root mean square of an AdamW update, so both share one learning rate (Liu et
al. 2025). Commonly got wrong: a fused projection is several matrices stacked by rows, and orthogonalizing the stack
mixes them.

A schedule is `step -> multiplier of the peak rate`: warm-up, then one of four shapes. Resuming needs nothing from it,
and a longer run is another function. Steps are optimizer steps counted from 0, never micro-batches or epochs.

      cosine  ⟋‾⟍_       linear  ⟋\\_       wsd  ⟋‾‾‾‾\\_ (warm-up, stable, decay)       constant  ⟋‾‾‾‾
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from llm_quest.contracts import ParameterScale
from llm_quest.errors import UsageError
from llm_quest.layers.muon_kernel import MatrixUpdate, missing_kernel, update_matrices
from llm_quest.train.newton_schulz import KERNEL_FORMS, default_form, orthogonalize, update_scale
from llm_quest.train.parallel import is_sharded

RowSplits = Mapping[str, Sequence[int]]
Scales = Mapping[str, ParameterScale]
NO_SCALES: Scales = {}
BATCH_NUMBERS = 1 << 22
"""Of the matrices that Muon orthogonalizes together: 16 MB in float32."""


def make_adamw(
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    scales: Scales = NO_SCALES,
) -> Optimizer:
    """Make a fused AdamW. Weight decay applies to matrices only, not to gains of norms and biases. scales: of a
    parametrization, by name; empty: every parameter has the same rate."""
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, eps=eps, scales=scales)
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def make_muon(
    model: nn.Module,
    *,
    lr: float,
    row_splits: RowSplits | None = None,
    adamw_prefixes: Sequence[str] = ("embed.", "head."),
    momentum: float = 0.95,
    newton_schulz_steps: int = 5,
    form: str = "",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    scales: Scales = NO_SCALES,
) -> Optimizer:
    """Make a `Muon` optimizer: Muon for the hidden matrices, AdamW for vectors and for the parameters whose names start
    with one of `adamw_prefixes`.

    form: of the iterations, see `orthogonalize`.
    row_splits: parameter name -> rows of each matrix stacked in it (`Decoder.row_splits()`). A three-dimensional
    parameter (a stack of experts' matrices) belongs to Muon if `row_splits` names it."""
    row_splits = {} if row_splits is None else row_splits
    unknown = sorted(set(row_splits) - {name for name, _ in model.named_parameters(remove_duplicate=False)})
    if unknown:
        raise ValueError(f"the row splits name parameters that the model does not have: {', '.join(unknown)}")
    hidden: dict[str, nn.Parameter] = {}
    rest: dict[str, nn.Parameter] = {}
    for name, p in trainable_parameters(model).items():
        matrix = (p.ndim == 2 or name in row_splits) and not name.startswith(tuple(adamw_prefixes))
        (hidden if matrix else rest)[name] = p
    matrices: list[dict[str, Any]] = [
        {"params": [p], "rows": matrix_rows(name, p, row_splits), "weight_decay": weight_decay}
        for name, p in hidden.items()
    ]
    for group, name in zip(matrices, hidden, strict=True):
        if name in scales:
            group["part_scales"] = list(scales[name].muon)
    return Muon(
        _set_initial_lr(matrices, lr),
        weight_decay_groups(rest, lr=lr, weight_decay=weight_decay, eps=eps, scales=scales),
        model=model, lr=lr, momentum=momentum, steps=newton_schulz_steps, betas=betas, eps=eps,
        form=form,
    )  # fmt: skip


class Muon(Optimizer):
    """An optimizer with two kinds of parameter groups: those with `rows` are updated by Muon, the others by AdamW.

    Works on plain tensors, under DDP, and on FSDP2's sharded ones: momentum stays sharded, the matrix is gathered
    for Newton-Schulz, and each process keeps its own rows of the result."""

    def __init__(
        self,
        matrix_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        *,
        model: nn.Module,
        lr: float,
        momentum: float,
        steps: int,
        betas: tuple[float, float],
        eps: float,
        form: str = "",
    ):
        assert_groups_cover(model, [*matrix_groups, *adamw_groups])
        self.form = form
        super().__init__([*matrix_groups, *adamw_groups], {"lr": lr, "momentum": momentum, "steps": steps})
        self.matrix_groups = self.param_groups[: len(matrix_groups)]
        self.adamw = (
            AdamW(self.param_groups[len(matrix_groups) :], lr=lr, betas=betas, eps=eps, fused=True)
            if adamw_groups
            else None
        )
        if self.adamw is not None:
            self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        ready = [(p, group) for group in self.matrix_groups for p in group["params"] if p.grad is not None]
        if self.form in KERNEL_FORMS:
            ready = self._step_by_kernel_(ready)
        for batch in batches_of_one_shape(ready):
            self._update_batch_(batch)
        if self.adamw is not None:
            self.adamw.step()

    def _step_by_kernel_(self, ready: list[tuple[Tensor, dict[str, Any]]]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Step all that the kernel can read; return the others, of which the kernel only makes the iterations."""
        dtype, rest = KERNEL_FORMS[self.form], []
        updates: dict[int, list[MatrixUpdate]] = {}
        for p, group in ready:
            update = matrix_update(p, self._momentum_buffer(p), group)
            if update.fits() and not missing_kernel(p.device, dtype):
                updates.setdefault(group["steps"], []).append(update)
            else:
                rest.append((p, group))
        for steps, alike in updates.items():
            update_matrices(alike, steps, dtype)
        return rest

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]

    def _update_batch_(self, batch: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """One step of matrices of one shape, orthogonalized together."""
        rows, steps = batch[0][1]["rows"], batch[0][1]["steps"]
        form = self.form or default_form(batch[0][0].device)
        ahead = [gather_matrix(self._look_ahead(p, group["momentum"], form)) for p, group in batch]
        stacked = torch.stack(ahead) if len(ahead) > 1 else ahead[0]
        updates = orthogonalize(stacked, rows, steps, form)
        for (p, group), update in zip(batch, updates if len(ahead) > 1 else [updates], strict=True):
            if "part_scales" in group:
                update = scale_parts(update, rows, group["part_scales"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(update, p), alpha=-group["lr"])

    def _look_ahead(self, p: Tensor, momentum: float, form: str) -> Tensor:
        """Update the momentum; return the gradient moved towards it (Nesterov momentum), in the dtype of the form: what
        is stacked, iterated on and added to the weights is half as much in bfloat16."""
        gradient = p.grad
        assert gradient is not None, "a batch holds parameters that have a gradient"
        ahead = gradient.lerp(self._momentum_buffer(p).lerp_(gradient, 1 - momentum), momentum)
        return ahead.to(torch.bfloat16) if form == "bfloat16" else ahead


def matrix_update(p: Tensor, momentum_buffer: Tensor, group: dict[str, Any]) -> MatrixUpdate:
    """What the kernel is given of a parameter: each of its stacked matrices, for every expert."""
    assert p.grad is not None, "only parameters that have a gradient are updated"
    experts, columns = p.shape[:-2].numel(), p.shape[-1]
    factors = [
        group["lr"] * update_scale(rows, columns) * part
        for rows, part in zip(group["rows"], group.get("part_scales", [1.0] * len(group["rows"])), strict=True)
    ]
    return MatrixUpdate(
        p, momentum_buffer, p.grad, [(rows, columns) for rows in group["rows"]] * experts, factors * experts,
        group["momentum"], 1 - group["lr"] * group["weight_decay"],
    )  # fmt: skip


def batches_of_one_shape(
    ready: Iterable[tuple[Tensor, dict[str, Any]]],
) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Batch parameters, with their groups, of one shape and one division into rows, up to `BATCH_NUMBERS` numbers: a
    product of a stack of small matrices takes less time than the products of each."""
    equal: dict[Any, list[tuple[Tensor, dict[str, Any]]]] = {}
    for p, group in ready:
        equal.setdefault((p.shape, tuple(group["rows"]), group["steps"]), []).append((p, group))
    for alike in equal.values():
        size = max(1, BATCH_NUMBERS // alike[0][0].numel())
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def scale_parts(update: Tensor, rows: Sequence[int], factors: Sequence[float]) -> Tensor:
    """Each of the matrices stacked by these rows times its factor."""
    each = torch.cat([update.new_full((size,), factor) for size, factor in zip(rows, factors, strict=True)])
    return update * each[:, None]


def gather_matrix(t: Tensor) -> Tensor:
    """The full matrix behind a sharded one."""
    return t.full_tensor() if is_sharded(t) else t


def shard_like(full: Tensor, p: Tensor) -> Tensor:
    """This process's part of a matrix that every process holds in full: no communication."""
    if not is_sharded(p):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(full, p.device_mesh, [Replicate()] * p.device_mesh.ndim).redistribute(
        placements=p.placements
    )


def matrix_rows(name: str, p: Tensor, row_splits: RowSplits) -> list[int]:
    """The rows of each matrix stacked in a parameter; ValueError if their sum is not the parameter's."""
    rows = list(row_splits.get(name, (p.shape[-2],)))
    if sum(rows) != p.shape[-2]:
        raise ValueError(f"the row splits of {name}, {rows}, add up to {sum(rows)}; it has {p.shape[-2]} rows")
    return rows


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, eps: float = 1e-8, scales: Scales = NO_SCALES
) -> list[dict[str, Any]]:
    """Groups with and without weight decay; every trainable parameter is in exactly one."""
    named = trainable_parameters(model)
    listed = weight_decay_groups(named, lr=lr, weight_decay=weight_decay, eps=eps, scales=scales)
    assert_groups_cover(model, listed)
    return listed


def weight_decay_groups(
    named: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float, eps: float = 1e-8, scales: Scales = NO_SCALES
) -> list[dict[str, Any]]:
    """One group with and one without weight decay, as far as there are such parameters. Under FSDP2 each is two: the
    fused update takes sharded tensors or whole ones. With `scales`, one for each that parameters share, with its own
    rate, decay and epsilon."""
    groups: dict[tuple[float, bool, float, float], list[nn.Parameter]] = {}
    for name, p in named.items():
        scale = scales.get(name, UNSCALED)
        decay = weight_decay * scale.weight_decay if p.ndim >= 2 else 0.0
        groups.setdefault((decay, is_sharded(p), scale.lr, scale.eps), []).append(p)
    listed = []
    for (decay, _, rate, epsilon), params in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        group = {"params": params, "weight_decay": decay} | ({"eps": eps * epsilon} if scales else {})
        listed += _set_initial_lr([group], lr * rate)
    return listed


UNSCALED = ParameterScale("")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, tied weights once. UsageError if there are none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise UsageError(
            "the model has no trainable parameter: every one is frozen (requires_grad is False)"
            + "; quantized weights learn through an adapter: add lora to techniques" * has_quantized_weights(model)
        )
    return named


def has_quantized_weights(model: nn.Module) -> bool:
    """Whether matrices are stored as codes in int8, which have no gradient."""
    return any(p.dtype == torch.int8 for p in model.parameters())


def assert_groups_cover(model: nn.Module, listed: Iterable[dict[str, Any]]) -> None:
    """Assert that every trainable parameter is in exactly one group."""
    grouped_ids = [id(p) for group in listed for p in group["params"]]
    assert len(grouped_ids) == len(set(grouped_ids)), "a parameter is in two optimizer groups"
    assert set(grouped_ids) == {id(p) for p in trainable_parameters(model).values()}, (
        "a trainable parameter is in no optimizer group"
    )


def _set_initial_lr(listed: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    return [group | {"lr": lr, "initial_lr": lr} for group in listed]


LRSchedule = Callable[[int], float]


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": make_adamw, "muon": make_muon}


def make_lr_schedule(
    steps: int, *, warmup_steps: int = 0, shape: str = "cosine", min_lr_ratio: float = 0.0, decay_fraction: float = 0.2
) -> LRSchedule:
    """Make a schedule: step -> factor of the peak learning rate, for a run of `steps`.

    warmup_steps: so many steps rise linearly; step 0 has 1/warmup_steps, step warmup_steps-1 has 1. min_lr_ratio:
    what is left at the end, as a part of the peak. decay_fraction: wsd falls, linearly, in this last part of the
    whole run, or from the end of the warm-up where that is later. After the last step: min_lr_ratio."""
    if shape not in SCHEDULE_SHAPES:
        raise UsageError(f"no schedule is called {shape!r}; known: {', '.join(SCHEDULE_SHAPES)}")
    if not 0 <= warmup_steps <= steps:
        raise UsageError(f"warm-up of {warmup_steps} steps does not fit a run of {steps}: choose 0 to {steps}")
    if not 0 <= min_lr_ratio <= 1 or not 0 < decay_fraction <= 1:
        raise UsageError(
            f"min_lr_ratio must lie in 0..1 (is {min_lr_ratio}) and decay_fraction in 0..1, above 0 "
            f"(is {decay_fraction})"
        )
    fall, rest = SCHEDULE_SHAPES[shape], max(1, steps - warmup_steps)
    decay = min(1.0, decay_fraction * steps / rest)  # as a part of what follows the warm-up

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / rest)
        return min_lr_ratio + (1 - min_lr_ratio) * fall(done, decay)

    return multiplier


def scale_schedule_after(rate: LRSchedule, after: int, factor: float) -> LRSchedule:
    """The same schedule, times `factor` from step `after` on."""
    return lambda step: rate(step) * (factor if step >= after else 1.0)


def cosine_decay(done: float, decay: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * done))


def linear_decay(done: float, decay: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - done


def wsd_decay(done: float, decay: float) -> float:
    """1, and in the last `decay` a straight line to 0: a run can be extended from before its decay."""
    return min(1.0, (1 - done) / decay)


def no_decay(done: float, decay: float) -> float:
    """Constant 1."""
    return 1.0


SCHEDULE_SHAPES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine_decay,
    "linear": linear_decay,
    "wsd": wsd_decay,
    "constant": no_decay,
}
