"""The offline tour in small: it interrupts itself, goes on, learns to answer, to prefer and to reverse, exports, loads
again, and tells where it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_quest.cli.quickstart import run_quickstart
from llm_quest.cli.train import start_training
from llm_quest.data.chat import ChatTemplate
from llm_quest.errors import UsageError
from llm_quest.hub.load_tokenizer import load_tokenizer

SMALL = (
    "data.source=builtin:topics",
    "tokenizer.vocab_size=300",
    "model.config={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, "
    "intermediate_size: 64}",
    "batch_size=2",
    "sequence_length=64",
    "max_steps=6",
    "warmup_steps=1",
    "eval_tokens=200",
    "eval_steps=0",
    "samples.every_steps=3",
    "samples.max_new_tokens=4",
    "precision=fp32",
)
WORDS = ("red", "green", "blue", "cat", "dog", "bird", "sun", "moon", "star", "tree", "sea", "hill")


def changes(folder: Path) -> dict[str, list[str]]:
    """Rows of our own, and steps that can be counted on one hand."""
    rows = folder / "rows.jsonl"
    pairs = [(word, other) for word in WORDS for other in WORDS if word != other]
    told = [{"prompt": f"say {a} {b}", "completion": a, "chosen": a, "rejected": b} for a, b in pairs]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told))
    common = ["warmup_steps=1", "precision=fp32", "eval_steps=0"]
    tuned = [f"data.source={json.dumps(str(rows))}", *common, "batch_size=4", "sequence_length=64", "max_steps=3"]
    sizes = (
        "model.config={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, "
        "intermediate_size: 64}"
    )
    return {
        "sft": [*tuned, "learning_rate=1e-2", "samples.every_steps=0"],
        "dpo": [*tuned, "learning_rate=1e-2"],
        "grpo": [*common, sizes, "warmup={max_steps: 25, batch_size: 8}", "prompts_per_rollout=4", "num_generations=2",
                 "max_new_tokens=6", "max_steps=2", "eval_problems=20"],
    }  # fmt: skip


def test_the_tour_goes_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    run, small = tmp_path / "run", changes(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_quickstart(
            run, overrides=SMALL, stage_overrides=small | {"sft": [*small["sft"], "max_time=0.001s"]}, log=told.append
        )
    assert told[-2:] == [
        f"Interrupted; the checkpoint is saved. quest train {run / 'sft'} resumes it.",
        f"Interrupted. The finished stages stay in {run}; quest quickstart --out {run} starts again.",
    ]
    assert (run / "sft" / "checkpoints" / "step-00000001").is_dir()
    assert not (run / "dpo").exists()
    bits = summary(run, "bits_per_byte")

    told.clear()
    found = run_quickstart(run, overrides=SMALL, stage_overrides=small, log=told.append)
    assert found.bits_per_byte == bits
    assert 2 <= found.resumed_at < 6
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events.index("interrupted") < events.index("resumed") < events.index("finished")
    assert found.reload_difference == 0.0
    assert Path(found.report).is_file()
    assert (Path(found.export) / "model.safetensors").is_file()
    assert found.best_ngram == min(bits for name, bits in found.baselines.items() if "Kneser-Ney" in name)
    lines = found.lines()
    assert any("llama3-style" in line and f"{found.bits_per_byte:.3f}" in line for line in lines)
    assert [line.split(".")[0] for line in told if line[:1].isdigit()] == [str(number) for number in range(1, 11)]

    assert list(found.stages) == ["sft", "dpo", "grpo"]
    for recipe, stage in found.stages.items():
        assert stage.line() in " ".join(told)
        assert any(stage.line() in line and line.split()[0] == recipe for line in lines)
        assert (Path(stage.run) / "report.html").is_file()
        outcome = start_training(stage.run, (), out=None, quiet=True, log=lambda line: None)
        assert (outcome.run, outcome.status, outcome.exit_code) == (stage.run, "finished", 0)
    assert found.stages["sft"].after < found.stages["sft"].before
    assert found.stages["sft"].after == pytest.approx(summary(run / "sft", "loss"), rel=1e-4)
    low, high = found.stages["dpo"].intervals[1]
    assert 0 <= low <= found.stages["dpo"].after <= high <= 1
    assert found.stages["grpo"].after == pytest.approx(summary(run / "grpo", "accuracy"))
    assert [one.question.split()[1] for one in found.answers] == [one.reference for one in found.answers]
    assert load_tokenizer(found.export).chat_template == ChatTemplate(load_tokenizer(found.run)).template


def summary(run: Path, measure: str) -> float:
    """What the recipe itself measured at its end."""
    return float(json.loads((run / "summary.json").read_text())["metrics"][f"eval/{measure}"])


def test_a_folder_that_is_no_tour_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not from an earlier quickstart"):
        run_quickstart(tmp_path, log=lambda line: None)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
