"""Whole texts: the laws of a batch, the ways to end, bad input, and transformers' own generate."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

import llm_quest as quest
from llm_quest.errors import UsageError
from llm_quest.generation.generate import generate, generate_completions, stream_tokens
from llm_quest.generation.sampling import SamplingParams
from llm_quest.generation.stopping import Completion, StoppingCriteria
from llm_quest.models import FAMILIES
from llm_quest.models.build import build
from llm_quest.models.decoder import Decoder

TINY = [preset.name for page in FAMILIES for preset in page.presets if preset.name.endswith("-tiny")]
RAGGED = [[5, 9, 2, 7, 7, 1], [3], [8, 8, 4], [5, 9, 2, 7, 7, 1]]
STORIES = Path(__file__).parents[3] / "shared" / "data" / "stories260K"


@functools.cache
def family_model(name: str) -> Decoder:
    """With weights large enough that tokens matter; in float64, so that a DeltaNet's chunks and single steps agree to
    the last digit that is compared. No test changes it."""
    return enlarge_weights(build(name, seed=1, dtype="float64")).requires_grad_(False)


@pytest.fixture(params=TINY)
def model(request) -> Decoder:
    """Every family."""
    return family_model(request.param)


@functools.cache
def greedy_rows(model: Decoder) -> list[Completion]:
    return generate(model, RAGGED, max_new_tokens=20, temperature=0.0)


@pytest.fixture
def gpt2() -> Decoder:
    return enlarge_weights(build("gpt2-tiny", seed=1))


def enlarge_weights(model: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 * 1.5, generator=generator)
    return model


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def greedy_choices(model: Decoder, prompt: list[int], tokens: list[int]) -> tuple[list[int], list[float]]:
    """The most probable token after the prompt and after each token but the last, and its log-probability, without a
    cache: tokens are the greedy text exactly if they are these (by induction; no later token changes a choice)."""
    logprobs = model(torch.tensor([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :].log_softmax(-1)
    best = logprobs.max(-1)
    return best.indices.tolist(), best.values.tolist()


def test_a_greedy_text_is_what_the_model_says_without_a_cache(model):
    for completion, prompt in zip(greedy_rows(model), RAGGED, strict=True):
        tokens, logprobs = greedy_choices(model, prompt, completion.tokens)
        assert completion.tokens == tokens
        assert len(tokens) == 20
        assert completion.logprobs == pytest.approx(logprobs, abs=2e-5)
        assert completion.finish_reason == "length"


CHOICES = [{"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.2}, {"top_k": 9}]


def test_a_row_writes_the_same_text_alone_and_among_neighbors(model, request):
    """One family greedily, the next in the next manner."""
    choice = CHOICES[TINY.index(request.node.callspec.params["model"]) % 3]
    together = generate(model, RAGGED, max_new_tokens=12, seed=3, **choice)
    for prompt, row in zip(RAGGED[:3], together, strict=False):
        alone = generate(model, [prompt], max_new_tokens=12, seed=3, **choice)
        assert alone[0].tokens == row.tokens
        assert alone[0].logprobs == pytest.approx(row.logprobs, abs=2e-5)


def test_equal_prompts_write_different_texts_and_one_prefill_for_a_group_changes_none(model):
    group = generate(model, [[3, 1], [8]], n=3, max_new_tokens=8, seed=5, repetition_penalty=1.5)
    apart = generate(model, [[3, 1]] * 3 + [[8]] * 3, max_new_tokens=8, seed=5, repetition_penalty=1.5)
    assert tokens_of(group) == tokens_of(apart)
    assert len({tuple(tokens) for tokens in tokens_of(group)}) >= 4, "two copies may agree by chance"


def test_the_seed_alone_decides(gpt2):
    first, again, other = (tokens_of(generate(gpt2, RAGGED, max_new_tokens=12, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_nothing_else_random_is_touched(gpt2):
    before = torch.random.get_rng_state()
    generate(gpt2, RAGGED, max_new_tokens=5, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_temperature_reaches_the_batch(gpt2):
    """B15: samples of one prompt that are all alike have lost their temperature on the way."""
    assert len({tuple(tokens) for tokens in tokens_of(generate(gpt2, [[4]] * 6, max_new_tokens=8))}) == 6


def test_log_probabilities_are_of_the_distribution_that_was_sampled(gpt2):
    """B58: taken again from the full logits, under the same sampling, they are the same; under the plain softmax they
    are not."""
    sampling = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.3)
    (row,) = generate_completions(gpt2, [[4, 2]], sampling, StoppingCriteria(max_new_tokens=10), seed=2)
    text = [4, 2, *row.tokens]
    with torch.no_grad():
        logits = gpt2(torch.tensor([text[:-1]]))[0, 1:]
    seen = torch.zeros(10, 97, dtype=torch.bool)
    for step in range(10):
        seen[step, text[: 2 + step]] = True
    drawn = torch.tensor(row.tokens)[:, None]
    again = sampling.log_probs(logits, seen).gather(1, drawn)[:, 0]
    assert row.logprobs == pytest.approx(again.tolist(), abs=2e-5)
    plain = logits.log_softmax(-1).gather(1, drawn)[:, 0]
    assert (plain - torch.tensor(row.logprobs)).abs().max() > 0.1


def test_a_row_ends_at_any_of_its_eos_tokens_and_its_neighbors_go_on(model):
    """B47: one row's eos is nobody else's."""
    free = tokens_of(greedy_rows(model)[:3])
    eos = [free[0][4], free[1][9]]
    ended = generate(model, RAGGED[:3], max_new_tokens=20, temperature=0.0, eos_token_id=eos)
    for whole, row in zip(free, ended, strict=True):
        at = next((i for i, token in enumerate(whole) if token in eos), None)
        assert row.tokens == (whole if at is None else whole[: at + 1])
        assert row.finish_reason == ("length" if at is None else "eos")
        assert len(row.logprobs) == len(row.tokens)
    assert len({len(row.tokens) for row in ended}) > 1


def test_finished_rows_leave_the_batch(gpt2):
    widths = []
    gpt2.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[0]))
    free = tokens_of(generate(gpt2, RAGGED[:3], max_new_tokens=12, temperature=0.0))
    widths.clear()
    rows = generate(gpt2, RAGGED[:3], max_new_tokens=12, temperature=0.0, eos_token_id=free[0][2])
    assert widths == [sum(len(row.tokens) > step for row in rows) for step in range(1, max(map(len, tokens_of(rows))))]
    assert widths[-1] < 3


def test_the_models_own_eos_is_the_default(gpt2):
    from llm_quest.models.decoder import GenerationConfig

    free = tokens_of(generate(gpt2, [[4]], max_new_tokens=9, temperature=0.0))[0]
    gpt2.generation_config = GenerationConfig(eos_token_ids=(free[3],))
    assert generate(gpt2, [[4]], max_new_tokens=9, temperature=0.0)[0].finish_reason == "eos"
    assert generate(gpt2, [[4]], max_new_tokens=9, temperature=0.0, eos_token_id=())[0].tokens == free


def test_a_stop_sequence_ends_a_row_only_where_it_is_complete_and_of_the_text(gpt2):
    free = tokens_of(generate(gpt2, [[4, 6]], max_new_tokens=16, temperature=1.0))[0]
    stop = free[5:8]
    (row,) = generate(gpt2, [[4, 6]], max_new_tokens=16, stop=[stop, [6], [6, free[0]]])
    assert row.tokens == free[:8]
    assert row.finish_reason == "stop"


class Hex:
    """A tokenizer that writes token 26 as '1a'."""

    def decode_stream(self, prompt_ids=()) -> Hex:
        return self

    def feed(self, token: int) -> str:
        return f"{token:02x}"

    def flush(self) -> str:
        return ""


def test_a_stop_string_across_tokens_cuts_the_text_and_keeps_the_tokens(gpt2):
    free = generate(gpt2, [[4, 6]], max_new_tokens=16, tokenizer=Hex())[0]
    stop = free.text[7:10]  # begins and ends in the middle of a token
    (row,) = generate(gpt2, [[4, 6]], max_new_tokens=16, tokenizer=Hex(), stop=stop)
    assert row.finish_reason == "stop"
    assert row.text == free.text[: free.text.find(stop)]
    assert row.tokens == free.tokens[: -(-(free.text.find(stop) + 3) // 2)]


def test_a_stream_says_the_same_as_it_goes(gpt2):
    until = StoppingCriteria(max_new_tokens=9, tokenizer=Hex(), stop=("5",))
    whole = generate_completions(gpt2, RAGGED, SamplingParams(), until, seed=4)
    said = list(stream_tokens(gpt2, RAGGED, SamplingParams(), until, seed=4))
    for number, row in enumerate(whole):
        mine = [made for made in said if made.row == number]
        assert [made.token for made in mine] == row.tokens
        assert "".join(made.text for made in mine) == row.text
        assert [made.finish_reason for made in mine] == [None] * (len(mine) - 1) + [row.finish_reason]
    assert [made.row for made in said[:4]] == [0, 1, 2, 3]


def test_a_stream_leaves_gradients_on_for_whoever_reads_it(gpt2):
    for _ in stream_tokens(gpt2, [[4]], SamplingParams(), StoppingCriteria(max_new_tokens=3)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_the_length_stops_a_row_at_the_models_context(model):
    """B48: no index error; prompt and text together fill the context exactly."""
    context = model.config.max_position_embeddings
    rows = generate(model, [[1] * (context - 3), [1] * (context - 9)], max_new_tokens=context, temperature=0.0)
    assert [len(row.tokens) for row in rows] == [3, 9]
    assert [row.finish_reason for row in rows] == ["length", "length"]


def sliding(model: Decoder, prompt: list[int], steps: int) -> list[int]:
    """The definition: when the context is full, go on from its last half."""
    context, text = model.config.max_position_embeddings, list(prompt)
    start = 0
    for _ in range(steps):
        if len(text) - start > context:
            start = len(text) - context // 2
        with torch.no_grad():
            text.append(int(model(torch.tensor([text[start:]]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_the_window_slides_past_the_context(gpt2):
    prompts = [list(range(60)), [7, 3], list(range(90))]
    rows = generate(gpt2, prompts, max_new_tokens=110, temperature=0.0, on_full_context="slide")
    assert tokens_of(rows) == [sliding(gpt2, prompt, 110) for prompt in prompts]


def test_prompts_may_be_a_tensor(gpt2):
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert generate(gpt2, rows, max_new_tokens=4) == generate(gpt2, rows.tolist(), max_new_tokens=4)


def test_no_prompts_no_completions(gpt2):
    assert generate(gpt2, [], max_new_tokens=4) == []


def test_the_front_door_answers_whether_or_not_the_room_was_entered_before(gpt2):
    assert len(quest.generate(gpt2, [[1, 2, 3], [4]], max_new_tokens=2, temperature=0.0)) == 2


@pytest.mark.parametrize(
    ("prompts", "choice", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [97]], {}, "prompt 1 holds token 97, but the model knows 0 to 96"),
        ([[-1]], {}, "prompt 0 holds token -1"),
        ([1, 2], {}, "lists of token ids"),
        (["hello"], {}, "encode text first"),
        ([[1.5]], {}, "lists of token ids"),
        ([[1] * 64], {}, "64 tokens, and no token can follow in the model's context of 64"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"n": 0}, "n is 0"),
        ([[1]], {"on_full_context": "wrap"}, "on_full_context is 'wrap'"),
        ([[1]], {"stop": "END"}, "'END' needs the tokenizer"),
        ([[1]], {"stop": [[]]}, "empty stop"),
    ],
)
def test_bad_input_is_named_with_its_remedy(gpt2, prompts, choice, words):
    with pytest.raises(UsageError, match=words):
        generate(gpt2, prompts, **({"max_new_tokens": 4} | choice))


def test_a_model_in_training_mode_is_refused(gpt2):
    with pytest.raises(UsageError, match="in training mode"):
        stream_tokens(gpt2.train(), [[1]], SamplingParams(), StoppingCriteria(max_new_tokens=1))


def test_a_model_with_broken_weights_does_not_write(gpt2):
    with torch.no_grad():
        gpt2.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        generate(gpt2, [[1]], max_new_tokens=4)


def test_any_number_format_generates(gpt2):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rows = generate(gpt2.to(dtype), RAGGED, max_new_tokens=4, top_p=0.9)
        assert [len(row.logprobs) for row in rows] == [4] * 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_greedy_texts_equal_transformers_token_for_token(family):
    from tests import oracles

    theirs = {"gpt2": oracles.tiny_gpt2, "llama": oracles.tiny_llama}[family](seed=3)
    ours = load_their_weights(theirs, family)
    prompts = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(prompts, max_new_tokens=50, do_sample=False, attention_mask=torch.ones_like(prompts))
    rows = generate(ours, prompts, max_new_tokens=50, temperature=0.0)
    assert tokens_of(rows) == expected[:, 7:].tolist()


def load_their_weights(theirs, family: str) -> Decoder:
    """Their weights in our model, by the page's own table."""
    from llm_quest.models.weight_names import ConcatRows, Transposed

    (page,) = (page for page in FAMILIES if page.name == family)
    config = page.read(theirs.config.to_dict())
    ours, published = build(config), theirs.state_dict()
    with torch.no_grad():
        for name, source in page.weight_map(config).items():
            match source:
                case ConcatRows(names=names):
                    value = torch.cat([published[part] for part in names])
                case Transposed(name=stored):
                    value = published[stored].T
                case _:
                    value = published[source]
            ours.get_parameter(name).copy_(value)
    return ours


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/stories260K does not lie beside the project")
def test_a_trained_model_tells_the_story_transformers_tells():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(STORIES).float().eval()
    ours = quest.load(str(STORIES))
    told = theirs.generate(
        torch.tensor([[1]]),
        attention_mask=torch.ones(1, 1),
        max_new_tokens=256,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    (row,) = generate(ours, [[1]], max_new_tokens=256, temperature=0.0, eos_token_id=())
    assert row.tokens == told.sequences[0, 1:].tolist()
    logprobs = [float(logits.log_softmax(-1).max()) for logits in told.logits]
    assert row.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert dataclasses.asdict(row)["finish_reason"] == "length"
