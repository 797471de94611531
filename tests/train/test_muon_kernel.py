"""Muon's kernel in C++ is `newton_schulz_in_groups`, which is the published polynomial."""

import pytest
import torch
from torch import Tensor, nn

from llm_quest.contracts import ParameterScale
from llm_quest.errors import QuestWarning
from llm_quest.layers import native
from llm_quest.layers.muon_kernel import (
    MatrixUpdate,
    iteration_groups,
    missing_kernel,
    orthogonalize_by_kernel,
    update_matrices,
)
from llm_quest.train import newton_schulz, optimizers
from llm_quest.train.newton_schulz import newton_schulz_bf16, newton_schulz_by_kernel, newton_schulz_in_groups
from llm_quest.train.optimizers import make_muon

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(40, 20), (20, 40), (33, 97), (97, 33), (64, 64), (5, 7), (1, 5), (5, 1), (3, 12, 50)]


def need(dtype: torch.dtype) -> None:
    if reason := missing_kernel(CPU, dtype):
        pytest.skip(f"no kernel: {reason}")


def spectra(rows: int, columns: int, generator: torch.Generator) -> list[Tensor]:
    """Matrices whose singular values are alike, fall slowly, fall fast, are few, or none."""
    flat = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    index = torch.arange(len(s), dtype=torch.float64)
    falling = [u @ torch.diag(values) @ v for values in (1 / (1 + index), 10 ** (-3 * index / len(s)))]
    few = u @ torch.diag(torch.where(index < 8, 1.0, 0.01).double()) @ v
    return [flat, *falling, few, torch.zeros_like(flat)]


@pytest.mark.parametrize("shape", [(24, 24), (10, 30), (30, 10), (3, 8, 20), (1, 5)])
def test_the_definition_is_the_published_polynomial_for_every_division_into_groups(generator, shape):
    for x in (torch.randn(shape, generator=generator), 1e4 * torch.randn(shape, generator=generator)):
        exact = newton_schulz.newton_schulz(x.double(), 5)
        for groups in ([5], [3, 2], [1] * 5, [2, 2, 1], [1, 4]):
            found = newton_schulz_in_groups(x, groups, torch.float32)
            assert found.shape == x.shape
            assert (found - exact).norm() <= 2e-5 * exact.norm(), groups
    assert not newton_schulz_in_groups(torch.zeros(shape), [3, 2], torch.float32).any()


def test_small_matrices_have_fewer_iterations_on_one_gram_matrix():
    assert [iteration_groups(steps, torch.bfloat16, 192) for steps in (1, 5, 6)] == [[1], [3, 2], [3, 3]]
    assert iteration_groups(5, torch.bfloat16, 191) == [2, 2, 1]
    assert iteration_groups(5, torch.float32, 64) == [5]


@pytest.mark.parametrize("shape", [(64, 160), (96, 96), (128, 48), (192, 256)])
def test_in_bfloat16_it_is_as_exact_as_the_published_steps(generator, shape):
    """Commonly got wrong: five steps on one Gram matrix lose every small singular value, three on a small one some."""
    for x in spectra(*shape, generator)[:-1]:
        exact = newton_schulz.newton_schulz(x, 5)
        published, ours = newton_schulz_bf16(x, 5), definition(x, torch.bfloat16)
        errors = [float((found - exact).norm() / exact.norm()) for found in (published, ours)]
        assert errors[1] <= 1.05 * errors[0] + 0.006
        assert torch.linalg.matrix_norm(ours, 2) < 1.35


def definition(x: Tensor, dtype: torch.dtype) -> Tensor:
    return newton_schulz_in_groups(x, iteration_groups(5, dtype, min(x.shape[-2:])), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_its_definition_on_every_instruction_set(generator, dtype):
    need(dtype)
    for isa in ("plain", "avx2", "avx512") if dtype == torch.float32 else ("best",):
        for shape in SHAPES:
            x = torch.randn(shape, generator=generator)
            found, wanted = orthogonalize_by_kernel(x, 5, dtype, isa), definition(x, dtype)
            exact = newton_schulz.newton_schulz(x.double(), 5)
            assert found.shape == x.shape
            bound = 1e-4 if dtype == torch.float32 else 2.5e-2
            assert (found - wanted).norm() <= bound * exact.norm(), (isa, shape)
            assert (found - exact).norm() <= bound * exact.norm(), (isa, shape)
        for x in spectra(70, 100, generator):
            found, wanted = orthogonalize_by_kernel(x, 5, dtype, isa), definition(x, dtype)
            assert (found - wanted).norm() <= (2e-3 if dtype == torch.float32 else 0.1) * wanted.norm()


class Matrices(nn.Module):
    """Matrices of several shapes and divisions, stacks of experts, and two that the kernel cannot read."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "up": (50, 12),
            "down": (12, 50),
            "same": (12, 50),
            "qkv": (16, 12),
            "experts": (3, 8, 6),
            "gain": (16,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        double = torch.randn(9, 5, generator=generator, dtype=torch.float64)
        self.register_parameter("exact", nn.Parameter(double))
        self.register_parameter("turned", nn.Parameter(torch.randn(7, 9, generator=generator).T))


def train(form: str, steps: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and momenta after some steps, in one of which a matrix has no gradient."""
    model, generator = Matrices(), torch.Generator().manual_seed(1)
    splits = {"qkv": (8, 4, 4), "experts": (4, 4)}
    scales = {"same": ParameterScale("", muon=(0.5,)), "qkv": ParameterScale("", muon=(1.0, 2.0, 3.0))}
    optimizer = make_muon(model, lr=0.1, weight_decay=0.2, row_splits=splits, form=form, scales=scales)
    optimizer.param_groups[1]["lr"] = 0.3
    optimizer.param_groups[0]["momentum"] = 0.4
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if step == 1:
            model.up.grad = None
        optimizer.step()
    hidden = [p.detach() for p in model.parameters()]
    return hidden, [optimizer.state[p]["momentum"] for group in optimizer.matrix_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_by_the_kernel_is_the_step_by_the_definition(monkeypatch, dtype):
    """Momentum, decay, rates, factors and divisions, for matrices that the kernel reads and for others."""
    need(dtype)
    form, taken = f"kernel_{str(dtype).removeprefix('torch.')}", []
    monkeypatch.setattr(
        optimizers, "update_matrices", lambda updates, *rest: taken.extend(updates) or update_matrices(updates, *rest)
    )
    found, momenta = train(form)
    assert {tuple(one.weight.shape) for one in taken} == {(50, 12), (12, 50), (16, 12), (3, 8, 6)}
    for module in (optimizers, newton_schulz):
        monkeypatch.setattr(module, "missing_kernel", lambda *machine: "taken away")
    newton_schulz.warn_of_definition.cache_clear()
    with pytest.warns(QuestWarning, match="taken away"):
        wanted, kept = train(form)
    for ours, plain in zip(momenta, kept, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)
    for ours, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_by_the_kernel_has_the_same_bits_on_any_number_of_threads(dtype):
    need(dtype)
    threads, ends = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            ends.append(train(f"kernel_{str(dtype).removeprefix('torch.')}")[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_own_matrix(generator, dtype):
    need(dtype)
    x = torch.randn(3, 20, 40, generator=generator)
    x[1, 3, 5] = float("nan")
    found = orthogonalize_by_kernel(x, 5, dtype)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], orthogonalize_by_kernel(x[::2], 5, dtype))


def test_the_operator_refuses_what_it_would_read_beyond():
    need(torch.float32)

    def update(sizes: list[tuple[int, int]], weight: Tensor) -> None:
        one = MatrixUpdate(weight, torch.zeros(4, 6), torch.zeros(4, 6), sizes, [1.0] * len(sizes))
        update_matrices([one], 5, torch.float32)

    with pytest.raises(RuntimeError, match="do not add up"):
        update([(4, 6), (1, 6)], torch.zeros(4, 6))
    with pytest.raises(RuntimeError, match="of one size"):
        update([(4, 6)], torch.zeros(4, 7))
    with pytest.raises(RuntimeError, match="contiguous"):
        update([(4, 6)], torch.zeros(6, 4).T)


def test_without_the_kernel_its_definition_is_taken_and_the_reason_is_told(monkeypatch, generator):
    monkeypatch.setattr(native.Library, "loaded", False)
    monkeypatch.setattr(native.Library, "reason", "no C++ compiler was found")
    newton_schulz.warn_of_definition.cache_clear()
    x = torch.randn(6, 9, generator=generator)
    with pytest.warns(QuestWarning, match="plain form is slow: no C\\+\\+ compiler was found"):
        found = newton_schulz_by_kernel(x, 5, dtype=torch.float32)
    assert torch.equal(found, newton_schulz_in_groups(x, [5], torch.float32))
