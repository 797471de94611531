import pytest
import torch
from torch import nn

from llm_quest.contracts import ParameterScale
from llm_quest.train import optimizers
from llm_quest.train.newton_schulz import (
    MUON_FORMS,
    newton_schulz,
    newton_schulz_by_eigenvalues,
    newton_schulz_by_gram,
    orthogonalize,
)
from llm_quest.train.optimizers import make_adamw, make_muon
from tests.train.small import Model


def set_gradients(model: nn.Module, generator: torch.Generator) -> None:
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_only_matrices_decay_and_every_parameter_is_in_one_group():
    model = Model()
    decayed, free = make_adamw(model, lr=1e-3, weight_decay=0.1).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_a_frozen_parameter_is_left_out_and_a_frozen_model_is_refused():
    model = Model()
    model.embed.weight.requires_grad_(False)
    held = [p for group in make_adamw(model, lr=1e-3).param_groups for p in group["params"]]
    assert all(p is not model.embed.weight for p in held)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_muon(model.requires_grad_(False), lr=1e-3)


def test_newton_schulz_brings_every_singular_value_near_one_and_keeps_the_directions(generator):
    for shape in ((24, 24), (10, 30), (30, 10), (3, 8, 20)):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        for _ in range(5):
            s = s / s.norm(dim=-1, keepdim=True) if _ == 0 else s
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        ours = newton_schulz(g, 5)
        torch.testing.assert_close(ours, u @ torch.diag_embed(s) @ vh, atol=1e-10, rtol=0)
        torch.testing.assert_close(newton_schulz(g * 1e4, 5), ours, atol=1e-10, rtol=0)
        values = torch.linalg.svdvals(ours)
        assert values.min() > 0.3
        assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 24), (10, 30), (30, 10), (3, 8, 20), (3, 20, 8), (1, 5)])
@pytest.mark.parametrize("form", [newton_schulz_by_eigenvalues, newton_schulz_by_gram])
def test_the_forms_on_the_gram_matrix_are_the_same_polynomial(generator, shape, form):
    """Also of matrices of low rank, whose small eigenvalues may come out below zero, and of nothing at all."""
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    low = g[..., :1] @ g[..., :1, :]
    decaying = g * torch.logspace(0, -6, shape[-1], dtype=torch.float64)
    for x in (g, g * 1e6, g * 1e-5, low, decaying, torch.zeros_like(g)):
        exact = newton_schulz(x, 5)
        torch.testing.assert_close(form(x, 5), exact, atol=1e-6, rtol=0)
        single = form(x.float(), 5)
        assert single.dtype == torch.float32
        assert (single - exact).norm() <= 2e-3 * exact.norm()


def test_a_small_matrix_is_not_decomposed(generator):
    large, small = torch.randn(65, 66, generator=generator), torch.randn(64, 66, generator=generator)
    form = MUON_FORMS["eigenvalues"]
    assert torch.equal(form(large, 5), newton_schulz_by_eigenvalues(large, 5))
    assert torch.equal(form(small, 5), newton_schulz(small, 5))
    assert not torch.equal(newton_schulz_by_eigenvalues(small, 5), newton_schulz(small, 5))


@pytest.mark.parametrize("form", MUON_FORMS)
def test_every_form_of_muon_is_within_its_bound_of_the_definition(generator, form):
    for gradient in torch.randn(3, 40, 20, generator=generator), torch.randn(40, 20, generator=generator):
        rows = [16, 8, 8, 8]
        parts = [newton_schulz(part.double(), 5) * (0.2 * 20**0.5) for part in gradient.split(rows, -2)]
        wanted = torch.cat(parts, -2)
        found = orthogonalize(gradient, rows, form=form)
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 2.5e-2 * wanted.norm()


def test_ours_equals_torchs_muon_over_ten_steps_in_float64(generator):
    start = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    ours, theirs = (nn.Sequential(nn.Linear(20, 12, bias=False, dtype=torch.float64)) for _ in range(2))
    for model in (ours, theirs):
        model[0].weight.data.copy_(start)
    mine = make_muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        gradient = torch.randn(12, 20, generator=generator, dtype=torch.float64)
        for model, optimizer in ((ours, mine), (theirs, other)):
            model[0].weight.grad = gradient.clone()
            optimizer.step()
    moved = (theirs[0].weight - start).norm()
    assert (ours[0].weight - theirs[0].weight).norm() < 0.02 * moved, (
        "the bfloat16 iterations may differ in their rounding"
    )


def test_a_fused_projection_is_orthogonalized_part_by_part(generator):
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    model[0].weight.data.zero_()
    gradient = torch.randn(24, 16, generator=generator)
    model[0].weight.grad = gradient.clone()
    make_muon(model, lr=1.0, weight_decay=0.0, momentum=0.0, row_splits={"0.weight": (16, 4, 4)}, form="float32").step()
    apart = torch.cat([orthogonalize(part, form="float32") for part in gradient.split([16, 4, 4])])
    torch.testing.assert_close(model[0].weight.data, -apart, atol=1e-5, rtol=0)  # two of a size are one batch
    assert not torch.allclose(apart, orthogonalize(gradient), atol=0.1)


def test_a_stack_of_experts_is_as_many_matrices(generator):
    model = nn.Module()
    model.experts = nn.Parameter(torch.zeros(3, 8, 6))
    model.conv = nn.Parameter(torch.zeros(5, 1, 4))
    set_gradients(model, generator)
    gradient = model.experts.grad.clone()
    optimizer = make_muon(model, lr=1.0, weight_decay=0.0, momentum=0.0, row_splits={"experts": (4, 4)})
    optimizer.step()
    alone = [torch.cat([orthogonalize(gradient[e, :4]), orthogonalize(gradient[e, 4:])]) for e in range(3)]
    torch.testing.assert_close(model.experts.data, -torch.stack(alone), atol=3e-2, rtol=0)
    assert set(optimizer.state[model.conv]) == {"step", "exp_avg", "exp_avg_sq"}, (
        "a convolution is no stack of matrices"
    )


class EqualShapes(nn.Module):
    """Matrices of one shape with one and with several divisions, stacks of experts, one of a shape of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"up": (16, 12), "same": (16, 12), "third": (16, 12), "qkv": (16, 12), "down": (12, 16), "odd": (5, 7)}
        shapes |= {"experts": (3, 8, 6), "more": (3, 8, 6), "gain": (16,)}
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(weight))


FORMS = [("eigenvalues", 1e-11), ("gram", 1e-11), ("float32", 1e-4), ("bfloat16", 5e-3)]


@pytest.mark.parametrize(("form", "atol"), FORMS)
@pytest.mark.parametrize("numbers", [400, 1 << 22])
def test_matrices_of_one_shape_are_updated_together_as_each_alone(monkeypatch, form, atol, numbers):
    """Also where some have no gradient, and each has its own rate and factors."""
    splits = {"qkv": (8, 4, 4), "experts": (4, 4), "more": (8,)}
    scales = {"same": ParameterScale("", muon=(0.5,)), "qkv": ParameterScale("", muon=(1.0, 2.0, 3.0))}
    ends = []
    for limit in (0, numbers):
        monkeypatch.setattr(optimizers, "BATCH_NUMBERS", limit)
        model, generator = EqualShapes(), torch.Generator().manual_seed(1)
        optimizer = make_muon(model, lr=0.1, row_splits=splits, form=form, scales=scales)
        optimizer.param_groups[2]["lr"] = 0.3
        for step in range(3):
            set_gradients(model, generator)
            if step == 1:
                model.up.grad = None
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for alone, together in zip(*ends, strict=True):
        torch.testing.assert_close(together, alone, atol=atol, rtol=0)


def test_the_matrices_of_a_batch_have_one_shape_and_one_division_and_a_bounded_size(monkeypatch):
    monkeypatch.setattr(optimizers, "BATCH_NUMBERS", 400)
    model = EqualShapes()
    optimizer = make_muon(model, lr=0.1, row_splits={"qkv": (8, 4, 4), "experts": (4, 4), "more": (8,)})
    names = {id(p): name for name, p in model.named_parameters()}
    ready = [(p, group) for group in optimizer.matrix_groups for p in group["params"]]
    batches = [[names[id(p)] for p, _ in batch] for batch in optimizers.batches_of_one_shape(ready)]
    assert batches == [["up", "same"], ["third"], ["qkv"], ["down"], ["odd"], ["experts"], ["more"]]


def test_embeddings_heads_and_vectors_go_to_adamw(generator):
    model, same = Model(), Model()
    same.load_state_dict(model.state_dict())
    for one in (model, same):
        set_gradients(one, torch.Generator().manual_seed(1))
    both, plain = make_muon(model, lr=1e-2), make_adamw(same, lr=1e-2)
    both.step(), plain.step()
    kinds = {name: "momentum" in both.state[p] for name, p in model.named_parameters()}
    assert [name for name, by_muon in kinds.items() if by_muon] == [
        n for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks")
    ]
    other = dict(same.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in model.named_parameters() if not kinds[name])


def test_splits_that_do_not_fit_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(ValueError, match=r"0\.weight.*add up to 5; it has 6 rows"):
        make_muon(model, lr=1e-3, row_splits={"0.weight": (3, 2)})
    with pytest.raises(ValueError, match=r"does not have: 1\.weight"):
        make_muon(model, lr=1e-3, row_splits={"1.weight": (6,)})
