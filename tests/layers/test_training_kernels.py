"""The training kernels: the values and gradients of the plain forms, and only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.layers import native, training_kernels
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.norm import RMSNorm
from llm_quest.layers.rotary import apply_rotary_emb, widen_tables
from llm_quest.layers.scaled_dot_product import explicit_attention, fused_attention
from llm_quest.layers.training_kernels import TrainingKernels, set_training_kernels, takes_training_kernel
from llm_quest.objectives.cross_entropy import full_cross_entropy, linear_cross_entropy
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.scope import CausalMask
from tests.laws.subjects import EVERYBODY, own, random_tokens

pytestmark = pytest.mark.skipif(not native.is_loaded(), reason=f"no C++ kernel: {native.Library.reason}")
ISAS = ["plain", "avx2", "avx512"]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    assert set_training_kernels(True) == ""
    yield
    set_training_kernels(False)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1])) * scale


def require_same_gradients(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The value and the gradients of `kernel` in float32 are those of `plain` in float64."""
    mine = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    y, expected = kernel(*mine), plain(*exact)
    g = normal(*expected.shape) if expected.ndim else torch.ones(())
    torch.testing.assert_close(y.double(), expected, atol=2e-6 * expected.abs().max().item(), rtol=2e-5)
    y.backward(g)
    expected.backward(g.double())
    for x, wide in zip(mine, exact, strict=True):
        torch.testing.assert_close(x.grad.double(), wide.grad, atol=3e-6 * wide.grad.abs().max().item(), rtol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "width"), [(3, 5), (300, 16), (2, 83)])
def test_the_norm_is_the_plain_one(isa: str, rows: int, width: int, monkeypatch):
    monkeypatch.setattr(TrainingKernels, "isa", isa)
    x, weight = normal(rows, 2, width, scale=3.0), normal(width)
    require_same_gradients(
        lambda x, w: training_kernels.rms_norm_by_kernel(x, w, 1e-3),
        lambda x, w: torch.rms_norm(x, (width,), w, 1e-3),
        x,
        weight,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rows", "width"), [(3, 5), (2, 83)])
def test_the_gated_product_is_the_plain_one(isa: str, rows: int, width: int, monkeypatch):
    monkeypatch.setattr(TrainingKernels, "isa", isa)
    gate_up = normal(rows, 2 * width, scale=4.0)
    gate_up[0, 0], gate_up[0, 1] = -120.0, 120.0
    require_same_gradients(
        training_kernels.silu_product_by_kernel, lambda x: F.silu(x[:, :width]) * x[:, width:], gate_up
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("batch", "tables", "heads", "width"), [(2, 1, 3, 32), (2, 2, 1, 6)])
def test_the_rotation_has_the_bits_of_the_plain_one(isa, batch, tables, heads, width, monkeypatch):
    monkeypatch.setattr(TrainingKernels, "isa", isa)
    angles = normal(tables, 7, 1, width // 2)
    cos, sin = widen_tables(angles.cos(), angles.sin())
    packed = normal(batch, 7, heads * width + 5)  # heads that lie in wider rows, as in the output of one projection
    view = lambda x: x[..., 5:].unflatten(-1, (heads, width))  # noqa: E731
    kernel = training_kernels.rotate_by_kernel(view(packed), cos, sin)
    learned = cos.clone().requires_grad_()
    apply_rotary_emb(view(packed), learned, sin).sum().backward()
    assert learned.grad is not None, "tables that are learned get their gradient from the plain form"
    set_training_kernels(False)
    assert torch.equal(kernel, apply_rotary_emb(view(packed), cos, sin))
    require_same_gradients(
        lambda x: training_kernels.rotate_by_kernel(view(x), cos, sin),
        lambda x: apply_rotary_emb(view(x), cos.double(), sin.double()),
        packed,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("length", "heads", "groups"), [(5, 2, 2), (70, 6, 2), (130, 3, 1)])
def test_causal_attention_is_the_definition(isa: str, length: int, heads: int, groups: int, monkeypatch):
    monkeypatch.setattr(TrainingKernels, "isa", isa)
    q, k, v = normal(2, length, heads, 8), normal(2, length, groups, 8, scale=2.0), normal(2, length, groups, 12)
    definition = lambda q, k, v: explicit_attention(q, k, v, CausalMask.CAUSAL, scale=0.4)  # noqa: E731
    require_same_gradients(
        lambda q, k, v: training_kernels.causal_attention_by_kernel(q, k, v, 0.4), definition, q, k, v
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_cross_entropy_of_the_kernel_is_the_definition(isa: str, softcap: float | None, monkeypatch):
    monkeypatch.setattr(TrainingKernels, "isa", isa)
    x, weight = normal(300, 6, scale=3.0), normal(21, 6, scale=3.0)
    targets = torch.arange(300) % 21
    targets[::7] = IGNORE_INDEX
    require_same_gradients(
        lambda x, w: linear_cross_entropy(x, w, targets, softcap=softcap),
        lambda x, w: full_cross_entropy(x, w, targets, softcap).to(torch.float64),
        x,
        weight,
    )
    with pytest.raises(RuntimeError, match="outside of the vocabulary"):
        training_kernels.cross_entropy_by_kernel_(x, torch.full((300,), 6), IGNORE_INDEX)


def test_numbers_that_are_not_finite_are_not_hidden():
    nan = torch.full((1, 40), float("nan"))
    assert training_kernels.rms_norm_by_kernel(nan, torch.ones(40), 1e-6).isnan().all()
    assert training_kernels.silu_product_by_kernel(nan).isnan().all()
    one = normal(2, 40)
    one[1, 3] = float("nan")
    assert training_kernels.cross_entropy_by_kernel_(one, torch.tensor([0, 0]), IGNORE_INDEX).isnan().tolist() == [
        False,
        True,
    ]
    q = normal(1, 9, 1, 8)
    q[0, 4] = float("nan")
    rows = (
        training_kernels.causal_attention_by_kernel(q, normal(1, 9, 1, 8), normal(1, 9, 1, 8), 1.0)
        .isnan()
        .all(-1)
        .flatten()
    )
    assert rows.tolist() == [row == 4 for row in range(9)]


def test_they_are_taken_in_float32_with_gradients_in_eager_passes_alone():
    x = normal(2, 4)
    assert takes_training_kernel(x, torch.nn.Parameter(x))
    assert not takes_training_kernel(x, x.double())
    assert not takes_training_kernel(x.to("meta"))
    with torch.no_grad():
        assert not takes_training_kernel(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_training_kernel(x)
    set_training_kernels(False)
    assert not takes_training_kernel(x)


def test_layers_call_them(monkeypatch):
    called: list[str] = []
    for name in ("rms_norm_by_kernel", "silu_product_by_kernel", "causal_attention_by_kernel"):
        kernel = getattr(training_kernels, name)
        monkeypatch.setattr(
            training_kernels, name, lambda *given, name=name, kernel=kernel: called.append(name) or kernel(*given)
        )
    RMSNorm(4, 1e-6)(normal(2, 4))
    GatedMLP(4, 6, F.silu)(normal(1, 2, 4))
    q, k, v = normal(1, 3, 2, 4), normal(1, 3, 1, 4), normal(1, 3, 1, 4)
    for mask in (CausalMask.CAUSAL, CausalMask.FULL):
        fused_attention(q, k, v, mask, scale=0.5)
    fused_attention(q, k, v, CausalMask.CAUSAL, scale=0.5, dropout=0.1)
    GatedMLP(4, 6, F.gelu)(normal(1, 2, 4))
    assert called == ["rms_norm_by_kernel", "silu_product_by_kernel", "causal_attention_by_kernel"]


def gradients_of(objective: NextTokenLoss, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients as one vector in float64."""
    objective.zero_grad()
    loss = objective(batch).total
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in objective.parameters()]
    return loss.detach(), torch.cat([grad.double().flatten() for grad in grads])


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", EVERYBODY)
def test_a_model_is_as_near_to_its_gradients_in_float64_as_by_the_plain_forms(name: str, packed: bool):
    exact = NextTokenLoss(own(name).train())
    objective = NextTokenLoss(own(name).float().train())
    tokens = random_tokens(exact.model, 2, 21)
    lengths = torch.tensor([[0] * 8 + [1] * 12]) if packed else None
    positions = None if lengths is None else torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    segments = None if lengths is None else lengths.expand(2, -1)
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], positions, segments)
    set_training_kernels(False)
    loss, gradients = gradients_of(exact, batch)
    _, plain = gradients_of(objective, batch)
    set_training_kernels(True)
    kernel_loss, kernel = gradients_of(objective, batch)
    torch.testing.assert_close(kernel_loss.double(), loss.double(), atol=0.0, rtol=1e-5)
    scale = gradients.norm()
    assert (kernel - gradients).norm() <= 3 * (plain - gradients).norm() + 1e-6 * scale
    assert not torch.equal(kernel, plain), "no layer took an operator"
