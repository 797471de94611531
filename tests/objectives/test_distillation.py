"""The divergence from a teacher: by hand, as TRL's GKD has it, in pieces, and whatever the batch is split into."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_quest.data.batch import IGNORE_INDEX, TokenBatch
from llm_quest.errors import UsageError
from llm_quest.models.build import build, preset
from llm_quest.objectives.cross_entropy import CHUNK_ROWS
from llm_quest.objectives.distillation import ChunkedDivergence, DistillationLoss, generalized_jsd
from llm_quest.objectives.next_token import NextTokenLoss, batch_scope
from llm_quest.objectives.number_token import NumberTokenLoss
from tests.later import Later

gkd = Later("trl.experimental.gkd")

BETAS = (0.0, 0.25, 0.5, 1.0)
VOCAB = 97
KL, REVERSE = 0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, KL),
        (1.0, REVERSE),
        (0.5, 0.25 * (math.log(0.8) + math.log(4 / 3)) + 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3))),
        (0.25, 0.125 * (math.log(8 / 11) + math.log(1.6)) + 0.75 * (0.75 * math.log(12 / 11) + 0.25 * math.log(0.8))),
    ],
)
def test_by_hand(beta: float, expected: float):
    """Of three tokens the teacher gives the first two 1/2 each, the student 3/4 and 1/4. For beta 1/2 the mixture is
    5/8 and 3/8: KL(p || m) = (log 4/5 + log 4/3) / 2; for beta 1/4 it is 11/16 and 5/16."""
    never = -1e4
    teacher = torch.tensor([0.0, 0.0, never], dtype=torch.float64)
    student = torch.tensor([math.log(3), 0.0, never], dtype=torch.float64)
    assert generalized_jsd(student, teacher, beta).item() == pytest.approx(expected, abs=1e-12)


def test_a_temperature_flattens_both():
    teacher, student = torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([math.log(9), 0.0]).double()
    assert generalized_jsd(student, teacher, temperature=2.0).item() == pytest.approx(KL, abs=1e-6)


def logits(generator: torch.Generator, rows: int = 12, vocab: int = 31) -> tuple[Tensor, Tensor]:
    student, teacher = 3 * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("beta", BETAS)
def test_it_is_trls(beta: float, temperature: float, generator: torch.Generator):
    """Its "sum" leaves out the rows that its labels leave out."""
    student, teacher = logits(generator)
    labels = torch.where(torch.arange(12) % 3 == 0, IGNORE_INDEX, 1)
    ours = generalized_jsd(student, teacher, beta, temperature)[labels != IGNORE_INDEX].sum()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], labels[None], beta=beta, temperature=temperature, reduction="sum"
    )
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=0)


def factors(dtype: torch.dtype, rows: int = 2 * CHUNK_ROWS + 40) -> dict[str, Any]:
    """Hidden states and heads of a student and of a wider teacher."""
    generator = torch.Generator().manual_seed(3)
    x, weight, y, own = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, 12), (61, 12), (rows, 20), (61, 20))
    )
    learn = torch.rand(rows, generator=generator) < 0.7
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "y": y, "own": own, "learn": learn}


def divergence_of_all_logits(
    at: dict[str, Any], caps: tuple[float | None, float | None], beta: float, temperature: float
) -> Tensor:
    """The definition, with all logits at once."""
    bent = [
        made if cap is None else cap * torch.tanh(made / cap)
        for made, cap in zip((at["x"] @ at["weight"].T, at["y"] @ at["own"].T), caps, strict=True)
    ]
    return generalized_jsd(*bent, beta, temperature)[at["learn"]].sum()


def pieces(at: dict[str, Any], caps: tuple[float | None, float | None], beta: float, temperature: float) -> Tensor:
    return ChunkedDivergence.apply(
        at["x"], at["weight"], caps[0], at["y"], at["own"], caps[1], at["learn"], beta, temperature
    )  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("caps", [(None, None), (2.0, None), (None, 3.0)])
@pytest.mark.parametrize("beta", BETAS)
def test_in_pieces_it_is_the_definition_in_value_and_gradient(beta: float, caps: tuple[float | None, float | None]):
    at = factors(torch.float64)
    found = []
    for form in (divergence_of_all_logits, pieces):
        total = form(at, caps, beta, 0.8)
        found.append((total.detach(), *torch.autograd.grad(0.37 * total, (at["x"], at["weight"]))))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    assert found[1][1][~at["learn"]].abs().max() == 0


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return made


def test_logits_of_all_rows_are_never_there_at_once():
    at = factors(torch.float32)
    for form, most in ((divergence_of_all_logits, len(at["x"]) * 61), (pieces, CHUNK_ROWS * 61)):
        with Largest() as largest:
            form(at, (None, 3.0), 0.5, 0.8).backward()
        assert largest.numbers == most


def test_under_autocast_both_models_products_are_in_bfloat16_and_sums_in_float32():
    at = factors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total = pieces(at, (None, None), 0.0, 1.0)
        logits = [(at[a] @ at[b].T).float() for a, b in (("x", "weight"), ("y", "own"))]
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, generalized_jsd(*logits)[at["learn"]].sum(), atol=0, rtol=1e-5)
    assert torch.autograd.grad(total, at["weight"])[0].dtype == torch.float32


def test_a_head_that_is_frozen_costs_no_gradient_of_its_own():
    at = factors(torch.float64)
    expected = torch.autograd.grad(divergence_of_all_logits(at, (None, None), 0.5, 1.0), at["x"])[0]
    at["weight"] = at["weight"].detach()
    torch.testing.assert_close(torch.autograd.grad(pieces(at, (None, None), 0.5, 1.0), at["x"])[0], expected)


def model(page: str = "llama3.2-tiny", seed: int = 0, **sizes: Any) -> Any:
    return build(dataclasses.replace(preset(page).config, **sizes), seed=seed).double()


def batch(generator: torch.Generator, rows: int = 4, length: int = 9) -> TokenBatch:
    """Two documents in each row; a part is learned, of one row nothing."""
    tokens = torch.randint(VOCAB, (rows, length), generator=generator)
    targets = torch.randint(VOCAB, (rows, length), generator=generator)
    targets = targets.masked_fill(torch.rand(rows, length, generator=generator) < 0.4, IGNORE_INDEX)
    targets[1] = IGNORE_INDEX
    positions = torch.tensor([*range(4), *range(length - 4)]).expand(rows, -1)
    segments = (torch.arange(length) >= 4).long().expand(rows, -1)
    return TokenBatch(tokens, targets, positions, segments)


def test_a_part_of_the_cross_entropy_is_replaced_and_splits_add_up(generator: torch.Generator):
    student, teacher, some = model(), model("gemma2-tiny", 1, vocab_size=VOCAB).eval(), batch(generator)
    objective = NextTokenLoss(student, auxiliary=[DistillationLoss(teacher, weight=0.3, beta=0.5, temperature=0.7)])
    loss, plain = objective(some), NextTokenLoss(student)(some)
    each = generalized_jsd(
        student(some.input_ids, batch_scope(some)), teacher(some.input_ids, batch_scope(some)), 0.5, 0.7
    )
    apart = each[some.targets != IGNORE_INDEX].sum()
    torch.testing.assert_close(loss.total, 0.7 * plain.total + 0.3 * apart)
    torch.testing.assert_close(loss.metrics["distillation"][0], apart.detach())
    torch.testing.assert_close(loss.metrics["next_token"][0], plain.total.detach())
    assert loss.metrics["distillation"][1] == loss.count == plain.count == (some.targets != IGNORE_INDEX).sum()
    halves = [objective(some.slice_rows(0, 1)), objective(some.slice_rows(1, 4))]
    torch.testing.assert_close(halves[0].total + halves[1].total, loss.total)
    gradient = torch.autograd.grad(loss.total, student.head.weight)[0]
    parts = [torch.autograd.grad(half.total, student.head.weight)[0] for half in halves]
    torch.testing.assert_close(parts[0] + parts[1], gradient)
    for part in (0, 1):
        summed = sum(half.metrics["distillation"][part] for half in halves)
        torch.testing.assert_close(summed, loss.metrics["distillation"][part])


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(beta: float, generator: torch.Generator):
    student = model()
    objective = NextTokenLoss(student, auxiliary=[DistillationLoss(copy.deepcopy(student).eval(), beta=beta)])
    loss = objective(batch(generator))
    assert loss.total.item() == pytest.approx(0.0, abs=1e-12)
    assert loss.metrics["next_token"][0] > 10
    loss.total.backward()
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-12


def test_of_weight_1_the_cross_entropy_is_looked_at_and_not_learned(generator: torch.Generator):
    student, some = model(), batch(generator)
    term = DistillationLoss(model("gpt2-tiny", 1, vocab_size=VOCAB).eval())
    loss = NextTokenLoss(student, auxiliary=[term])(some)
    added, _ = term(student.hidden_states(some.input_ids, batch_scope(some)), some, student.head)
    torch.testing.assert_close(loss.total, added)
    found = [torch.autograd.grad(total, student.head.weight)[0] for total in (loss.total, added)]
    torch.testing.assert_close(*found)


def test_it_stands_beside_the_number_loss_and_multi_token_modules(generator: torch.Generator):
    student, some = model("deepseek-v3-tiny", num_nextn_predict_layers=1), batch(generator)
    values = torch.full((student.config.vocab_size,), float("nan"))
    values[3:13] = torch.arange(10.0)
    teacher = model(seed=1, vocab_size=student.config.vocab_size).eval()
    terms = [NumberTokenLoss(values, weight=0.5), DistillationLoss(teacher, weight=0.4)]
    both = NextTokenLoss(student, router_coefs={"sequence_balancing": 0.01}, mtp_weight=0.2, auxiliary=terms)(some)
    told = {name: total for name, (total, _) in both.metrics.items()}
    expected = 0.6 * told["next_token"] + 0.4 * told["distillation"] + 0.5 * told["number_token"]
    expected = expected + 0.2 * told["lookahead_1"] + 0.01 * told["sequence_balancing"]
    torch.testing.assert_close(both.total.detach(), expected.to(both.total))


def test_the_teacher_is_nowhere_among_what_is_trained_saved_or_set_to_training(generator: torch.Generator):
    student, teacher = model(), model("gpt2-tiny", 1, vocab_size=VOCAB).eval()
    before = copy.deepcopy(teacher.state_dict())
    objective = NextTokenLoss(student, auxiliary=[DistillationLoss(teacher, weight=0.5)]).train()
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.parameters()}
    assert set(objective.state_dict()) == {f"model.{name}" for name in student.state_dict()}
    assert not any(module.training for module in teacher.modules())
    assert not objective.auxiliary[0].teacher.hidden_states(batch(generator)).requires_grad
    objective(batch(generator)).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_padding_of_either_vocabulary_is_in_neither_distribution(generator: torch.Generator):
    """The same models with rows that no token has: ten more of the student, three more of the teacher."""
    some = batch(generator)
    narrow = model(seed=0, vocab_size=VOCAB), model("gpt2-tiny", 1, vocab_size=VOCAB).eval()
    wide = model(seed=0, vocab_size=VOCAB + 10), model("gpt2-tiny", 1, vocab_size=VOCAB + 3).eval()
    for padded, plain in zip(wide, narrow, strict=True):
        state = padded.state_dict()
        for name, tensor in plain.state_dict().items():
            state[name][: len(tensor)] = tensor
        padded.load_state_dict(state)
    found = []
    for student, teacher in (narrow, wide):
        objective = NextTokenLoss(student, auxiliary=[DistillationLoss(teacher, weight=0.9, vocab_size=VOCAB)])
        total, _ = objective(some).metrics["distillation"]
        found.append(total)
    torch.testing.assert_close(*found)


def test_mistakes_are_named(generator: torch.Generator):
    teacher, some = model("gpt2-tiny", vocab_size=VOCAB).eval(), batch(generator)
    for wrong, said in (
        ({"weight": 0.0}, "has no effect"),
        ({"weight": 1.5}, "at most 1"),
        ({"beta": 1.2}, "beta is 1.2"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"vocab_size": 98}, "the teacher knows 97 tokens, the tokenizer has 98"),
    ):
        with pytest.raises(UsageError, match=said):
            DistillationLoss(teacher, **wrong)
    with pytest.raises(UsageError, match=r"call teacher.eval\(\) first"):
        DistillationLoss(model("gpt2-tiny").train())
    with pytest.raises(UsageError, match=r"take its place 1\.5 times"):
        NextTokenLoss(
            model(), auxiliary=[DistillationLoss(teacher, weight=0.75), DistillationLoss(teacher, weight=0.75)]
        )
    few = TokenBatch(some.input_ids % 50, some.targets.clamp(max=49))
    with pytest.raises(UsageError, match="speaks of 97 tokens, the model knows 50"):
        NextTokenLoss(model(vocab_size=50), auxiliary=[DistillationLoss(teacher)])(few)
    with pytest.raises(UsageError, match="padded with 3 ids of which the teacher says nothing"):
        NextTokenLoss(model(vocab_size=100), auxiliary=[DistillationLoss(teacher)])(some)
