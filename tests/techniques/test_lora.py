"""LoRA and its kin by hand and by matrix algebra; merging, switching off, refusing. (PEFT:
tests/hub/test_load_adapter.py; every page: tests/laws/test_techniques.py.)"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import llm_quest as quest
from llm_quest.errors import UsageError
from llm_quest.layers.experts import run_experts_for_loop, run_experts_grouped_mm
from llm_quest.layers.linear import PackedLinear
from llm_quest.layers.low_rank import (
    AdaptedExperts,
    AdaptedLinear,
    AdaptedPackedLinear,
    DoRAUpdate,
    LowRankUpdate,
    adapter_layers,
)
from llm_quest.scope import Scope
from llm_quest.techniques.adapter_merge import disable_adapter, merge_adapter, unmerge_adapter
from llm_quest.techniques.lora import DoRA, LoRA, LoRAXS, RsLoRA, TinyLoRA, adapter_addresses
from llm_quest.train.optimizers import make_adamw, make_muon
from tests.laws.subjects import own, random_tokens, shared

EXACT = {"rtol": 0.0, "atol": 1e-10}
KINDS = {
    "lora": LoRA(rank=3),
    "rslora": RsLoRA(rank=3),
    "dora": DoRA(rank=3),
    "lora_xs": LoRAXS(rank=3),
    "tiny_lora": TinyLoRA(u=4, tying=1.0),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def train_adapter(kind: str, page: str = "llama3.2-tiny", dtype: torch.dtype = torch.float64) -> Any:
    """An adapted model whose adapter has moved."""
    model = KINDS[kind](own(page, dtype))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model


def test_lora_by_hand():
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    layer.bias = nn.Parameter(torch.tensor([10.0, 20.0]))
    edit = LowRankUpdate(
        nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Parameter(torch.tensor([[3.0], [0.0]])), scale=0.5
    )
    adapted = AdaptedLinear(layer, edit)
    # A x = 1*1 + 2*1 = 3; B of it = (9, 0); half of it = (4.5, 0); W x + b = (11, 21)
    assert adapted(torch.tensor([1.0, 1.0])).tolist() == [15.5, 21.0]
    assert adapted.weight.tolist() == [[2.5, 3.0], [0.0, 1.0]]


def test_dora_by_hand():
    low = LowRankUpdate(nn.Parameter(torch.tensor([[0.0, 1.0]])), nn.Parameter(torch.tensor([[4.0], [0.0]])), scale=1.0)
    layer = nn.Linear(2, 2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    adapted = AdaptedLinear(layer, DoRAUpdate(low, nn.Parameter(torch.tensor([10.0, 2.0]))))
    # row 0 of W + BA is (3, 4) of length 5, stretched to 10; row 1 is (0, 2) of length 2 and stays
    assert adapted.weight.tolist() == [[6.0, 8.0], [0.0, 2.0]]
    assert adapted(torch.tensor([1.0, 1.0])).tolist() == [14.0, 2.0]


def test_the_scale_is_alpha_over_r_or_over_its_root():
    for kind, scale in ((LoRA(rank=4, alpha=6.0), 1.5), (RsLoRA(rank=4, alpha=6.0), 3.0)):
        edit = next(iter(adapter_layers(kind(own("gpt2-tiny"))).values())).edits["q"]
        assert edit.scale == scale


def test_lora_xs_is_the_truncated_svd_with_a_matrix_between():
    technique = LoRAXS(rank=3, scale=0.7, std=0.5, targets=("down",))
    model = technique(own("llama3.2-tiny"))
    for adapted in adapter_layers(model).values():
        U, S, Vh = torch.linalg.svd(adapted.base.weight)
        R = adapted.edit.core.R
        expected = adapted.base.weight + 0.7 * U[:, :3] @ torch.diag(S[:3]) @ R @ Vh[:3]
        torch.testing.assert_close(adapted.weight, expected, **EXACT)
        assert 0.1 < R.std() < 1.0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9 * len(adapter_layers(model))


def test_tiny_lora_with_a_basis_for_p_is_lora_xs():
    """u = r^2 and P the unit matrices: v is R, written row by row."""
    model = TinyLoRA(rank=2, u=4, targets=("out",))(own("llama3.2-tiny"))
    adapted: Any = next(iter(adapter_layers(model).values()))
    with torch.no_grad():
        adapted.edit.core.P.copy_(torch.eye(4, dtype=torch.float64).view(4, 2, 2))
        adapted.edit.core.v.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    U, S, Vh = torch.linalg.svd(adapted.base.weight)
    root = S[:2].sqrt().diag()
    R = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(adapted.weight, adapted.base.weight + U[:, :2] @ root @ R @ root @ Vh[:2], **EXACT)


@pytest.mark.parametrize(("tying", "groups"), [(0.0, 4), (0.5, 2), (1.0, 1)])
def test_tiny_lora_shares_its_numbers_as_far_as_it_is_tied(tying: float, groups: int):
    model = TinyLoRA(u=5, tying=tying, targets=("out", "down"))(own("llama3.2-tiny"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5 * groups


@every_kind
@pytest.mark.parametrize("page", ["llama3.2-tiny", "gpt2-tiny", "deepseek-v3-tiny"])
def test_merging_gives_the_same_logits_and_unmerging_the_same_bits(kind: str, page: str):
    model = train_adapter(kind, page)
    tokens = random_tokens(model, 2, 9)
    before, state = model(tokens), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learned, card = [name for name, p in model.named_parameters() if p.requires_grad], model.spec
    record = merge_adapter(model)
    assert not adapter_layers(model)
    assert model.spec.techniques == ()
    assert all(p.requires_grad or name.endswith("router.bias") for name, p in model.named_parameters())
    torch.testing.assert_close(model(tokens), before, **EXACT)
    unmerge_adapter(model, record)
    assert model.spec == card
    assert [name for name, p in model.named_parameters() if p.requires_grad] == learned
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert torch.equal(model(tokens), before)


@every_kind
def test_without_its_adapters_it_is_the_model_before_to_the_bit(kind: str):
    model = train_adapter(kind)
    tokens = random_tokens(model, 2, 9)
    with disable_adapter(model):
        assert torch.equal(model(tokens), shared("llama3.2-tiny")(tokens))
        with disable_adapter(model):
            pass
        assert torch.equal(model(tokens), shared("llama3.2-tiny")(tokens)), "the inner one gives back what it found"
    assert (model(tokens) - shared("llama3.2-tiny")(tokens)).abs().max() > 1e-3
    with pytest.raises(RuntimeError), disable_adapter(model):
        raise RuntimeError
    assert all(wrapper.enabled for wrapper in adapter_layers(model).values())


def test_off_everywhere_also_where_a_matrix_is_read_and_not_called():
    """MLA's absorbed form multiplies by the matrix itself: few queries and a long memory."""
    model, plain = train_adapter("lora", "deepseek-v3-tiny"), shared("deepseek-v3-tiny")
    tokens = random_tokens(model, 1, 40)

    def last(one: Any) -> torch.Tensor:
        cache = one.new_cache(1, 40)
        one(tokens[:, :39], Scope.unpadded(tokens[:, :39], cache=cache))
        return one(tokens[:, 39:], Scope.unpadded(tokens[:, 39:], cache=cache, start=39))

    with disable_adapter(model):
        torch.testing.assert_close(last(model), last(plain), **EXACT)
    torch.testing.assert_close(last(model), model(tokens)[:, 39:], **EXACT)


def test_each_expert_has_an_adapter_of_its_own_in_both_forms_of_the_work():
    model = LoRA(rank=2, targets=("experts.gate", "experts.down"))(own("mixtral-tiny"))
    experts: Any = next(module for module in model.modules() if isinstance(module, AdaptedExperts))
    with torch.no_grad():
        for edit in experts.edits.values():
            edit.B.normal_(generator=torch.Generator().manual_seed(1))
    gate, down = experts.edits["gate"], experts.edits["down"]
    hidden = experts.base.down.shape[2]
    for e in range(experts.base.down.shape[0]):
        expected = experts.base.gate_up[e, :hidden] + gate.scale * gate.B[e] @ gate.A[e]
        torch.testing.assert_close(experts.gate_up[e, :hidden], expected, **EXACT)
        torch.testing.assert_close(experts.down[e], experts.base.down[e] + down.scale * down.B[e] @ down.A[e], **EXACT)
    assert torch.equal(experts.gate_up[:, hidden:], experts.base.gate_up[:, hidden:])
    experts = experts.float()
    x = torch.randn(6, experts.gate_up.shape[2], generator=torch.Generator().manual_seed(2))
    chosen, weights = torch.tensor([[0, 1], [2, 3], [0, 3], [1, 1], [2, 0], [3, 1]]), torch.full((6, 2), 0.5)
    experts.base.run_experts = run_experts_for_loop
    defined = experts(x, chosen, weights)
    experts.base.run_experts = run_experts_grouped_mm
    torch.testing.assert_close(experts(x, chosen, weights), defined, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_the_input_and_of_the_adapter_alone():
    layer = PackedLinear(40, q=3, v=3)
    low = LowRankUpdate(nn.Parameter(torch.ones(1, 40)), nn.Parameter(torch.ones(3, 1)), scale=1.0, dropout=0.5)
    adapted = AdaptedPackedLinear(layer, {"q": low})
    x = torch.ones(7, 40)
    torch.manual_seed(0)
    q, v = adapted(x)
    assert torch.equal(v, layer(x)[1])
    sums = q - layer(x)[0]
    assert sums.std(dim=0).min() > 1, "each row lost other inputs"
    torch.testing.assert_close(sums, sums[:, :1].expand(-1, 3))
    adapted.eval()
    torch.testing.assert_close(adapted(x)[0], layer(x)[0] + 40.0)


def test_the_optimizer_remembers_the_adapter_alone():
    model = LoRA(rank=2)(own("llama3.2-tiny", torch.float32))
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for optimizer in (make_adamw(model, lr=1e-3), make_muon(model, lr=1e-3, row_splits=model.row_splits())):
        model(random_tokens(model, 2, 9)).square().mean().backward()
        optimizer.step()
        held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim()]
        assert sum(t.numel() for t in held) <= 2 * learned


@pytest.mark.parametrize(
    ("technique", "page", "said"),
    [
        (
            LoRA(targets=("query",)),
            "llama3.2-tiny",
            r"no matrix .* called 'query'; there are q, k, v, out, gate, up, down",
        ),
        (LoRA(targets=("q", "w")), "llama3.2-tiny", "called 'w'"),
        (LoRA(targets=("head",)), "llama3.2-tiny", "'head' is not adapted"),
        (LoRA(targets=()), "llama3.2-tiny", "rank of 1 or more and targets"),
        (LoRA(rank=0), "llama3.2-tiny", "rank of 1 or more"),
        (LoRA(dropout=1.0), "llama3.2-tiny", "dropout is 1.0"),
        (LoRA(dropout=0.1), "mixtral-tiny", "leave the experts out"),
        (LoRAXS(rank=1000), "llama3.2-tiny", r"rank 1000 is above that of blocks\.0.*lower the rank"),
        (TinyLoRA(rank=1000), "gpt2-tiny", "rank 1000 is above"),
        (TinyLoRA(u=0), "gpt2-tiny", "u must be at least 1"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_as_it_was(technique: Any, page: str, said: str):
    model = own(page)
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(UsageError, match=said):
        technique(model)
    assert before == [(name, p.requires_grad) for name, p in model.named_parameters()]
    assert model.spec.techniques == ()


def test_merging_twice_unmerging_twice_and_adapting_twice_are_refused():
    model = train_adapter("lora")
    with pytest.raises(UsageError, match="has an adapter already"):
        DoRA()(model)
    record = merge_adapter(model)
    with pytest.raises(UsageError, match="no adapter: none was applied, or it was merged already"):
        merge_adapter(model)
    with pytest.raises(UsageError, match="no adapter"), disable_adapter(model):
        pass
    with pytest.raises(UsageError, match="another merge"):
        unmerge_adapter(own("llama3.2-tiny"), record)
    unmerge_adapter(model, record)
    with pytest.raises(UsageError, match="another merge"):
        unmerge_adapter(model, record)


def test_a_merged_model_can_be_adapted_again_and_saved_for_others(tmp_path):
    model = train_adapter("lora", dtype=torch.float32)
    merge_adapter(model)
    quest.save(model, tmp_path / "merged")
    assert not (tmp_path / "merged" / "techniques.safetensors").exists()
    again = LoRA(rank=2)(quest.load(tmp_path / "merged"))
    torch.testing.assert_close(again(random_tokens(again, 1, 5)), model(random_tokens(model, 1, 5)))


def test_seeds_decide_first_values():
    models = [LoRA(rank=2, seed=seed)(own("llama3.2-tiny")) for seed in (0, 0, 1)]
    first = [next(iter(adapter_layers(model).values())).edits["q"].A for model in models]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    width = first[0].shape[1]
    assert 0.9 / math.sqrt(width) < first[0].abs().max() <= 1 / math.sqrt(width)
    assert not torch.equal(*[next(iter(adapter_layers(models[0]).values())).edits[part].A for part in "qk"])


def test_a_copy_lives_its_own_life():
    model = train_adapter("dora")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    tokens = random_tokens(model, 1, 5)
    assert torch.equal(model(tokens), train_adapter("dora")(tokens))
    assert not torch.equal(twin(tokens), model(tokens))


def test_it_matches_the_short_names_of_every_layer():
    assert adapter_addresses(LoRA(targets=("q", "down"))(own("llama3.2-tiny"))) == [
        f"blocks.{layer}.{place}" for layer in (0, 1) for place in ("mixer.layer.qkv.q", "feed_forward.layer.down")
    ]
