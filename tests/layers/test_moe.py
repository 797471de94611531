"""Routers and experts: worked by hand, the two forms equal, the losses at their known points."""

import math

import pytest
import torch
from torch.nn import functional as F

from llm_quest.layers.experts import (
    ExpertBiases,
    Experts,
    clamped_swiglu,
    relu_squared,
    run_experts_for_loop,
    run_experts_grouped_mm,
)
from llm_quest.layers.feed_forward import GatedMLP
from llm_quest.layers.moe import LatentMoE, MixtureOfExperts, RouterOutput, SigmoidRouter, SoftmaxRouter
from llm_quest.objectives.routing import (
    load_balancing_aux_loss,
    load_balancing_aux_loss_over_layers,
    max_violation,
    router_z_loss,
    routing_entropy,
    sequence_balance_aux_loss,
)
from llm_quest.scope import Scope
from llm_quest.techniques.expert_bias import ExpertBiasBalancer


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(module):
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=make_generator(3))
    return module


def test_softmax_router_worked_by_hand():
    router = SoftmaxRouter(2, 3, top_k=2, norm_topk_prob=True)
    router.weight.data = torch.tensor([[math.log(4.0), 0.0], [0.0, 0.0], [math.log(3.0), 0.0]])
    scores, _, experts, weights = router(torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(scores, torch.tensor([[4 / 8, 1 / 8, 3 / 8]]))
    assert experts.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]]))


def test_the_bias_chooses_and_does_not_weigh():
    router = SigmoidRouter(2, 4, top_k=1, norm_topk_prob=False)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0]])
    assert router(x)[2].tolist() == [[0]]
    router.bias.data = torch.tensor([0.0, 0.0, 0.0, 5.0])
    _, _, experts, weights = router(x)
    assert experts.tolist() == [[3]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[-1.0]])))


def test_experts_of_dropped_groups_are_never_chosen_even_when_all_scores_are_negative():
    router = SigmoidRouter(8, 8, top_k=2, n_group=4, topk_group=1)
    randomize(router)
    router.bias.data = -2.0 + 0.1 * torch.randn(8, generator=make_generator())
    experts = router(torch.randn(50, 8, generator=make_generator(1)))[2]
    assert (experts[:, 0] // 2 == experts[:, 1] // 2).all(), "both in the one group that is taken"


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_grouped_is_the_loop_in_value_and_gradient(dtype, bias):
    x = torch.randn(40, 16, generator=make_generator()).to(dtype)
    experts = randomize(Experts(8, 16, 24, F.silu, bias=bias)).to(dtype)
    for one in experts.biases or ():
        one.data *= 0.2
    chosen = torch.rand(40, 8, generator=make_generator(1)).topk(3).indices
    chosen[:, 0] = torch.where(chosen[:, 0] == 5, 4, chosen[:, 0])  # expert 5 may stay empty
    weights = torch.rand(40, 3, generator=make_generator(2))
    results = []
    for work in (run_experts_for_loop, run_experts_grouped_mm):
        inputs = [x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in experts.parameters())]
        biases = ExpertBiases(*inputs[3:]) if bias else None
        y = work(inputs[0], inputs[1], inputs[2], chosen, weights, experts.expert_activation, biases)
        results.append([y, *torch.autograd.grad((y.float() * torch.arange(16)).sum(), inputs)])
    limit = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.6, "rtol": 0.05}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **limit)


def test_all_experts_chosen_equally_is_the_mean_of_dense_layers():
    experts = randomize(Experts(3, 8, 8, F.silu))
    x = torch.randn(5, 8, generator=make_generator())
    y = experts(x, torch.arange(3).expand(5, 3), torch.full((5, 3), 1 / 3))
    dense = []
    for gate_up, down in zip(experts.gate_up, experts.down, strict=True):
        layer = GatedMLP(8, 8, F.silu)
        layer.gate_up.weight.data, layer.down.weight.data = gate_up.data, down.data
        dense.append(layer(x[None], Scope.unpadded(torch.zeros(1, 5)))[0])
    torch.testing.assert_close(y, torch.stack(dense).mean(0), atol=1e-6, rtol=1e-5)


def test_experts_with_biases_are_dense_layers_with_biases_each_times_its_weight():
    experts, x = randomize(Experts(3, 8, 8, F.silu, bias=True)), torch.randn(5, 8, generator=make_generator())
    weights = torch.rand(5, 2, generator=make_generator(1))
    expected = torch.zeros(5, 8)
    for k, expert in enumerate((2, 0)):
        layer = GatedMLP(8, 8, F.silu, bias=True)
        layer.gate_up.weight.data, layer.down.weight.data = experts.gate_up[expert].data, experts.down[expert].data
        layer.gate_up.bias.data, layer.down.bias.data = (part[expert].data for part in experts.biases)
        expected += weights[:, k, None] * layer(x[None])[0]
    torch.testing.assert_close(experts(x, torch.tensor([[2, 0]] * 5), weights), expected, atol=1e-5, rtol=1e-5)


def test_the_clamped_gate_worked_by_hand():
    """alpha 2, limit 3: gate 5 becomes 3 and -5 stays; up -4 becomes -3 and 4 becomes 3."""
    h = torch.tensor([[5.0, -5.0, -4.0, 4.0]])
    expected = [(-3 + 1) * 3 / (1 + math.exp(-6)), (3 + 1) * -5 / (1 + math.exp(10))]
    torch.testing.assert_close(clamped_swiglu(2.0, 3.0)(h), torch.tensor([expected]))


def test_a_routers_bias_chooses_and_weighs():
    router = SoftmaxRouter(2, 3, top_k=2, norm_topk_prob=True)
    router.weight.data, router.bias = torch.zeros(3, 2), torch.nn.Parameter(torch.tensor([0.0, math.log(3.0), -1.0]))
    _, _, experts, weights = router(torch.tensor([[1.0, 5.0]]))
    assert experts.tolist() == [[1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))


def test_a_row_does_not_depend_on_its_neighbors_in_the_batch():
    layer = randomize(MixtureOfExperts(SoftmaxRouter(16, 8, top_k=2, norm_topk_prob=True), Experts(8, 16, 16, F.silu)))
    x = torch.randn(4, 9, 16, generator=make_generator())
    together = layer(x, Scope.unpadded(x[..., 0]))
    torch.testing.assert_close(together[2:3], layer(x[2:3], Scope.unpadded(x[2:3, :, 0])), atol=1e-6, rtol=1e-5)


def route(router, x: torch.Tensor, rows: int, real: torch.Tensor | None = None) -> RouterOutput:
    scores, logits, experts, weights = router(x)
    real = torch.ones(x.shape[0], dtype=torch.bool) if real is None else real
    return RouterOutput(scores, logits, experts, weights, real, router, rows)


def test_balancing_losses_at_their_known_points():
    router = SoftmaxRouter(4, 4, top_k=2, norm_topk_prob=True)
    router.weight.data.zero_()
    even = route(router, torch.randn(8, 4), rows=2)._replace(topk_ids=torch.tensor([[0, 1], [2, 3]] * 4))
    assert load_balancing_aux_loss([even, even]).item() == pytest.approx(2.0), "k, not 1, at uniform routing"
    assert router_z_loss([even]).item() == pytest.approx(math.log(4) ** 2)
    assert sequence_balance_aux_loss([even, even]).item() == pytest.approx(2.0), "1 for each layer"
    assert max_violation([even]).item() == pytest.approx(0.0)
    assert routing_entropy([even]).item() == pytest.approx(math.log(4))


def test_padding_is_no_load():
    layer = randomize(MixtureOfExperts(SoftmaxRouter(8, 4, top_k=2, norm_topk_prob=True), Experts(4, 8, 8, F.silu)))
    records: dict = {}
    layer(torch.randn(1, 4, 8, generator=make_generator()), Scope(torch.tensor([[-1, -1, 0, 1]]), records=records))
    assert records["routing"][0].tokens_per_expert().sum() == 2 * 2


def test_routing_is_worked_out_in_float32_also_for_bfloat16_and_under_autocast():
    """Two experts whose scores differ by less than a bfloat16's step keep their order and their weights."""
    x = torch.randn(64, 16, generator=make_generator()).bfloat16()
    for router in (SoftmaxRouter(16, 6, top_k=2, norm_topk_prob=True), SigmoidRouter(16, 6, top_k=2)):
        randomize(router).to(torch.bfloat16)
        scores, logits, _, weights = router(x)
        assert scores.dtype == logits.dtype == weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(64), atol=1e-6, rtol=0)
    exact = x.float() @ router.weight.float().T
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.float()):
            torch.testing.assert_close(router(given)[1], exact, atol=1e-5, rtol=1e-5)


def test_losses_leave_padding_out_and_count_each_sequence_alone():
    """Two rows of three tokens, the last of each padding: as if the padding were not there, and not its scores."""
    logits = torch.randn(2, 3, 4, generator=make_generator())
    logits[:, 2] = 9 * torch.eye(4)[:2]
    experts = logits.topk(2, dim=-1).indices
    real = torch.tensor([True, True, False])

    def router_output(rows: list[int], tokens: int) -> RouterOutput:
        z, e = logits[rows, :tokens].flatten(0, 1), experts[rows, :tokens].flatten(0, 1)
        return RouterOutput(
            z.sigmoid(), z, e, z.sigmoid().gather(1, e), real[:tokens].repeat(len(rows)), None, len(rows)
        )

    for loss in (load_balancing_aux_loss, router_z_loss, sequence_balance_aux_loss):
        torch.testing.assert_close(loss([router_output([0, 1], 3)]), loss([router_output([0, 1], 2)]))
    each = [sequence_balance_aux_loss([router_output([row], 2)]) for row in (0, 1)]
    torch.testing.assert_close(sequence_balance_aux_loss([router_output([0, 1], 2)]), (each[0] + each[1]) / 2)
    torch.testing.assert_close(
        sequence_balance_aux_loss([router_output([0], 2), router_output([1], 2)]), each[0] + each[1]
    )
    s = logits[0, :2].sigmoid()
    f = torch.bincount(s.topk(2, dim=-1).indices.flatten(), minlength=4) * 4 / (2 * 2)
    torch.testing.assert_close(each[0], (f * (s / s.sum(dim=-1, keepdim=True)).mean(dim=0)).sum())


def test_the_complementary_loss_counts_the_largest_scores_and_not_what_the_bias_chose():
    """Eq. 18: two tokens, both score (.8, .4, .2, .2), K = 1, E = 4: f = (4, 0, 0, 0), P = (.5, .25, .125, .125), so 2.
    The bias chose an expert each, the last two; what was chosen has no part in it."""
    s = torch.tensor([[0.8, 0.4, 0.2, 0.2]] * 2)
    real = torch.ones(2, dtype=torch.bool)
    routing = RouterOutput(s, s.logit(), torch.tensor([[2], [3]]), torch.ones(2, 1), real, None, 1)
    assert sequence_balance_aux_loss([routing]).item() == pytest.approx(2.0)


def test_the_z_loss_gradient_is_twice_logsumexp_times_softmax():
    logits = torch.randn(6, 5, generator=make_generator(), requires_grad=True)
    real = torch.ones(6, dtype=torch.bool)
    routing = RouterOutput(
        logits.softmax(-1), logits, torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1), real, None, 1
    )
    gradient = torch.autograd.grad(router_z_loss([routing]), logits)[0]
    torch.testing.assert_close(gradient, 2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / 6)


def test_a_collapse_in_every_layer_is_seen():
    """Two layers of E = 4, k = 2, each with all tokens on two experts of its own: E in each layer; pooled, it is k, as
    if the routing were even."""

    def route_to(first: int) -> RouterOutput:
        scores = torch.zeros(6, 4)
        scores[:, first : first + 2] = 0.5
        ids = torch.tensor([[first, first + 1]] * 6)
        return RouterOutput(scores, scores.log(), ids, torch.ones(6, 2), torch.ones(6, dtype=torch.bool), None, 1)

    layers = [route_to(0), route_to(2)]
    assert load_balancing_aux_loss(layers).item() == pytest.approx(4.0)
    assert load_balancing_aux_loss_over_layers(layers).item() == pytest.approx(2.0)
    assert load_balancing_aux_loss(layers[:1]).item() == load_balancing_aux_loss_over_layers(layers[:1]).item()


def test_pooled_load_balancing_is_transformers_own_with_padding_left_out():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    router = randomize(SoftmaxRouter(8, 6, top_k=2, norm_topk_prob=True))
    real = torch.rand(2, 10, generator=make_generator()) > 0.3
    routings = [route(router, torch.randn(20, 8, generator=make_generator(s)), 2, real.flatten()) for s in (1, 2)]
    expected = mixtral.load_balancing_loss_func(tuple(r.logits for r in routings), 6, 2, real.long())
    torch.testing.assert_close(load_balancing_aux_loss_over_layers(routings), expected, atol=1e-6, rtol=1e-6)


def test_the_balancing_bias_evens_a_skewed_router_without_touching_its_gradient():
    router = SigmoidRouter(8, 8, top_k=2)
    randomize(router)
    router.weight.data[0] += 0.8
    x = torch.rand(512, 8, generator=make_generator())
    before = max_violation([route(router, x, 1)])
    callback = ExpertBiasBalancer(rate=0.002)
    for step in range(800):
        router.tokens_per_expert = route(router, x, 1).tokens_per_expert()
        callback.on_step_end(router, step)
    after = max_violation([route(router, x, 1)])
    assert before > 1.0
    assert after < 0.15
    assert router.tokens_per_expert is None
    assert router.bias.grad is None


def test_one_balancing_step_is_the_sign_of_mean_minus_load():
    router = SigmoidRouter(2, 4, top_k=1)
    router.tokens_per_expert = torch.tensor([4.0, 0.0, 2.0, 2.0])
    ExpertBiasBalancer(rate=0.001).on_step_end(router, 0)
    torch.testing.assert_close(router.bias.data, torch.tensor([-0.001, 0.001, 0.0, 0.0]))


def test_the_bias_stays_float32_in_a_bfloat16_model():
    router = SigmoidRouter(8, 4, top_k=1)
    router.bias.data = torch.tensor([0.5001, -0.2502, 0.0013, 0.9999])
    before = router.bias.data.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.bias.dtype == torch.float32
    assert torch.equal(router.bias.data, before)


def test_a_latent_mixture_is_experts_in_a_narrow_space_between_two_projections():
    router = randomize(SigmoidRouter(16, 4, top_k=4, norm_topk_prob=True, routed_scaling_factor=2.5))
    experts = randomize(Experts(4, 8, 8, expert_activation=relu_squared))
    layer = randomize(LatentMoE(16, 8, router, experts, shared=GatedMLP(16, 8, F.silu)))
    x = torch.randn(2, 3, 16, generator=make_generator())
    scope = Scope.unpadded(x[..., 0])
    z = layer.to_latent(x.flatten(0, 1))
    _, _, chosen, weights = router(x.flatten(0, 1))
    mixed = torch.zeros(6, 8)
    for n in range(6):
        for e, w in zip(chosen[n], weights[n], strict=True):
            mixed[n] += w * (experts.down[e] @ (experts.gate_up[e] @ z[n]).relu().square())
    expected = layer.down(mixed).view(2, 3, 16) + layer.shared(x, scope)
    torch.testing.assert_close(layer(x, scope), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_experts": 8, "top_k": 9}, "top 9 of 8"),
        ({"num_experts": 10, "top_k": 2, "n_group": 4, "topk_group": 2}, "do not form 4 equal groups"),
        ({"num_experts": 8, "top_k": 5, "n_group": 4, "topk_group": 2}, "fewer than asked"),
    ],
)
def test_contradictory_numbers_are_refused_with_their_rule(numbers, message):
    with pytest.raises(ValueError, match=message):
        SigmoidRouter(4, **numbers)
