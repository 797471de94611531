"""A reward model and a classifier as their users use them: `quest score`, an export, transformers' batch of two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli.classify import classify_text
from llm_quest.cli.export import export_run
from llm_quest.cli.main import app
from llm_quest.cli.score import score_conversations
from llm_quest.data.chat import ALPACA_TEMPLATE, CHATML_TEMPLATE, ChatTemplate, end_template_at_answer
from llm_quest.data.conversations import Conversation
from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.load_save import write_model_json
from llm_quest.models.build import build
from llm_quest.models.build import preset as get_preset
from llm_quest.objectives.classification import last_token_outputs, pad_rows
from llm_quest.techniques.score_head import ScoreHead

transformers = pytest.importorskip("transformers")
TEXT = ["one good answer and so on", "What is it? It is 4.", "question number seven", "a bad one, and longer than that"]
ANSWERS = ("one good answer and so on", "bad")
TALKS = [Conversation((("user", "question"), ("assistant", answer)), "here") for answer in ANSWERS]


def make_tokenizer(kind: str) -> Tokenizer:
    """Tokenizers by what they have to pad with: a token of its own, one of unknown words, nothing but the end."""
    if kind == "pad":
        made = train_bpe(TEXT, 300, SPECIAL_TOKENS)
        return made.with_pad_token("<|pad|>")
    control = ("<|endoftext|>", "<unk>") if kind == "unknown" else ("<|endoftext|>",)
    backend = train_bpe(TEXT, 290, control).backend_tokenizer
    return Tokenizer(
        backend,
        eos_tokens=["<|endoftext|>"],
        bos_token="<|endoftext|>",
        unk_token="<unk>" if kind == "unknown" else None,
    )


def write_run(run: Path, tokenizer: Tokenizer, head: ScoreHead, preset: str) -> Path:
    """A run folder of a model with a score head, as the recipes write it."""
    model: Any = build(replace(get_preset(preset).config, vocab_size=tokenizer.vocab_size), seed=0)
    head(model)
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    safetensors.torch.save_file(tensors, checkpoint / "model.safetensors")
    write_model_json(run, model)
    tokenizer.save(run / "tokenizer")
    return run


def training_scores(run: Path) -> list[float]:
    """What the run's own model gives at the end of each answer, as in training."""
    model: Any = quest.load(run)
    rows = ChatTemplate(Tokenizer.load(run / "tokenizer")).encode_conversations(TALKS)
    with torch.no_grad():
        return last_token_outputs(model, *pad_rows([row.input_ids.tolist() for row in rows]))[:, 0].tolist()


@pytest.mark.parametrize("preset", ["llama3.2-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("kind", ["pad", "unknown", "nothing"])
def test_transformers_reads_the_scores_of_an_exported_reward_model_alone_and_in_a_batch(
    tmp_path: Path, kind: str, preset: str
):
    run = write_run(tmp_path / "run", make_tokenizer(kind), ScoreHead(1, std=1.0), preset)
    export_run(run, tmp_path / "out")
    wanted = training_scores(run)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talks = [talk.message_dicts for talk in TALKS]
    both = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        alone = [
            theirs(**tokenizer.apply_chat_template([talk], return_tensors="pt", return_dict=True)).logits.item()
            for talk in talks
        ]
        assert alone == pytest.approx(wanted, abs=1e-4)
        assert theirs(**both).logits[:, 0].tolist() == pytest.approx(wanted, abs=1e-4)
    for folder in (run, tmp_path / "out"):
        scores = score_conversations(str(folder), None, "question", ANSWERS).scores
        assert [one.score for one in scores] == pytest.approx(wanted, abs=1e-4)


def test_an_exported_reward_models_card_says_what_it_is(tmp_path: Path):
    run = write_run(tmp_path / "run", make_tokenizer("pad"), ScoreHead(1), "llama3.2-tiny")
    found = export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "library_name: transformers" in card
    assert "A LlamaForSequenceClassification of" in card
    assert "It is a reward model" in card
    assert "AutoModelForSequenceClassification" in card
    assert found.advice == f"use it here: quest score {tmp_path / 'out'}"


def test_an_exported_classifier_gives_transformers_the_same_probabilities(tmp_path: Path):
    head = ScoreHead(3, ("good", "bad", "neither"), std=1.0)
    run = write_run(tmp_path / "run", make_tokenizer("nothing"), head, "llama3.2-tiny")
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It classifies texts and writes none; classes: good, bad, neither." in card
    pipe = transformers.pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    texts = ["one good answer", "a bad one, and longer than that"]
    for text, theirs in zip(texts, pipe(texts, top_k=None, batch_size=2), strict=True):
        ours = classify_text(str(tmp_path / "out"), text, device="cpu").probabilities
        assert {one["label"]: one["score"] for one in theirs} == pytest.approx(ours, abs=1e-5)
        assert classify_text(str(run), text, device="cpu").probabilities == pytest.approx(ours, abs=1e-6)


def test_conversations_of_a_file_are_scored_by_the_command(tmp_path: Path):
    run = write_run(tmp_path / "run", make_tokenizer("pad"), ScoreHead(1, std=1.0), "llama3.2-tiny")
    file = tmp_path / "talks.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "question", "completion": answer}) for answer in ANSWERS))
    result = CliRunner().invoke(app, ["score", str(run), str(file), "--json"])
    assert result.exit_code == 0
    said = json.loads(result.stdout)["scores"]
    assert [one["score"] for one in said] == pytest.approx(training_scores(run), abs=1e-5)
    assert [one["answer"] for one in said] == list(ANSWERS)
    with pytest.raises(UsageError, match="give a FILE of conversations or preferences, or --prompt"):
        score_conversations(str(run), str(file), "question", ())
    with pytest.raises(DataError, match=r"--answer 1: [\d,]+ tokens, the model reads"):
        score_conversations(str(run), None, "q", ["a long one " * 500])
    plain = quest.save(quest.build("llama3.2-tiny"), tmp_path / "plain")
    with pytest.raises(UsageError, match="is not a reward model; train one with quest train reward"):
        score_conversations(str(plain), None, "question", ANSWERS)


LLAMA3 = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim }}"
    "{{ '<|im_end|>' }}{%- endfor -%}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, ALPACA_TEMPLATE, LLAMA3], ids=["chatml", "alpaca", "llama 3"])
def test_a_template_ends_where_training_ended_and_asks_as_before(template: str):
    tokenizer = make_tokenizer("pad")
    tokenizer.chat_template = template
    before = ChatTemplate(tokenizer)
    rows = [row.input_ids.tolist() for row in before.encode_conversations(TALKS)]
    prompt = before.encode_prompt(TALKS[0].prompt)
    ended = end_template_at_answer(tokenizer)
    assert tokenizer.chat_template == template
    after = ChatTemplate(tokenizer, ended)
    assert after.encode_whole(TALKS) == rows
    assert [row.input_ids.tolist() for row in after.encode_conversations(TALKS)] == rows
    assert after.encode_prompt(TALKS[0].prompt) == prompt
    assert end_template_at_answer(tokenizer) == ended


def test_a_template_that_writes_more_after_an_answer_is_refused():
    tokenizer = make_tokenizer("pad")
    tokenizer.chat_template = CHATML_TEMPLATE + "{% if not add_generation_prompt %}the end{% endif %}"
    with pytest.raises(DataError, match="more than white space after an answer's end"):
        end_template_at_answer(tokenizer)


def test_rows_of_preferences_are_scored_answer_by_answer_with_their_accuracy(tmp_path: Path):
    tokenizer = make_tokenizer("pad")
    run = write_run(tmp_path / "run", tokenizer, ScoreHead(outputs=1), "llama3.2-tiny")
    rows = [
        {"prompt": f"question {n}", "chosen": f"one good answer {n}", "rejected": f"bad {n} and so on"}
        for n in range(6)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score_conversations(str(run), str(file), None, ())
    assert [one.answer for one in found.scores] == [row[key] for row in rows for key in ("chosen", "rejected")]
    assert found.scores[1].where == f"{file}:1, answer 2"
    alone = [score_conversations(str(run), None, row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
    pairs = [tuple(score.score for score in one.scores) for one in alone]
    assert [one.score for one in found.scores] == pytest.approx([score for pair in pairs for score in pair], abs=1e-5)
    assert found.accuracy == sum(better > worse for better, worse in pairs) / 6
    assert found.lines()[-1] == f"the best answer has the highest score: {found.accuracy:.1%}"
    assert alone[0].accuracy is None
