"""Fine-tuning on conversations, real and tiny: it learns the answers, resumes with the same bits, and what it leaves
talks, here and in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm_quest.cli.export import export_run
from llm_quest.data.chat import ChatTemplate
from llm_quest.errors import DataError, UsageError
from llm_quest.generation.generate import generate
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.techniques.model_spec import strip_wrapper_names
from tests.later import Later
from tests.recipes.tuned import WORDS, base, metrics, start_run, weights, write_rows

transformers = Later("transformers")

RECIPE = """
recipe: sft
data: {held_out: 0.1}
batch_size: 4
sequence_length: 48
max_steps: 60
eval_steps: 30
samples: {every_steps: 30, num_prompts: 2, max_new_tokens: 6}
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answer is the word that was asked for."""
    asked = [{"prompt": f"say {word} {other}", "completion": word} for word in WORDS for other in WORDS]
    asked += [{"prompt": "too long " * 40, "completion": "never"}, {"prompt": "say", "completion": ""}]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", asked)


@pytest.fixture(scope="module")
def sft_run(start: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sft"
    start_run("sft", RECIPE, out, f"model.load={start}", f"data.source={rows}")
    return out


def test_held_out_answers_are_learned_and_everything_is_left_in_the_folder(sft_run: Path):
    last = metrics(sft_run)[-1]
    assert last["eval/loss"] < 0.3
    assert last["eval/perplexity"] == pytest.approx(torch.tensor(last["eval/loss"]).exp().item())
    facts = json.loads((sft_run / "data.json").read_text())
    assert facts["dropped"] == {"empty answer": 1, "longer than a row of 48 tokens": 1}
    assert (facts["train_rows"], facts["held_out_rows"]) == (90, 10)
    told = json.loads((sft_run / "samples" / "step-00000060.json").read_text())["samples"]
    assert [one["text"] for one in told] == [one["wanted"] for one in told]


def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(sft_run: Path, start: Path, rows: Path, tmp_path):
    pairs = [f"model.load={start}", f"data.source={rows}", "save_steps=30", "save_total_limit=9"]
    out = tmp_path / "again"
    start_run("sft", RECIPE, out, *pairs)
    shutil.rmtree(out / "checkpoints" / "step-00000060")
    start_run("sft", RECIPE, out, *pairs)
    assert weights(out, 60) == weights(sft_run, 60)
    assert [row["step"] for row in metrics(out)] == list(range(1, 61))


def test_the_split_into_micro_batches_changes_nothing(sft_run: Path, start: Path, rows: Path, tmp_path):
    pairs = [f"model.load={start}", f"data.source={rows}", "micro_batch_size=1", "max_steps=2"]
    start_run("sft", RECIPE, tmp_path / "split", *pairs)
    pairs[2] = "micro_batch_size=4"
    start_run("sft", RECIPE, tmp_path / "whole", *pairs)
    split, whole = metrics(tmp_path / "split")[0], metrics(tmp_path / "whole")[0]
    for key in ("loss", "grad_norm", "num_targets"):
        assert split[key] == pytest.approx(whole[key], rel=1e-6)


def test_the_run_answers_and_stops_by_its_own_end(sft_run: Path):
    model, tokenizer = load(sft_run), load_tokenizer(sft_run)
    prompt = ChatTemplate(tokenizer).encode_prompt([{"role": "user", "content": "say moon cat"}])
    done = generate(model, [prompt], max_new_tokens=20, temperature=0.0, tokenizer=tokenizer)[0]
    assert done.text == "moon"
    assert done.tokens[-1] == tokenizer.token_to_id("<|im_end|>")


@pytest.mark.filterwarnings("ignore")
def test_the_export_talks_in_transformers(sft_run: Path, tmp_path: Path):
    export_run(sft_run, tmp_path / "out")
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "out")
        for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say star dog"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "star<|im_end|>"


def test_with_lora_only_adapters_learn_and_the_run_still_talks(start: Path, rows: Path, tmp_path: Path):
    out = tmp_path / "run"
    pairs = [f"model.load={start}", f"data.source={rows}", "techniques=[{name: lora, rank: 4}]", "max_steps=12"]
    start_run("sft", RECIPE, out, *pairs, "optim=adamw", "samples.every_steps=0")
    told = metrics(out)
    assert told[-1]["loss"] < told[0]["loss"] - 0.2
    before, after = load(start), load(out)
    for name, parameter in before.named_parameters():
        wrapped = {strip_wrapper_names(n): p for n, p in after.named_parameters() if "lora" not in n.lower()}
        assert torch.equal(parameter, wrapped[name]), name
    assert ChatTemplate(load_tokenizer(out)).encode_prompt([{"role": "user", "content": "say"}])
    assert after.generation_config is not None
    assert load_tokenizer(out).token_to_id("<|im_end|>") in after.generation_config.eos_token_ids


def test_dropped_rows_are_said_and_mistakes_are_told(start: Path, rows: Path, tmp_path: Path):
    said: list[str] = []
    pairs = [f"model.load={start}", f"data.source={rows}", "max_steps=2"]
    start_run("sft", RECIPE, tmp_path / "a", *pairs, log=said.append)
    assert any("dropped, empty answer: 1; dropped, longer than a row of 48 tokens: 1" in line for line in said)
    with pytest.raises(UsageError, match="there is no run runs/nothing: train one first"):
        start_run("sft", RECIPE, tmp_path / "b", "model.load=runs/nothing", f"data.source={rows}")
    with pytest.raises(UsageError, match=r"sequence_length 4096 is longer than the model's context of 256"):
        start_run("sft", RECIPE, tmp_path / "b", *pairs, "sequence_length=4096")
    with pytest.raises(DataError, match="no conversation fits into 4 tokens"):
        start_run("sft", RECIPE, tmp_path / "b", *pairs, "sequence_length=4")
