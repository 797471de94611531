"""The wrapper's three answers against plain sums over the model's logits, and a whole task through lm_eval itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from llm_quest.data.chat import CHATML_TEMPLATE, ChatTemplate
from llm_quest.data.vocabulary import character_tokenizer, train_bpe
from llm_quest.errors import UsageError
from llm_quest.generation.sampling import SamplingParams
from llm_quest.hub.load_save import load, save
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.layers.rotary import RotaryEmbedding
from llm_quest.models.build import build
from llm_quest.models.llama import Config
from tests.later import Later
from tests.laws.subjects import randomize_

if TYPE_CHECKING:
    from llm_quest.eval.lm_eval_harness import LmEvalModel

harnesses, lm_eval = Later("llm_quest.eval.lm_eval_harness"), Later("lm_eval.api.instance")
tasks = Later("lm_eval.tasks")
evaluator, huggingface = Later("lm_eval.evaluator"), Later("lm_eval.models.huggingface")

TOKENIZER = character_tokenizer("abcdefghij \n")
CONFIG = Config(TOKENIZER.vocab_size, 32, 2, 4, 2, 8, 64, 24, RotaryEmbedding(8, 1e4), False)


@pytest.fixture(scope="module")
def harness() -> LmEvalModel:
    return harnesses.LmEvalModel(randomize_(build(CONFIG)).eval(), TOKENIZER, batch_size=3)


def make_instance(kind: str, *arguments: object) -> Any:
    return lm_eval.Instance(kind, {}, arguments, 0)


@torch.no_grad()
def sum_log_probs(harness: LmEvalModel, ids: list[int], new: int) -> float:
    log_probs = harness.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return float(sum(log_probs[t - 1, ids[t]] for t in range(len(ids) - new, len(ids))))


def test_a_continuations_likelihood_is_the_sum_over_its_tokens_in_any_batch(harness: LmEvalModel) -> None:
    pairs = [("abc", "de"), ("", "abc"), ("a b ", "c"), ("abcdefghij", "j"), ("ab", "cdefghij")]
    found = harness.loglikelihood([make_instance("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (total, _) in zip(pairs, found, strict=True):
        ids = harness.encode_prompt(context + continuation)
        new = len(ids) - len(harness.encode_prompt(context.rstrip()))
        assert total == pytest.approx(sum_log_probs(harness, ids, new), abs=1e-4)


def context_and_continuation(harness: LmEvalModel) -> tuple[str, str]:
    """A context after which this random model writes several letters."""
    contexts = ["abc", "a", "jih", "ee", "bad", "cab", "fig"]
    texts = harness.generate_until(
        [make_instance("generate_until", c, {"until": [], "max_gen_toks": 12}) for c in contexts]
    )
    return next((c, text) for c, text in zip(contexts, texts, strict=True) if len(text) > 2 and text[-1].isalpha())


def test_greedy_is_recognized(harness: LmEvalModel) -> None:
    context, text = context_and_continuation(harness)
    other = text[:-1] + ("b" if text[-1] == "a" else "a")
    likely = harness.loglikelihood([make_instance("loglikelihood", context, one) for one in (text, other)])
    assert [greedy for _, greedy in likely] == [True, False]


def test_a_long_text_is_predicted_token_by_token_with_the_most_context_there_is_room_for(harness: LmEvalModel) -> None:
    text = "abcdefghij abcdefghij jihgfedcba bbaacc dd e"
    ids = harness.encode_prompt(text)
    windows = harness.rolling_windows(ids[1:])
    assert sum(new for _, new in windows) == len(ids) - 1
    assert [len(row) for row, _ in windows] == [25] * len(windows)
    expected, done = 0.0, 1
    for row, new in windows:
        assert ids[done : done + new] == row[-new:]
        expected += sum_log_probs(harness, row, new)
        done += new
    assert harness.loglikelihood_rolling([make_instance("loglikelihood_rolling", text)])[0] == pytest.approx(
        expected, abs=1e-3
    )
    assert harness.rolling_windows([3]) == [([TOKENIZER.start_token_id, 3], 1)]


def test_a_stop_ends_the_text_and_is_not_part_of_it(harness: LmEvalModel) -> None:
    context, free = context_and_continuation(harness)
    (cut,) = harness.generate_until(
        [make_instance("generate_until", context, {"until": [free[-1]], "max_gen_toks": 12})]
    )
    assert cut == free[: free.index(free[-1])]


def test_a_task_runs_through_the_harness(tmp_path: Path) -> None:
    rows = [{"question": f"a{sign}", "choices": [" b", " c"], "gold": i % 2} for i, sign in enumerate("abcdef")]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "letters", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    scores = harnesses.run_lm_eval(build(CONFIG), TOKENIZER, [task], limit=None)
    assert 0.0 <= scores.tasks["letters"]["acc,none"] <= 1.0
    assert any(line.startswith("letters") for line in scores.lines())


def texts(harness: LmEvalModel, number: int, **options: object) -> list[str]:
    given = {"until": [], "max_gen_toks": 8} | options
    return harness.generate_until([make_instance("generate_until", "abc", given) for _ in range(number)])


def test_repeats_are_different_samples_whatever_the_batch(harness: LmEvalModel) -> None:
    found = texts(harness, 8, do_sample=True, temperature=1.0)
    assert len(set(found)) > 4
    assert texts(harness, 8, do_sample=True, temperature=1.0) == found
    assert texts(harness, 2, do_sample=True) == found[:2], "without a temperature it is 1, as in transformers"
    assert len(set(texts(harness, 8))) == 1
    other = harnesses.LmEvalModel(harness.model, TOKENIZER, batch_size=5, seed=1)
    assert texts(other, 8, do_sample=True) != found
    other.seed = 0
    assert texts(other, 8, do_sample=True) == found


def test_every_generation_option_of_a_task_counts(harness: LmEvalModel) -> None:
    free = texts(harness, 8, do_sample=True, temperature=1.0)
    greedy = texts(harness, 1)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert texts(harness, 8, **({"do_sample": True, "temperature": 1.0} | narrow)) == greedy * 8 != free
    for key in harnesses.SAMPLING_KEYS:
        found = harnesses.parse_gen_kwargs({"do_sample": True, key: 1}).sampling
        assert found == SamplingParams(**{"temperature": 1.0, key: 1})
        assert key in ("temperature", "repetition_penalty") or found != SamplingParams()
    for name in harnesses.LENGTH_KEYS:
        (text,) = harness.generate_until([make_instance("generate_until", "abc", {"until": [], name: 1})])
        assert len(text) <= 1


def test_an_option_without_effect_is_refused_by_name(harness: LmEvalModel) -> None:
    with pytest.raises(UsageError, match="num_beams, which would have no effect; known: max_gen_toks"):
        texts(harness, 1, num_beams=4)


TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "a <|im_end|> b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template that transformers reads too."""
    tokenizer = train_bpe(["be brief, user and assistant: a b c d e f g\n" * 20], 300)
    tokenizer.chat_template = CHATML_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    config = Config(tokenizer.vocab_size, 32, 2, 4, 2, 8, 64, 256, RotaryEmbedding(8, 1e4), False)
    path = tmp_path_factory.mktemp("chat")
    save(randomize_(build(config)), path, tokenizer=tokenizer)
    return path


def chat_harness(folder: Path, **kwargs: Any) -> LmEvalModel:
    tokenizer = load_tokenizer(folder)
    return harnesses.LmEvalModel(load(folder), tokenizer, chat=ChatTemplate(tokenizer, chat_template_kwargs=kwargs))


def test_a_conversation_is_what_the_template_writes_and_typed_control_tokens_stay_text(folder: Path) -> None:
    harness = chat_harness(folder)
    whole, begun = (
        harness.apply_chat_template(TALK),
        harness.apply_chat_template([*TALK, {"role": "assistant", "content": "e f"}], add_generation_prompt=False),
    )
    harness.render_contexts([whole, begun, whole])
    ids = harness.encode_context(whole)
    assert ids == harness.chat.encode_prompt(TALK)
    end = harness.tokenizer.token_to_id("<|im_end|>")
    assert ids.count(end) == 4, "what the user typed is no end"
    assert harness.encode_context(begun) == ids + harness.tokenizer.encode_continuation("e f")
    context, continuation = harness.encode_pair(whole, "e f")
    assert (context + continuation)[: len(ids)] == ids
    assert harness.tokenizer.decode(continuation).strip() == "e f"


@pytest.mark.parametrize("multiturn", [True, False])
def test_scores_through_the_template_are_the_harness_own(folder: Path, tmp_path: Path, multiturn: bool) -> None:
    rows = [{"question": f"a{sign}", "choices": ["b", "c d"], "gold": i % 2} for i, sign in enumerate("abcdef")]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "letters", "dataset_path": "json", "description": "be brief",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test", "fewshot_split": "test", "output_type": "multiple_choice", "num_fewshot": 2,
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    theirs = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    found = [
        evaluator.simple_evaluate(
            model=model, tasks=[dict(task)], bootstrap_iters=0, apply_chat_template=True, system_instruction="a b",
            fewshot_as_multiturn=multiturn, task_manager=tasks.TaskManager(include_defaults=False),
        )["samples"]["letters"]
        for model in (theirs, chat_harness(folder))
    ]  # fmt: skip
    likelihoods = [[float(r[0][0]) for row in rows for r in row["resps"]] for rows in found]
    assert likelihoods[1] == pytest.approx(likelihoods[0], abs=1e-3)
    assert len(set(likelihoods[0])) > 6
